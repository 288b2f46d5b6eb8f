#!/usr/bin/env bash
# Runs a command on several hosts over ssh, without a scheduler, one process each:
#   HOSTS="a b" DIRECTORY=/home/me/moe_reduce ./launch/hosts.sh train --config=… --workdir=/shared/…
# The first host is the coordinator. Each host needs this directory with its .venv, and all must see --workdir.
# When a process dies, the other processes are stopped; RESTARTS=n restarts all of them from the last checkpoint, up to
# n times. Logs: runs/logs/hosts-NUMBER.log on this machine. DRY_RUN=1 prints every command. REMOTE_SHELL replaces ssh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "hosts.sh: $1" >&2; exit 2; }
[[ -n "${HOSTS:-}" ]] || fail 'set HOSTS="a b", the names that ssh knows'
[[ $# -ge 1 ]] || fail "what shall run? Such as: train --config=configs/dense_llama_125m.py --workdir=/shared/dense"
read -ra hosts <<<"$HOSTS"
DIRECTORY="${DIRECTORY:-$PWD}"
PORT="${PORT:-$((20000 + RANDOM % 20000))}"
words="$(printf '%q ' "$@")"

# -tt: the remote process ends with the connection
start() {
  local number="$1" host="${hosts[$1]}" line
  line="cd $(printf %q "$DIRECTORY") && exec ${PYTHON:-.venv/bin/python} -m moe_reduce $words--coordinator=${hosts[0]}:$PORT --processes=${#hosts[@]} --process=$number"
  if [[ -n "${DRY_RUN:-}" ]]; then printf '%q ' ${REMOTE_SHELL:-ssh -tt} "$host" "$line"; echo; return; fi
  ${REMOTE_SHELL:-ssh -tt} "$host" "$line" >>"runs/logs/hosts-$number.log" 2>&1 </dev/null &
  pids[number]=$!
}

stop_all() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; }

# runs all processes; the first failure stops the other processes, and its status is returned
attempt() {
  local status ended number second
  pids=()
  for number in "${!hosts[@]}"; do start "$number"; done
  trap 'stop_all; exit 130' INT TERM
  while ((${#pids[@]} > 0)); do
    status=0
    wait -n -p ended "${pids[@]}" || status=$?
    for number in "${!pids[@]}"; do
      [[ "${pids[number]}" == "$ended" ]] || continue
      unset "pids[number]"
      ((status == 0)) && continue
      echo "hosts.sh: process $number on ${hosts[number]} ended with status $status (runs/logs/hosts-$number.log); stopping the others" >&2
      for ((second = 0; second < ${GRACE:-30}; second++)); do  # they notice the loss, report it and exit
        ((${#pids[@]} > 0)) && kill -0 "${pids[@]}" 2>/dev/null || break
        sleep 1
      done
      stop_all
      wait || true
      return "$status"
    done
  done
}

mkdir -p runs/logs
for ((restart = 0; ; restart++)); do
  status=0
  attempt || status=$?
  ((status == 0)) && break
  ((status == 2)) && exit 2  # an invalid input, which a restart would repeat
  ((restart < ${RESTARTS:-0})) || { echo "hosts.sh: the same command goes on from the last checkpoint" >&2; exit "$status"; }
done
