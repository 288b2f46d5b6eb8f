# To be sourced: trains many small models on a CPU, one on each core, as many at once as there are cores. Resumable.
# queue LABEL ARGUMENTS...  remembers `moe-reduce ARGUMENTS...`
# run_queue                 runs them all, logging to runs/logs/LABEL.log, and ends the script if one failed
PYTHON="${PYTHON:-.venv/bin/python}"
QUEUE="$(mktemp)"
FAILURES="$(mktemp)"

# names of a configuration's variants
variants() {
  "$PYTHON" -c "import sys; from moe_reduce.commands.config_file import read; from moe_reduce.core.config import any_from_dict
print(*read(sys.argv[1], [], any_from_dict))" "$1"
}

queue() { printf '%q ' "$@" >>"$QUEUE" && echo >>"$QUEUE"; }

# core $1 takes every CORES-th job
work() {
  awk -v core="$1" -v cores="$2" 'NR % cores == core' "$QUEUE" | while read -r line; do
    eval "job=($line)"
    echo "core $1: ${job[0]}"
    taskset -c "$1" "$PYTHON" -m moe_reduce "${job[@]:1}" >"runs/logs/${job[0]}.log" 2>&1 </dev/null || echo "${job[0]}" >>"$FAILURES"
  done
}

run_queue() {
  local cores
  cores="$(nproc)"
  mkdir -p runs/logs
  for ((core = 0; core < cores; core++)); do work "$core" "$cores" & done
  wait
  if [[ -s "$FAILURES" ]]; then
    echo "these failed (see runs/logs), so no table is made:" >&2
    cat "$FAILURES" >&2
    exit 1
  fi
  : >"$QUEUE"
}
