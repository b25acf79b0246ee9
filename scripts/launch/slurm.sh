#!/usr/bin/env bash
# A job of Slurm that may take longer than its limit of time: before that training saves, and the job is queued again.
#     sbatch --nodes 4 scripts/launch/slurm.sh image_train --data_dir DATA --log_dir runs/slurm ...
# Submit it from the folder of the checkout, with its environment active. --log_dir must be a folder that all nodes see.
#SBATCH --job-name=guided-diffusion
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}" || exit 2
source scripts/launch/common.sh

srun --kill-on-bad-exit=1 "${PYTHON:-python}" "${words[@]}"
code=$?
if [ "$code" -eq 138 ]; then # 128 + SIGUSR1: saved, not done
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
