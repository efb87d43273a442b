#!/usr/bin/env bash
# Several nodes under Slurm: one launcher a node, trainer ranks on all GPUs of all nodes.
#SBATCH --job-name=sophiavl-fast
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
set -euo pipefail
usage="usage: sbatch --nodes 2 --gpus-per-node 8 scripts/train_slurm.sh [--dry-run] CONFIG [a.b=value ...]
  GPUS  processes a node (default 8)    PORT  free on the first node (default 29500)    PYTHON  interpreter
Submit it from the checkout's folder; run.dir must lie on a filesystem that all nodes share. The job takes whole nodes with all
their memory (--exclusive, --mem=0), and srun as many cores of each as the smallest has. --dry-run outside a job needs SLURM_JOB_NODELIST."
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
# shellcheck source=scripts/common.sh
source "$here/scripts/common.sh"
options "$usage" "$@" && set -- "${rest[@]}"
need SLURM_JOB_NODELIST
whole 1 GPUS
port PORT
read_nodes
gpus=${GPUS:-8}
read_config $((${#nodes[@]} * gpus)) "$@" >/dev/null
launch srun --kill-on-bad-exit=1 "${cores[@]}" "$python" -m torch.distributed.run --nnodes "${#nodes[@]}" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-dry}" --rdzv-endpoint "${nodes[0]}:${PORT:-29500}" -m sophiavl_fast train "$@"
