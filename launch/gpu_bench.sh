#!/usr/bin/env bash
# Benchmarks one accelerator -> docs/results/gpu/summary.json. Needs jax for that accelerator and the package's
# requirements, no extras.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x "$ROOT/.venv/bin/python" ]] && PYTHON="$ROOT/.venv/bin/python"
fi
exec "$PYTHON" "$ROOT/launch/gpu_bench.py" "$@"
