#!/usr/bin/env bash
# SkeMA against LoRA and full fine-tuning on a CPU: UUID memorisation and WikiText-2 -> docs/results. Hours; resumable.
# Runs every learning rate with the first seed, then the best one of each method and size with the other seeds.
# SEEDS="0 1 2" TASKS="uuid wikitext2" ./launch/adapters.sh; the base model is the one of ./launch/reduce_small.sh.
# TASKS="smollm2_uuid smollm2_wikitext2" does the same with SmolLM2-135M-Instruct as the base: hours a variant on a CPU.
# Downloads its texts once. Offline: TEXT='my/*.txt' for the base model, and for the task wikitext2
# WIKITEXT2=DIR, a directory with train.txt.gz, valid.txt.gz and test.txt.gz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh

declare -A TITLES=(
  [uuid]="UUID memorisation: correct characters on learned pairs (and on others), best of the learning rates"
  [wikitext2]="WikiText-2: perplexity, best learning rate by validation"
  [smollm2_uuid]="UUID memorisation on SmolLM2-135M-Instruct: 1,000 pairs, best of the learning rates"
  [smollm2_wikitext2]="WikiText-2 on SmolLM2-135M-Instruct: three epochs, best learning rate by validation"
)
MADE_BY="${TEXT:+TEXT='$TEXT' }${WIKITEXT2:+WIKITEXT2='$WIKITEXT2' }./launch/adapters.sh"
read -ra seeds <<<"${SEEDS:-0 1 2}"
uuid_text=()
smollm2_uuid_text=()
wikitext2_text=()
if [[ -n "${WIKITEXT2:-}" ]]; then
  wikitext2_text=(
    "--config.data.source=$WIKITEXT2/train.txt.gz" "--config.data.validation_source=$WIKITEXT2/valid.txt.gz"
    "--config.test_source=$WIKITEXT2/test.txt.gz"
  )
fi
smollm2_wikitext2_text=("${wikitext2_text[@]}")

# adaptations TASK SEED VARIANT...: queues them
adaptations() {
  local task="$1" seed="$2" variant
  local -n text="${1}_text"
  for variant in "${@:3}"; do
    queue "adapt_$task-$seed-$variant" adapt --config="configs/adapt_$task.py" --workdir="runs/adapt_$task/seed$seed" \
      --variant="$variant" --config.train.seed="$seed" --config.mesh.data=1 "${text[@]}"
  done
}

# table TASK VARIANT...: collects the finished runs
table() {
  local task="$1" runs=() variant workdir
  for variant in "${@:2}"; do
    for workdir in "runs/adapt_$task"/seed*/"$variant"; do
      if [[ -f "$workdir/summary.json" ]]; then runs+=("$workdir"); fi
    done
  done
  "$PYTHON" -m moe_reduce report --runs "${runs[@]}" --out="docs/results/adapt_$task" --overwrite \
    --title="${TITLES[$task]}" --made-by="$MADE_BY"
}

best() { "$PYTHON" -c "import json, sys; print(*json.load(open(sys.argv[1]))['best'])" "docs/results/adapt_$1/summary.json"; }

TASKS="${TASKS:-uuid wikitext2}"
if [[ " $TASKS" == *" smollm2"* && ! -d runs/smollm2 ]]; then ./launch/smollm2.sh; fi
if [[ " $TASKS " == *" uuid "* || " $TASKS " == *" wikitext2 "* ]]; then
  queue small_qwen3_moe train --config=configs/small_qwen3_moe.py --workdir=runs/small_qwen3_moe \
    --config.mesh.data=1 "${TEXT_OVERRIDE[@]}"
fi
run_queue
for task in $TASKS; do
  names="$(variants "configs/adapt_$task.py")" # not inline, so that a failure ends the script
  adaptations "$task" "${seeds[0]}" $names
  run_queue
  table "$task" $names
  chosen="$(best "$task")"
  for seed in "${seeds[@]:1}"; do adaptations "$task" "$seed" $chosen; done
  run_queue
  table "$task" $names
done
