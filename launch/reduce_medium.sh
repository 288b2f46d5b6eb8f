#!/usr/bin/env bash
# configs/medium_qwen3_moe.py trained on one GPU, then reduced in every way of configs/reduce_medium.py, all at the same
# time -> docs/results/reduce_medium. Resumable. SEED=0 ./launch/reduce_medium.sh: of calibration and training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh # for `variants`
export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the card
WORKDIR="runs/reduce_medium/seed${SEED:=0}"
mkdir -p "$WORKDIR"

"$PYTHON" -m moe_reduce train --config=configs/medium_qwen3_moe.py --workdir=runs/medium_qwen3_moe \
  --config.mesh.data=1 "$@"
names="$(variants configs/reduce_medium.py)"
jobs=()
trap 'kill "${jobs[@]%%:*}" 2>/dev/null; exit 130' INT TERM
for variant in $names; do
  "$PYTHON" -m moe_reduce reduce --config=configs/reduce_medium.py --workdir="$WORKDIR" --variant="$variant" \
    --config.train.seed="$SEED" --config.mesh.data=1 "$@" >"$WORKDIR/$variant.log" 2>&1 </dev/null &
  jobs+=("$!:$variant")
done
failed=()
for job in "${jobs[@]}"; do wait "${job%%:*}" || failed+=("${job#*:}"); done
if ((${#failed[@]})); then
  echo "these failed (see $WORKDIR): ${failed[*]}" >&2
  exit 1
fi
"$PYTHON" -m moe_reduce report --runs runs/reduce_medium/seed* --out=docs/results/reduce_medium --overwrite \
  --title="A medium Qwen3-MoE, smaller, on one GPU: validation loss (accuracy kept)" --made-by="./launch/reduce_medium.sh"
