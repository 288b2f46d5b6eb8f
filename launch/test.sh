#!/usr/bin/env bash
# Installs into .venv, then format, lint, types and tests. --slow: also the tests that take minutes. WORKERS=1: one process.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
EXTRAS="[test]" source launch/install.sh
source launch/env.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/basedpyright --pythonpath .venv/bin/python
# a process for each core; files stay whole, for what their tests share, in the order of tests/conftest.py
WORKERS="${WORKERS:-$(nproc)}"
exec .venv/bin/python -m pytest -q --numprocesses="$((WORKERS < 8 ? WORKERS : 8))" --dist=loadfile \
  --no-loadscope-reorder "$@"
