#!/usr/bin/env bash
# Under Slurm, trainer and rollout split by nodes: engines on the last ROLLOUT_NODES nodes, trainer ranks on the others.
# Servers listen on loopback only and want a token: each trainer node reaches them through ssh tunnels. Weights go by nccl directly.
#SBATCH --job-name=sophiavl-fast
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
set -euo pipefail
usage="usage: sbatch --nodes 4 --gpus-per-node 8 scripts/train_split_slurm.sh [--dry-run] CONFIG [a.b=value ...]
  ROLLOUT_NODES  nodes that hold engines (default 1)   ENGINES  engines a rollout node (default: GPUS / ENGINE_GPUS)
  ENGINE_GPUS    GPUs an engine (default: rollout.tensor_parallel)   GPUS     GPUs a node (default 8)
  PORT           first of ENGINES x ROLLOUT_NODES + 1 free ports (default 29500)   PYTHON  interpreter
The nodes must let each other in by ssh without a password and have each other's host keys in known_hosts; run.dir must lie on a
filesystem that all share. The job takes whole nodes with all their memory (--exclusive, --mem=0), and each srun as many cores of a
node as the smallest has. --dry-run outside a job needs SLURM_JOB_NODELIST."
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
# shellcheck source=scripts/common.sh
source "$here/scripts/common.sh"
options "$usage" "$@" && set -- "${rest[@]}"
need SLURM_JOB_NODELIST
whole 1 GPUS ENGINE_GPUS ROLLOUT_NODES ENGINES
port PORT
gpus=${GPUS:-8} apart=${ROLLOUT_NODES:-1} port=${PORT:-29500}
read_nodes
count=${#nodes[@]}
[ "$apart" -lt "$count" ] || fail "ROLLOUT_NODES = $apart of $count nodes: none is left for the trainer"
ranks=$(((count - apart) * gpus))
parallel=$(read_config "$ranks" "$@" rollout.transfer=nccl)
size=${ENGINE_GPUS:-$parallel}
[ "$parallel" -eq 1 ] || [ "$parallel" -eq "$size" ] || fail "ENGINE_GPUS = $size, but rollout.tensor_parallel = $parallel: leave one of them out"
[ "$size" -le "$gpus" ] || fail "ENGINE_GPUS = $size (rollout.tensor_parallel): more than GPUS = $gpus of a node"
engines=${ENGINES:-$((gpus / size))}
[ $((engines * size)) -le "$gpus" ] || fail "ENGINES = $engines x ENGINE_GPUS = $size: more than GPUS = $gpus"
last=$((port + engines * apart))
[ "$last" -le 65535 ] || fail "PORT = $port: the first of $((last - port + 1)) ports, which end at 65535; choose at most $((65535 - last + port))"
trainers=("${nodes[@]:0:count-apart}") rollouts=("${nodes[@]:count-apart}")
list() { local IFS=,; echo "$*"; }
mapfile -t urls < <(printf 'http://127.0.0.1:%s\n' $(seq $((port + 1)) $((port + engines * apart))))
# what the trainer would refuse is refused before an engine starts
read_config "$ranks" "$@" "rollout.urls=[$(list "${urls[@]}")]" rollout.transfer=nccl >/dev/null

SOPHIAVL_ROLLOUT_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export SOPHIAVL_ROLLOUT_TOKEN          # by environment, never on a command line
started=()
finish() { for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done; }
trap finish EXIT

tunnels=() next=$((port + 1))
for node in "${rollouts[@]}"; do
    for ((i = 0; i < engines; i++)); do
        devices=$(list $(seq $((i * size)) $((i * size + size - 1))))
        background srun --overlap --nodes 1 --ntasks 1 "${cores[@]}" --nodelist "$node" env CUDA_VISIBLE_DEVICES="$devices" \
            "$python" -m sophiavl_fast.rollout.serve "$@" "rollout.port=$next" "rollout.tensor_parallel=$size" rollout.transfer=nccl
        tunnels+=("$next:127.0.0.1:$next@$node")
        next=$((next + 1))
    done
done
# on each trainer node: a tunnel to every engine (its local port the engine's own) that ends with the launcher, which gets the address that
# engines reach it at; the trainer waits rollout.start_timeout_s for tunnels and engines
step="trap 'kill \$(jobs -p) 2>/dev/null' EXIT; cd '$here'; for t in ${tunnels[*]}; do ssh -o ExitOnForwardFailure=yes -o StrictHostKeyChecking=yes"
step+=" -N -L \"\${t%@*}\" \"\${t#*@}\" & done; \"\$@\" rollout.transfer_host=\"\$(hostname -I | cut -d' ' -f1)\""
launch_step srun --kill-on-bad-exit=1 --overlap --nodes "${#trainers[@]}" --ntasks-per-node 1 "${cores[@]}" --nodelist "$(list "${trainers[@]}")" bash -c "$step" train \
    "$python" -m torch.distributed.run --nnodes "${#trainers[@]}" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-dry}" \
    --rdzv-endpoint "${trainers[0]}:$port" -m sophiavl_fast train "$@" "rollout.urls=[$(list "${urls[@]}")]" rollout.transfer=nccl
