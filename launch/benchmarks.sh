#!/usr/bin/env bash
# Scores a model on eight benchmarks of lm-eval, by domain, with 95 % intervals:
# ./launch/benchmarks.sh MODEL [--data=DIR] [--baseline=RESULT_OR_MODEL] [--adapter=DIR] [--limit=N] [--allow-code]
# Questions come from the hub, or from the copies in DIR (launch/benchmarks/documents.py names the files). HumanEval and
# MBPP execute what the model writes, and run with --allow-code only. The same command again continues after the last
# finished task. Needs the extra `evaluate`. See docs/guides/evaluate.md, and --help for all options.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/env.sh"
source "$ROOT/launch/python.sh"
exec "$PYTHON" "$ROOT/launch/benchmarks.py" "$@"
