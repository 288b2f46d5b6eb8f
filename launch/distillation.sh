#!/usr/bin/env bash
# Compares distillation with fine-tuning at equal tokens on a pruned small Qwen3-MoE -> docs/results/distillation.
# Hours; resumable. SEEDS="0 1 2": seeds of the calibration text and of recovery.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/distillation.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

OVERRIDES=(--config.mesh.data=1 "${TEXT_OVERRIDE[@]}" "$@")
queue small_qwen3_moe train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe "${OVERRIDES[@]}"
run_queue
for seed in ${SEEDS:-0 1 2}; do
  for variant in $(variants configs/distillation.py); do
    queue "distillation-$seed-$variant" reduce --config=configs/distillation.py \
      --workdir="runs/distillation/seed$seed" --variant="$variant" --config.train.seed="$seed" "${OVERRIDES[@]}"
  done
done
run_queue
"$PYTHON" -m moe_reduce report --runs runs/distillation/seed* --out=docs/results/distillation --overwrite \
  --title="A fifth of a small Qwen3-MoE's experts: fine-tuning and distillation at equal tokens (accuracy kept)" \
  --made-by="${TEXT:+TEXT='$TEXT' }./launch/distillation.sh"
