#!/usr/bin/env bash
# Installs into .venv, then format, lint, types and tests. --slow: also the tests that take minutes.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
EXTRAS="[test]" source launch/install.sh
source launch/env.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/basedpyright --pythonpath .venv/bin/python
exec .venv/bin/python -m pytest -q "$@"
