#!/usr/bin/env bash
# One accelerator's figures -> docs/results/gpu/summary.json. Needs jax for it, and the package's plain requirements.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x "$ROOT/.venv/bin/python" ]] && PYTHON="$ROOT/.venv/bin/python"
fi
exec "$PYTHON" "$ROOT/launch/gpu_bench.py" "$@"
