#!/usr/bin/env bash
# Runs on each worker of a slice, called by tpu.sh:
#   worker.sh install               makes .venv with Python 3.11 or newer and the package
#   worker.sh start NAME words…     moe-reduce words… in the background, unless it is running already
#   worker.sh state NAME words…     prints running, ended STATUS, absent, or busy (running with other words)
#   worker.sh stop NAME             ends the run; its last checkpoint stays
# The run holds the lock of NAME in runs/logs for as long as it lives, however it ends.
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
  if [[ -z "$python" && ! -x .venv/bin/python ]]; then  # such as ubuntu2204, which has Python 3.10
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
  # A session of its own outlives ssh; its number is the process group that `stop` ends. flock waits for the lock,
  # because a query whether the lock is held holds it for a moment.
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
