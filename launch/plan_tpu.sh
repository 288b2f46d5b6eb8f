#!/usr/bin/env bash
# Compiles the TPU configurations for a v4-32 without having one -> docs/results/tpu_memory. Minutes each; resumable as
# long as the commit is the same.
# Needs libtpu in an environment of its own: python3 -m venv .venv-tpu && .venv-tpu/bin/pip install -e '.[tpu]'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="${PYTHON:-.venv-tpu/bin/python}"
TOPOLOGY="${TOPOLOGY:-v4:2x2x4}"
COMMIT="$(git describe --always --dirty --exclude='*')"
PLANS="${PLANS:-runs/plans}/$COMMIT-${TOPOLOGY//:/-}"

plan() {
  local name="$1"; shift
  [[ -s "$PLANS/$name.json" && "$COMMIT" != *-dirty ]] && return
  "$PYTHON" -m moe_reduce plan --topology="$TOPOLOGY" --json "$@" >"$PLANS/$name.tmp"
  mv "$PLANS/$name.tmp" "$PLANS/$name.json"
}

mkdir -p "$PLANS"
plan dense_llama_125m --config=configs/dense_llama_125m.py
plan shared_moe_50m --config=configs/shared_moe_50m.py
for stage in anneal recover_600; do
  plan "qwen3_30b_a3b_global-$stage" --config=configs/qwen3_30b_a3b_global.py --variant=lossless_start --stage="$stage"
done
"$PYTHON" launch/plan_tpu.py "$PLANS"/*.json "$@"
