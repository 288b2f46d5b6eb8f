#!/usr/bin/env bash
# SkeMA against LoRA and full fine-tuning on a CPU: UUIDs by heart, and WikiText-2 -> docs/results. Hours; resumable.
# SEEDS="0 1 2" TASKS="uuid wikitext2" ./launch/adapters.sh; the base is that of ./launch/reduce_small.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

declare -A TITLES=(
  [uuid]="UUIDs by heart: characters right of learned pairs (and of others), best of three learning rates"
  [wikitext2]="WikiText-2: validation perplexity, best of three learning rates"
)
queue small_qwen3_moe train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe --config.mesh.data=1
run_queue
for task in ${TASKS:-uuid wikitext2}; do
  for seed in ${SEEDS:-0 1 2}; do
    for variant in $(variants "configs/adapt_$task.py"); do
      queue "adapt_$task-$seed-$variant" adapt --config="configs/adapt_$task.py" --workdir="runs/adapt_$task/seed$seed" \
        --variant="$variant" --config.train.seed="$seed" --config.mesh.data=1 "$@"
    done
  done
  run_queue
  "$PYTHON" -m moe_reduce report --runs "runs/adapt_$task"/seed* --out="docs/results/adapt_$task" --overwrite \
    --title="${TITLES[$task]}" --made-by="./launch/adapters.sh"
done
