#!/usr/bin/env bash
# Experiment 1 on a CPU: dense against shared MoE, three seeds, and the ablations -> docs/results. Hours; resumable.
# Each variant trains on a core of its own, as many at once as there are cores.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
source launch/env.sh
PYTHON="${PYTHON:-.venv/bin/python}"
CORES="$(nproc)"
mkdir -p runs/logs

variants() { "$PYTHON" -c "import sys; from moe_reduce.commands.config_file import read; print(*read(sys.argv[1], []))" "$1"; }

jobs_file="$(mktemp)"
failures="$(mktemp)"
for seed in 0 1 2; do
  for variant in $(variants configs/cpu_pair.py); do echo "cpu_pair seed$seed $variant $seed" >>"$jobs_file"; done
done
for variant in $(variants configs/cpu_pair_large.py); do echo "cpu_pair_large seed0 $variant 0" >>"$jobs_file"; done
for variant in $(variants configs/cpu_ablations.py); do echo "cpu_ablations seed0 $variant 0" >>"$jobs_file"; done

# core $1 takes every CORES-th job
work() {
  awk -v core="$1" -v cores="$CORES" 'NR % cores == core' "$jobs_file" | while read -r config directory variant seed; do
    echo "core $1: $config $directory $variant"
    taskset -c "$1" "$PYTHON" -m moe_reduce train --config="configs/$config.py" --workdir="runs/$config/$directory" \
      --variant="$variant" --config.train.seed="$seed" --config.mesh.data=1 "${OVERRIDES[@]}" \
      >"runs/logs/$config-$directory-$variant.log" 2>&1 </dev/null || echo "$config $directory $variant" >>"$failures"
  done
}
OVERRIDES=("$@")
for ((core = 0; core < CORES; core++)); do work "$core" & done
wait
if [[ -s "$failures" ]]; then
  echo "these failed (see runs/logs), so no table is made:" >&2
  cat "$failures" >&2
  exit 1
fi
"$PYTHON" -m moe_reduce report --runs runs/cpu_pair/seed* --out=docs/results/cpu_pair --overwrite \
  --title="Dense against shared MoE, English textbooks, CPU" --made-by="./launch/shared_moe.sh"
"$PYTHON" -m moe_reduce report --runs runs/cpu_pair_large/seed0 --out=docs/results/cpu_pair_large --overwrite \
  --title="The same, four times as large" --made-by="./launch/shared_moe.sh"
"$PYTHON" -m moe_reduce report --runs runs/cpu_ablations/seed0 --out=docs/results/cpu_ablations --overwrite \
  --title="What changes the gap: 4.1M tokens, one seed" --made-by="./launch/shared_moe.sh"
