#!/usr/bin/env bash
# Several nodes under Slurm: sbatch --nodes 2 --gpus-per-node 8 scripts/train_slurm.sh CONFIG [a.b=value ...]
# One launcher a node; run.dir must lie on a filesystem that all nodes share.
#SBATCH --job-name=sophiavl-fast
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head:${PORT:-29500}" -m sophiavl_fast train "$@"
