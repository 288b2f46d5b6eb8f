#!/usr/bin/env bash
# LoRA over SmolLM2-135M in fp32, beside LoRA over quantised bases (QLoRA) on as many tokens -> docs/results/qlora_smollm2.
# A quarter of an hour on two cores; resumable. ./launch/smollm2.sh makes the model first.
# Downloads WikiText-2. Offline: TEXT=train.txt VALIDATION=valid.txt MODEL=DIR ./launch/qlora.sh
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/env.sh"
source "$ROOT/launch/python.sh"
MODEL="${MODEL:-runs/smollm2}"
TEXTS=(${TEXT:+"--config.data.source=$TEXT"} ${VALIDATION:+"--config.data.validation_source=$VALIDATION"})
for base in fp32 ${SCHEMES:-nf4 int4}; do
  directory="$MODEL"
  if [[ "$base" != fp32 ]]; then
    directory="runs/qlora/$base"
    [[ -d "$directory" ]] || "$PYTHON" -m moe_reduce quantize --model="$MODEL" --scheme="$base" --clip=mse --out="$directory"
  fi
  "$PYTHON" -m moe_reduce adapt --config=qlora_smollm2 "--config.model=$directory" --workdir="runs/qlora/runs/$base" \
    "${TEXTS[@]}" "$@"
done
"$PYTHON" "$ROOT/launch/qlora.py" --runs=runs/qlora/runs
