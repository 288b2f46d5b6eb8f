#!/usr/bin/env bash
# Every benchmark beside its peer, one after the other, and the tables of docs/results from them. An hour on two cores.
# Needs ./launch/test.sh's .venv, a quiet machine, and 10 GB of disk. ONLY="peers scale": some of them.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
source launch/env.sh
PYTHON="${PYTHON:-.venv/bin/python}"
for name in ${ONLY:-train generate peers adapters scale files}; do
  echo "== $name"
  "$PYTHON" "launch/bench_$name.py"
done
"$PYTHON" -m moe_reduce report --document docs/results/{shared_moe,reduction,adapters,speed,scale}.md
