#!/usr/bin/env bash
# Trains the shared mixture of experiment 1 with all of its parts, beside dense models, at two sizes on a CPU
# (configs/experiment1.py) -> docs/results. A day on two cores; resumable.
# SEEDS="0 1 2" LARGE_SEEDS="0": seeds of the small and of the large models.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/experiment1.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

OVERRIDES=(--config.mesh.data=1 "${TEXT_OVERRIDE[@]}" "$@")
# sized SIZE SEED: queues the models of a size
sized() {
  local variant
  for variant in $(variants configs/experiment1.py); do
    [[ "$variant" == "$1"_* ]] || continue
    queue "experiment1-$2-$variant" train --config=configs/experiment1.py --workdir="runs/experiment1/seed$2" \
      --variant="$variant" --config.train.seed="$2" "${OVERRIDES[@]}"
  done
}
for seed in ${SEEDS:-0 1 2}; do sized small "$seed"; done
for seed in ${LARGE_SEEDS:-0}; do sized large "$seed"; done
run_queue
for size in small large; do
  "$PYTHON" -m moe_reduce report --runs runs/experiment1/seed*/"$size"_* --out="docs/results/experiment1_$size" \
    --overwrite --title="Experiment 1 with all of its parts: the $size models" \
    --made-by="${TEXT:+TEXT='$TEXT' }./launch/experiment1.sh"
done
