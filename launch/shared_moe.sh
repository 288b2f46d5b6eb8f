#!/usr/bin/env bash
# A dense model against a shared mixture on a CPU, three seeds, and ablations -> docs/results. Hours; resumable.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/shared_moe.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

OVERRIDES=("${TEXT_OVERRIDE[@]}" "$@")
train() {
  queue "$1-$2-$3" train --config="configs/$1.py" --workdir="runs/$1/$2" --variant="$3" --config.train.seed="${2#seed}" \
    --config.mesh.data=1 "${OVERRIDES[@]}"
}
for seed in 0 1 2; do
  for variant in $(variants configs/cpu_pair.py); do train cpu_pair "seed$seed" "$variant"; done
done
for config in cpu_pair_large cpu_ablations; do
  for variant in $(variants "configs/$config.py"); do train "$config" seed0 "$variant"; done
done
run_queue
report() { "$PYTHON" -m moe_reduce report --overwrite --made-by="${TEXT:+TEXT='$TEXT' }./launch/shared_moe.sh" "$@"; }
report --runs runs/cpu_pair/seed* --out=docs/results/cpu_pair --title="Dense against shared MoE, CPU"
report --runs runs/cpu_pair_large/seed0 --out=docs/results/cpu_pair_large --title="Dense against shared MoE, four times as large"
report --runs runs/cpu_ablations/seed0 --out=docs/results/cpu_ablations --title="Ablations of the shared MoE: 4.1M tokens, one seed"
