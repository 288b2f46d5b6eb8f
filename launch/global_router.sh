#!/usr/bin/env bash
# Reduces a small Qwen3-MoE to one pool with one router, as published and with one part of the design changed at a time
# (configs/reduce_global_router.py) -> docs/results. Ten hours on two cores; resumable.
# SEEDS="0 1 2": seeds of the calibration text, of training and of new routers.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/global_router.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

reduce_small_mixture reduce_global reduce_global_router reduce_global_router \
  "One global router, and each part of its design changed: validation loss (accuracy kept)" "$@"
