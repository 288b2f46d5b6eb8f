#!/usr/bin/env bash
#SBATCH --job-name=moe_reduce
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Runs a command on GPU hosts under SLURM, one process a host:
#   sbatch --nodes=2 launch/slurm.sh train --config=… --workdir=/shared/…
# JAX finds the hosts through SLURM's variables. A requeued job resumes from its last checkpoint. When a process dies,
# the job ends (--kill-on-bad-exit), so that no process waits for it. DRY_RUN=1 prints the command instead.
set -euo pipefail
[[ $# -ge 1 ]] || { echo "slurm.sh: what shall run? Such as: train --config=configs/dense_llama_125m.py --workdir=/shared/dense" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source launch/env.sh
# otherwise JAX would give the process of a host only its first GPU
if [[ -n "${SLURM_GPUS_ON_NODE:-}" ]]; then
  JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))"
  export JAX_LOCAL_DEVICE_IDS
fi
command=(srun --kill-on-bad-exit=1 --ntasks-per-node=1 "${PYTHON:-.venv/bin/python}" -m moe_reduce "$@")
if [[ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]]; then command+=(--distributed); fi
if [[ -n "${DRY_RUN:-}" ]]; then
  echo "JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-} $(printf '%q ' "${command[@]}")"
else
  exec "${command[@]}"
fi
