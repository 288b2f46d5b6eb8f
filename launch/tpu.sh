#!/usr/bin/env bash
# A TPU VM slice from the first to the last command. Needs gcloud, and NAME, ZONE and TYPE in the environment:
#   NAME=moe ZONE=us-central2-b TYPE=v4-32 ./launch/tpu.sh create
#   ./launch/tpu.sh sync                              the files that git knows to every worker, and the package installed
#   ./launch/tpu.sh run train --config=… --workdir=…  on every worker, in the background; again: goes on
#   ./launch/tpu.sh watch train --config=… --workdir=…   as run; a slice that is taken away is made again, and resumes
#   ./launch/tpu.sh logs | status | stop | delete
# --dry-run as the first word prints every command instead of running it. SPOT=1: a slice that may be taken away.
# BUCKET=name: mounted as ~/bucket on every worker, where --workdir must then lie: what survives a slice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
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

sync_files() {
  local archive
  archive="$(mktemp -d)/moe_reduce.tar.gz"
  do_it bash -c "git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -czf $archive"
  do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:moe_reduce.tar.gz" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all
  on all "mkdir -p $REMOTE && tar -xzf moe_reduce.tar.gz -C $REMOTE && cd $REMOTE && python3 -m venv .venv && .venv/bin/pip install --quiet -e . 'jax[tpu]'"
  if [[ -n "${BUCKET:-}" ]]; then
    on all "mkdir -p bucket && (mountpoint -q bucket || gcsfuse --implicit-dirs $BUCKET bucket)"
  fi
}

run() {
  [[ $# -ge 1 ]] || fail "run what? Such as: run train --config=configs/shared_moe_50m.py --workdir=bucket/shared"
  local words
  words="$(printf '%q ' "$@")"
  # every worker alike; what is running already goes on undisturbed
  on all "cd $REMOTE && mkdir -p runs/logs && (pgrep -f '[m]oe_reduce $1' >/dev/null || nohup .venv/bin/python -m moe_reduce $words--distributed >>runs/logs/$NAME.log 2>&1 </dev/null &) ; sleep 1"
}

state() { gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --format='value(state)' 2>/dev/null || echo MISSING; }

# 0: some worker still runs it; 1: it ended well on all; 2: it ended otherwise
progress() {
  local found
  found="$(tpu ssh --worker=0 --command="pgrep -f '[m]oe_reduce $1' >/dev/null && echo running || tail -n 1 $LOG")" || return 0
  case "$found" in
    *running*) return 0 ;;
    *summary.json*) return 1 ;;
    *) echo "$found" >&2; return 2 ;;
  esac
}

watch() {
  if [[ -n "$DRY" ]]; then
    echo "# every ${EVERY:-60} s: where the slice is gone"
    remove; create; sync_files; run "$@"
    return
  fi
  run "$@"
  while true; do
    sleep "${EVERY:-60}"
    case "$(state)" in
      READY)
        local ended=0
        progress "$1" || ended=$?
        [[ $ended == 1 ]] && { echo "done"; return; }
        [[ $ended == 2 ]] && fail "the run has ended: read ./launch/tpu.sh logs"
        ;;
      CREATING | STARTING | RESTARTING | REPAIRING) ;;
      *)
        echo "$(date -u +%FT%TZ) the slice is gone: made again, and the run goes on from its last checkpoint"
        remove || true
        until create; do sleep "${EVERY:-60}"; done
        sync_files
        run "$@"
        ;;
    esac
  done
}

case "$COMMAND" in
  create) create ;;
  sync) sync_files ;;
  run) run "$@" ;;
  watch) [[ $# -ge 1 ]] || fail "watch what? The words of run"; watch "$@" ;;
  logs) on 0 "tail -n ${LINES_SHOWN:-50} -f $LOG" ;;
  status) tpu describe --format='value(state)'; on 0 "tail -n 3 $LOG" ;;
  stop) on all "pkill -INT -f '[m]oe_reduce' || true" ;;
  delete) remove ;;
  *) usage ;;
esac
