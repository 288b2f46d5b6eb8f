#!/usr/bin/env bash
# Experiment 2 on a CPU: a small Qwen3-MoE trained, then reduced in every way of configs/reduce_small.py -> docs/results.
# Hours; resumable. SEEDS="0 1 2" ./launch/reduce_small.sh: of the calibration text and of training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

queue small_qwen3_moe train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe --config.mesh.data=1 "$@"
run_queue
for seed in ${SEEDS:-0 1 2}; do
  for variant in $(variants configs/reduce_small.py); do
    queue "reduce_small-$seed-$variant" reduce --config=configs/reduce_small.py --workdir="runs/reduce_small/seed$seed" \
      --variant="$variant" --config.train.seed="$seed" --config.mesh.data=1 "$@"
  done
done
run_queue
"$PYTHON" -m moe_reduce report --runs runs/reduce_small/seed* --out=docs/results/reduce_small --overwrite \
  --title="A small Qwen3-MoE, smaller: validation loss (accuracy kept)" --made-by="./launch/reduce_small.sh"
