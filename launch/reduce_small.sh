#!/usr/bin/env bash
# Trains a small Qwen3-MoE on a CPU and reduces it with every variant of configs/reduce_small.py -> docs/results.
# Hours; resumable. SEEDS="0 1 2": seeds of the calibration text and of recovery.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/reduce_small.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

OVERRIDES=(--config.mesh.data=1 "${TEXT_OVERRIDE[@]}" "$@")
queue small_qwen3_moe train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe "${OVERRIDES[@]}"
run_queue
for seed in ${SEEDS:-0 1 2}; do
  for variant in $(variants configs/reduce_small.py); do
    queue "reduce_small-$seed-$variant" reduce --config=configs/reduce_small.py --workdir="runs/reduce_small/seed$seed" \
      --variant="$variant" --config.train.seed="$seed" "${OVERRIDES[@]}"
  done
done
run_queue
"$PYTHON" -m moe_reduce report --runs runs/reduce_small/seed* --out=docs/results/reduce_small --overwrite \
  --title="A small Qwen3-MoE, reduced: validation loss (accuracy kept)" \
  --made-by="${TEXT:+TEXT='$TEXT' }./launch/reduce_small.sh"
