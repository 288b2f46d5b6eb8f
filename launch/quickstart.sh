#!/usr/bin/env bash
# The main job in miniature, offline: installs, trains a small mixture of experts beside a dense model, then reduces the
# mixture: one pool of all experts, REAP scores, half of the experts, a short recovery.
# Ends with a table, a picture of quality against bytes, and one prompt continued before and after.
# The same command again resumes where it was stopped, or shows the finished result.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
EXTRAS="" source launch/install.sh
source launch/env.sh
moe_reduce() { .venv/bin/python -m moe_reduce "$@"; }

moe_reduce train --config=configs/quickstart_models.py --workdir=runs/quickstart/models
moe_reduce reduce --config=configs/quickstart_reduce.py --workdir=runs/quickstart/reduced
moe_reduce compare --runs runs/quickstart/models runs/quickstart/reduced --out=runs/quickstart/comparison \
  --prompt=$'class Parser:\n    def __init__(self' --max-tokens=96 --temperature=0.7 --top-p=0.9 \
  --title="A small mixture of experts, reduced" --made-by="./launch/quickstart.sh" "$@"
echo "Picture: runs/quickstart/comparison/quality.png. For the command moe-reduce: source .venv/bin/activate" >&2
