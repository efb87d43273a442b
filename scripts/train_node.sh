#!/usr/bin/env bash
# One node by torchrun: trainer ranks on its GPUs, engines beside them or on `rollout.gpus`.
set -euo pipefail
usage="usage: scripts/train_node.sh [--dry-run] CONFIG [a.b=value ...]
  GPUS    trainer processes (default: all GPUs of the node)
  PYTHON  interpreter (default: the active environment's, else of .venv-cuda (beside a GPU) or .venv of this checkout)
Half the node for the trainer, half for engines:  GPUS=4 scripts/train_node.sh CONFIG rollout.engines=4 'rollout.gpus=[4,5,6,7]' \\
  rollout.gpu_memory_utilization=0.9"
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/common.sh
source "$here/scripts/common.sh"
options "$usage" "$@" && set -- "${rest[@]}"
whole 1 GPUS
gpus=${GPUS:-$(count_gpus)}
[ "$gpus" -gt 0 ] || fail "no GPU found; set GPUS to the number of processes"
read_config "$gpus" "$@" >/dev/null
launch "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m sophiavl_fast train "$@"
