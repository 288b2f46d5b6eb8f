# Sourced by scripts that run many small jobs on a CPU, one on each core. Resumable: the same script again continues.
# queue LABEL ARGUMENTS...  remembers `moe-reduce ARGUMENTS...`
# run_queue                 runs all queued jobs, with logs in runs/logs/LABEL.log; ends the script if one fails
# run_small_mixture NAME CONFIG OVERRIDES...
#                           trains configs/small_qwen3_moe.py, runs each variant of configs/CONFIG.py with each of SEEDS
#                           in runs/NAME
# reduce_small_mixture NAME CONFIG RESULT TITLE OVERRIDES...
#                           the same, collected in docs/results/RESULT
# TEXT=SOURCE in the environment replaces the corpus of the configurations, which need the network: files such as
# 'my/*.txt', or python-stdlib. Scripts pass it on as "${TEXT_OVERRIDE[@]}".
PYTHON="${PYTHON:-.venv/bin/python}"
QUEUE="$(mktemp)"
FAILURES="$(mktemp)"
TEXT_OVERRIDE=(${TEXT:+"--config.data.source=$TEXT"})

# variants CONFIG: the names of a configuration's variants
variants() {
  "$PYTHON" -c "import sys; from moe_reduce.commands.config_file import read; from moe_reduce.core.config import any_from_dict
print(*read(sys.argv[1], [], any_from_dict))" "$1"
}

queue() { printf '%q ' "$@" >>"$QUEUE" && echo >>"$QUEUE"; }

# work CORE CORES: every CORES-th job, until one ends with status 2, an invalid input that the next jobs share
work() {
  awk -v core="$1" -v cores="$2" 'NR % cores == core' "$QUEUE" | while read -r line; do
    grep -q '^2 ' "$FAILURES" && break
    eval "job=($line)"
    echo "core $1: ${job[0]}"
    status=0
    taskset -c "$1" "$PYTHON" -m moe_reduce "${job[@]:1}" >"runs/logs/${job[0]}.log" 2>&1 </dev/null || status=$?
    ((status == 0)) || echo "$status ${job[0]}" >>"$FAILURES"
  done
}

run_queue() {
  local cores core status label
  cores="$(nproc)"
  mkdir -p runs/logs
  for ((core = 0; core < cores; core++)); do work "$core" "$cores" & done
  wait
  if [[ -s "$FAILURES" ]]; then
    echo "no table is made, because these jobs failed:" >&2
    while read -r status label; do echo "$label (runs/logs/$label.log): $(tail -n 1 "runs/logs/$label.log")" >&2; done <"$FAILURES"
    exit 1
  fi
  : >"$QUEUE"
}

run_small_mixture() {
  local name="$1" config="configs/$2.py" seed variant
  local overrides=(--config.mesh.data=1 "${TEXT_OVERRIDE[@]}" "${@:3}")
  queue small_qwen3_moe train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe "${overrides[@]}"
  run_queue
  for seed in ${SEEDS:-0 1 2}; do
    for variant in $(variants "$config"); do
      queue "$name-$seed-$variant" reduce --config="$config" --workdir="runs/$name/seed$seed" --variant="$variant" \
        --config.train.seed="$seed" "${overrides[@]}"
    done
  done
  run_queue
}

reduce_small_mixture() {
  local name="$1" config="$2" result="$3" title="$4"
  run_small_mixture "$name" "$config" "${@:5}"
  "$PYTHON" -m moe_reduce report --runs "runs/$name"/seed* --out="docs/results/$result" --overwrite --title="$title" \
    --made-by="${TEXT:+TEXT='$TEXT' }./launch/${0##*/}"
}
