#!/usr/bin/env bash
# Benchmarks one accelerator -> docs/results/gpu/summary.json. Needs jax for that accelerator and the package's
# requirements, no extras.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
source "$ROOT/launch/python.sh"
exec "$PYTHON" "$ROOT/launch/gpu_bench.py" "$@"
