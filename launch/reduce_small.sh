#!/usr/bin/env bash
# Trains a small Qwen3-MoE on a CPU and reduces it with every variant of configs/reduce_small.py -> docs/results.
# Hours; resumable. SEEDS="0 1 2": seeds of the calibration text and of recovery.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/reduce_small.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

reduce_small_mixture reduce_small reduce_small reduce_small \
  "A small Qwen3-MoE, reduced: validation loss (accuracy kept)" "$@"
