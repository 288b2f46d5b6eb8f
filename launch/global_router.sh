#!/usr/bin/env bash
# Reduces a small Qwen3-MoE to one pool with one router, as published and with one part of the design changed at a time
# (configs/reduce_global_router.py) -> docs/results. Ten hours on two cores; resumable.
# SEEDS="0 1 2": seeds of the calibration text, of training and of new routers.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/global_router.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

OVERRIDES=(--config.mesh.data=1 "${TEXT_OVERRIDE[@]}" "$@")
queue small_qwen3_moe train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe "${OVERRIDES[@]}"
run_queue
for seed in ${SEEDS:-0 1 2}; do
  for variant in $(variants configs/reduce_global_router.py); do
    queue "reduce_global-$seed-$variant" reduce --config=configs/reduce_global_router.py \
      --workdir="runs/reduce_global/seed$seed" --variant="$variant" --config.train.seed="$seed" "${OVERRIDES[@]}"
  done
done
run_queue
"$PYTHON" -m moe_reduce report --runs runs/reduce_global/seed* --out=docs/results/reduce_global_router --overwrite \
  --title="One global router, and each part of its design changed: validation loss (accuracy kept)" \
  --made-by="${TEXT:+TEXT='$TEXT' }./launch/global_router.sh"
