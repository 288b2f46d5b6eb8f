#!/usr/bin/env bash
# From a fresh clone to a trained dense and shared-MoE pair, their table and loss.png. Again: resumes, or says it is done.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
EXTRAS="" source launch/install.sh
source launch/env.sh
exec .venv/bin/python -m moe_reduce train --config=configs/quickstart.py --workdir=runs/quickstart "$@"
