#!/usr/bin/env bash
# One node: scripts/train_node.sh CONFIG [a.b=value ...]   (GPUS: how many processes, all of the node's by default)
set -euo pipefail
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
exec torchrun --standalone --nproc-per-node "$gpus" -m sophiavl_fast train "$@"
