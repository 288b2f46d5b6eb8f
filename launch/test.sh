#!/usr/bin/env bash
# Installs into .venv, then checks format, lint and types and runs the tests.
# --no-peers: without torch, peft and lm-eval; the tests that compare with them are skipped.
# --slow: also the tests that take minutes. WORKERS=1: one process. Anything else goes to pytest.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
EXTRAS="[test]"
[[ " $* " == *" --no-peers "* ]] && EXTRAS="[test-core]"
source launch/install.sh
source launch/env.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
if [[ "$EXTRAS" == "[test]" ]]; then
  .venv/bin/basedpyright --pythonpath .venv/bin/python
else
  echo "types are not checked, because that needs the libraries that --no-peers leaves out"
fi
# one process a core; a file stays in one process, because its tests share fixtures; tests/conftest.py orders them
WORKERS="${WORKERS:-$(nproc)}"
exec .venv/bin/python -m pytest -q --numprocesses="$((WORKERS < 8 ? WORKERS : 8))" --dist=loadfile \
  --no-loadscope-reorder "$@"
