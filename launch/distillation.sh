#!/usr/bin/env bash
# A small Qwen3-MoE at a fifth of its experts and in int4, recovered by distillation or by fine-tuning at equal tokens:
# quality and bytes after every step -> docs/results/distillation.
# Half an hour on two cores for each seed; resumable. SEEDS="0 1 2": seeds of the calibration text and of recovery.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/distillation.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

run_small_mixture distillation distillation "$@"
"$PYTHON" launch/distillation.py --runs=runs/distillation --made-by="${TEXT:+TEXT='$TEXT' }./launch/distillation.sh"
