#!/usr/bin/env bash
# SkeMA against LoRA and full fine-tuning on a CPU: UUIDs by heart, and WikiText-2 -> docs/results. Hours; resumable.
# Every learning rate with the first seed, then the best of each method and size with the others.
# SEEDS="0 1 2" TASKS="uuid wikitext2" ./launch/adapters.sh; the base is that of ./launch/reduce_small.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

declare -A TITLES=(
  [uuid]="UUIDs by heart: characters right of learned pairs (and of others), best of the learning rates"
  [wikitext2]="WikiText-2: perplexity, best learning rate by validation"
)
read -ra seeds <<<"${SEEDS:-0 1 2}"

# adaptations TASK SEED VARIANT...
adaptations() {
  local task="$1" seed="$2"
  for variant in "${@:3}"; do
    queue "adapt_$task-$seed-$variant" adapt --config="configs/adapt_$task.py" --workdir="runs/adapt_$task/seed$seed" \
      --variant="$variant" --config.train.seed="$seed" --config.mesh.data=1
  done
}

# table TASK VARIANT...: of what has finished
table() {
  local task="$1" runs=() variant place
  for variant in "${@:2}"; do
    for place in "runs/adapt_$task"/seed*/"$variant"; do
      if [[ -f "$place/summary.json" ]]; then runs+=("$place"); fi
    done
  done
  "$PYTHON" -m moe_reduce report --runs "${runs[@]}" --out="docs/results/adapt_$task" --overwrite \
    --title="${TITLES[$task]}" --made-by="./launch/adapters.sh"
}

best() { "$PYTHON" -c "import json, sys; print(*json.load(open(sys.argv[1]))['best'])" "docs/results/adapt_$1/summary.json"; }

queue small_qwen3_moe train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe --config.mesh.data=1
run_queue
for task in ${TASKS:-uuid wikitext2}; do
  names="$(variants "configs/adapt_$task.py")"  # by itself, so that a failure ends the script
  adaptations "$task" "${seeds[0]}" $names
  run_queue
  table "$task" $names
  chosen="$(best "$task")"
  for seed in "${seeds[@]:1}"; do adaptations "$task" "$seed" $chosen; done
  run_queue
  table "$task" $names
done
