#!/usr/bin/env bash
# Several nodes by torchrun, without a scheduler: run the same line on each, NODE_RANK aside.
set -euo pipefail
usage="usage: NODES=2 NODE_RANK=0 HEAD=host scripts/train_nodes.sh [--dry-run] CONFIG [a.b=value ...]
  NODES      number of nodes            NODE_RANK  this one's number, from 0
  HEAD       address of node 0          PORT       free there (default 29500)
  GPUS       processes a node (default: all its GPUs)   PYTHON  interpreter
run.dir must lie on a filesystem that all nodes share."
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/common.sh
source "$here/scripts/common.sh"
options "$usage" "$@" && set -- "${rest[@]}"
need NODES NODE_RANK HEAD
whole 1 NODES GPUS
port PORT
whole 0 NODE_RANK
[ "$NODE_RANK" -lt "$NODES" ] || fail "NODE_RANK = $NODE_RANK: must be below NODES = $NODES"
gpus=${GPUS:-$(count_gpus)}
[ "$gpus" -gt 0 ] || fail "no GPU found; set GPUS to the number of processes a node"
read_config $((NODES * gpus)) "$@" >/dev/null
launch "$python" -m torch.distributed.run --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$gpus" \
    --master-addr "$HEAD" --master-port "${PORT:-29500}" -m sophiavl_fast train "$@"
