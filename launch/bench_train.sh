#!/usr/bin/env bash
# Training speed beside transformers on torch -> docs/results/cpu_speed/summary.json. Needs ./launch/test.sh's .venv.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/env.sh"
exec "${PYTHON:-$ROOT/.venv/bin/python}" "$ROOT/launch/bench_train.py" "$@"
