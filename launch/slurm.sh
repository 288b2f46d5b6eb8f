#!/usr/bin/env bash
#SBATCH --job-name=moe_reduce
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/logs/slurm-%j.log
# GPU hosts under SLURM, one process a host: sbatch --nodes=2 launch/slurm.sh train --config=… --workdir=/shared/…
# JAX finds the hosts through SLURM's own variables. A requeued job goes on from its last checkpoint, and a process that
# dies takes the others with it (--kill-on-bad-exit), so that none waits. DRY_RUN=1 prints the command instead.
set -euo pipefail
[[ $# -ge 1 ]] || { echo "slurm.sh: what shall run? Such as: train --config=configs/dense_llama_125m.py --workdir=/shared/dense" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source launch/env.sh
command=(srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m moe_reduce "$@")
if [[ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]]; then command+=(--distributed); fi
if [[ -n "${DRY_RUN:-}" ]]; then printf '%q ' "${command[@]}"; echo; else exec "${command[@]}"; fi
