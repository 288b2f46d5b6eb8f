#!/usr/bin/env bash
# Runs every speed benchmark beside its peer, one after the other, then updates the tables of the documents. An hour on two
# cores. Needs the .venv of ./launch/test.sh, an idle machine and 10 GB of disk. ONLY="peers scale" runs some of them.
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
