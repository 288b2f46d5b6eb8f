#!/usr/bin/env bash
# The experiments that wait for one GPU, most valuable first, within ten minutes. Resumable; each result is written as it
# comes, and a step that runs out of time leaves the earlier ones.
# 1. The dense model of 137,841,408 parameters beside the shared mixture of 49,642,240, for PAIR_STEPS steps of 32,768
#    tokens (default 1,000) -> docs/results/gpu_pair, with how often the text was read.
# 2. ./launch/reduce_medium.sh with SEED=0, then 1 and 2 -> docs/results/reduce_medium.
# MINUTES=10 ./launch/gpu_evidence.sh. Downloads its text once; offline: TEXT='my/*.txt'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh
source launch/jobs.sh
end=$((SECONDS + 60 * ${MINUTES:-10}))
steps="${PAIR_STEPS:-1000}"

# within WORDS...: runs a command in the time that is left; ends the script when there is none
within() {
  local left=$((end - SECONDS)) status=0
  if ((left < 20)); then
    echo "no time left for: $*" >&2
    exit 3
  fi
  timeout --signal=INT "$left" "$@" || status=$?
  if ((status == 124)); then
    echo "out of time in: $* (the same command goes on)" >&2
    exit 3
  fi
  return "$status"
}

pair=(
  --config.mesh.data=1 --config.execution.platform=gpu --config.execution.compute_dtype=bfloat16
  --config.data.sequence_length=512 --config.train.batch_size=64 --config.train.steps="$steps"
  --config.train.warmup_steps=$((steps / 10)) --config.train.evaluate_every=$((steps / 2))
  --config.train.checkpoint_every=$((steps / 2)) "${TEXT_OVERRIDE[@]}"
)
for config in dense_llama_125m shared_moe_50m; do
  within "$PYTHON" -m moe_reduce train --config="configs/$config.py" --workdir="runs/gpu_pair/$config" "${pair[@]}"
done
"$PYTHON" -m moe_reduce report --runs runs/gpu_pair/dense_llama_125m runs/gpu_pair/shared_moe_50m --out=docs/results/gpu_pair \
  --overwrite --title="The published pair on one GPU, equal tokens" --made-by="${TEXT:+TEXT='$TEXT' }./launch/gpu_evidence.sh"
for SEED in 0 1 2; do
  export SEED
  within ./launch/reduce_medium.sh
done
