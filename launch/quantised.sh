#!/usr/bin/env bash
# Quality, size and speed of a real model, SmolLM2-135M, in each format of quantised weights and of the KV cache
# -> docs/results/quantised_smollm2. An hour and a half on two cores; the same command again continues.
# ./launch/smollm2.sh makes the model first. Texts and questions come from the hub; offline, give copies of your own:
# ./launch/quantised.sh --text=test.txt --calibration=train.txt --questions=DIR   (see --help for all options)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/env.sh"
source "$ROOT/launch/python.sh"
exec "$PYTHON" "$ROOT/launch/quantised.py" "$@"
