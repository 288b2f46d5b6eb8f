#!/usr/bin/env bash
# Decoding speed beside transformers on torch -> docs/results/generate. Needs the .venv of ./launch/test.sh.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/env.sh"
exec "${PYTHON:-$ROOT/.venv/bin/python}" "$ROOT/launch/bench_generate.py" "$@"
