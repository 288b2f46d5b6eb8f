#!/usr/bin/env bash
# Compares distillation with fine-tuning at equal tokens on a pruned small Qwen3-MoE -> docs/results/distillation.
# Hours; resumable. SEEDS="0 1 2": seeds of the calibration text and of recovery.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/distillation.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

reduce_small_mixture distillation distillation distillation \
  "A fifth of a small Qwen3-MoE's experts: fine-tuning and distillation at equal tokens (accuracy kept)" "$@"
