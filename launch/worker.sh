#!/usr/bin/env bash
# One worker of a slice, where tpu.sh calls it:
#   worker.sh install               .venv with Python 3.11 or newer and the package
#   worker.sh start NAME words…     moe-reduce words… in the background; what is running already goes on undisturbed
#   worker.sh state NAME words…     running, ended STATUS, absent, or busy with other words
#   worker.sh stop NAME             ends it; its last checkpoint stays
# NAME's lock in runs/logs is held as long as the run lives, however it ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p runs/logs
COMMAND="$1"; shift

install() {
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    python=""
  done
  if [[ -z "$python" && ! -x .venv/bin/python ]]; then  # as on ubuntu2204, whose own is 3.10
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
  ROOT="$PWD" EXTRAS="[tpu]" PYTHON="${python:-.venv/bin/python}"
  source launch/install.sh
}

running() { ! flock --nonblock "$files.lock" true; }

start() {
  if running; then
    [[ "$(<"$files.words")" == "$*" ]] && return
    echo "worker.sh: here runs: $(<"$files.words"): stop that first" >&2
    return 2
  fi
  echo "$*" >"$files.words"
  rm -f "$files.status"
  # A session of its own outlives ssh; its number is that of the process group that `stop` ends. The lock is waited for,
  # since whoever asks whether it is held holds it for that moment.
  setsid nohup flock --wait 10 "$files.lock" bash -c 'status=0; "$@" || status=$?; echo "$status" >"$0"' \
    "$files.status" "${PYTHON:-.venv/bin/python}" -m moe_reduce "$@" >>"$files.log" 2>&1 </dev/null &
  echo $! >"$files.group"
  local try
  for ((try = 0; try < 50; try++)); do
    if running || [[ -f "$files.status" ]]; then return; fi
    sleep 0.1
  done
}

state() {
  if [[ "$(cat "$files.words" 2>/dev/null)" != "$*" ]]; then
    if running; then echo busy; else echo absent; fi
  elif running; then echo running
  elif [[ -f "$files.status" ]]; then echo "ended $(<"$files.status")"
  else echo absent
  fi
}

stop() { if running; then kill -TERM -- "-$(<"$files.group")"; fi; }

if [[ "$COMMAND" != install ]]; then
  files="runs/logs/$1"; shift
fi
case "$COMMAND" in
  install | start | state | stop) "$COMMAND" "$@" ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
