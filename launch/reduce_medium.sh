#!/usr/bin/env bash
# Trains configs/medium_qwen3_moe.py on one GPU, then runs all reductions of configs/reduce_medium.py at the same time
# -> docs/results/reduce_medium. Resumable. SEED=0: seed of the calibration text and of recovery.
# Downloads its text once (50 MB). Offline: TEXT='my/*.txt' ./launch/reduce_medium.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh
export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the GPU
WORKDIR="runs/reduce_medium/seed${SEED:=0}"
mkdir -p "$WORKDIR"

OVERRIDES=(--config.mesh.data=1 "${TEXT_OVERRIDE[@]}" "$@")
"$PYTHON" -m moe_reduce train --config=configs/medium_qwen3_moe.py --workdir=runs/medium_qwen3_moe "${OVERRIDES[@]}"
names="$(variants configs/reduce_medium.py)"
jobs=()
trap 'kill "${jobs[@]%%:*}" 2>/dev/null; exit 130' INT TERM
for variant in $names; do
  "$PYTHON" -m moe_reduce reduce --config=configs/reduce_medium.py --workdir="$WORKDIR" --variant="$variant" \
    --config.train.seed="$SEED" "${OVERRIDES[@]}" >"$WORKDIR/$variant.log" 2>&1 </dev/null &
  jobs+=("$!:$variant")
done
failed=()
for job in "${jobs[@]}"; do wait "${job%%:*}" || failed+=("${job#*:}"); done
if ((${#failed[@]})); then
  echo "these variants failed (see $WORKDIR/VARIANT.log): ${failed[*]}" >&2
  exit 1
fi
"$PYTHON" -m moe_reduce report --runs runs/reduce_medium/seed* --out=docs/results/reduce_medium --overwrite \
  --title="A medium Qwen3-MoE, reduced, on one GPU: validation loss (accuracy kept)" \
  --made-by="${TEXT:+TEXT='$TEXT' }./launch/reduce_medium.sh"
