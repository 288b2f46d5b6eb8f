#!/usr/bin/env bash
# Creates, uses and deletes a TPU VM slice. Needs gcloud, and NAME, ZONE and TYPE in the environment:
#   NAME=moe ZONE=us-central2-b TYPE=v4-32 ./launch/tpu.sh create
#   ./launch/tpu.sh sync                              copies git's files to every worker and installs the package
#   ./launch/tpu.sh run train --config=… --workdir=…  on every worker, in the background; the same again resumes
#   ./launch/tpu.sh watch train --config=… --workdir=bucket/…   as run; recreates a preempted slice and resumes an
#                                     interrupted run, up to RESTARTS times (3) on each slice
#   ./launch/tpu.sh logs | status | stop | delete
# --dry-run as the first word prints every command instead of running it. SPOT=1 asks for a preemptible slice.
# BUCKET=name is mounted as bucket/ on every worker; a --workdir below it survives the slice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
fail() { echo "tpu.sh: $1" >&2; exit 2; }
DRY=""
[[ "${1:-}" == --dry-run ]] && { DRY=1; shift; }
[[ $# -ge 1 ]] || usage
COMMAND="$1"; shift
for needed in NAME ZONE TYPE; do [[ -n "${!needed:-}" ]] || fail "set $needed, as in NAME=moe ZONE=us-central2-b TYPE=v4-32"; done
VERSION="${VERSION:-tpu-ubuntu2204-base}"
REMOTE="${REMOTE:-moe_reduce}"  # directory on the workers
LOG="$REMOTE/runs/logs/$NAME.log"

do_it() {
  if [[ -n "$DRY" ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
tpu() {
  local verb="$1"; shift
  do_it gcloud compute tpus tpu-vm "$verb" "$NAME" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} "$@"
}
# on one worker, or on all
on() { tpu ssh --worker="$1" --command="$2"; }

create() { tpu create --accelerator-type="$TYPE" --version="$VERSION" ${SPOT:+--spot}; }
remove() { tpu delete --quiet; }

# && between all steps, because `set -e` is off where a caller tests the result
sync_files() {
  local archive
  archive="$(mktemp -d)/moe_reduce.tar.gz"
  do_it bash -c "git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -czf $archive" &&
    do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:moe_reduce.tar.gz" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all &&
    on all "mkdir -p $REMOTE && tar -xzf moe_reduce.tar.gz -C $REMOTE && $REMOTE/launch/worker.sh install" || return
  if [[ -n "${BUCKET:-}" ]]; then
    on all "cd $REMOTE && mkdir -p bucket && (mountpoint -q bucket || gcsfuse --implicit-dirs $BUCKET bucket)"
  fi
}

# on_workers VERB words…: runs `worker.sh VERB NAME words…` on every worker
on_workers() { on all "$(printf '%q ' "$REMOTE/launch/worker.sh" "$1" "$NAME" "${@:2}")"; }

run() {
  [[ $# -ge 1 ]] || fail "run what? Such as: run train --config=configs/shared_moe_50m.py --workdir=bucket/shared"
  on_workers start "$@" --distributed
}

# state of the slice in Google's words, MISSING where there is none, UNKNOWN where the query failed
state() {
  local said
  said="$(tpu describe --format='value(state)' 2>&1)" && { echo "${said##*$'\n'}"; return; }
  case "$said" in *NOT_FOUND* | *"not found"*) echo MISSING ;; *) echo UNKNOWN ;; esac
}

remake() { remove || true; create && sync_files; }

watch() {
  [[ $# -ge 1 ]] || fail "watch what? The words of run"
  [[ -n "${BUCKET:-}" && " $* " == *" --workdir=bucket/"* ]] || fail "watch needs BUCKET, and --workdir=bucket/…: what lies on a slice goes with it"
  if [[ -n "$DRY" ]]; then
    tpu describe --format='value(state)'
    on_workers state "$@" --distributed
    echo "# where the slice is gone:"
    remake
    echo "# where the run is cut off:"
    run "$@"
    return
  fi
  local restarts=0 ready=1 found
  says() { grep -qx "$1" <<<"$found"; }  # at least one worker
  while true; do
    case "$(state)" in
      READY)
        if [[ -z "$ready" ]]; then
          sync_files && ready=1
        elif found="$(on_workers state "$@" --distributed)"; then
          if says busy; then fail "another run lives on the slice: stop it first"; fi
          if says "ended 2"; then fail "there is a mistake in the command: read ./launch/tpu.sh logs"; fi
          if says running; then :; elif says absent || says "ended [1-9][0-9]*"; then
            ((restarts <= ${RESTARTS:-3})) || fail "the run ends again and again: read ./launch/tpu.sh logs"
            restarts=$((restarts + 1))
            run "$@" || true
          else
            echo "done"
            return
          fi
        fi
        ;;
      PREEMPTED | TERMINATED | STOPPED | MISSING)
        echo "$(date -u +%FT%TZ) the slice is gone: made again, and the run goes on from its last checkpoint"
        restarts=0 ready=""
        remake && ready=1
        ;;
      *) ;;  # being created or repaired, or the query failed: ask again
    esac
    sleep "${EVERY:-60}"
  done
}

case "$COMMAND" in
  create) create ;;
  sync) sync_files ;;
  run) run "$@" ;;
  watch) watch "$@" ;;
  logs) on 0 "tail -n ${LINES_SHOWN:-50} -f $LOG" ;;
  status) tpu describe --format='value(state)'; on 0 "tail -n 3 $LOG" ;;
  stop) on_workers stop ;;
  delete) remove ;;
  *) usage ;;
esac
