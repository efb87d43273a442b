#!/usr/bin/env bash
# Check a node of GPUs in ten minutes: parity with Hugging Face, weight transfer by nccl and ipc, greedy answers, rates; one JSON.
set -euo pipefail
usage="usage: scripts/verify_node.sh MODEL_FOLDER [--gpus 8] [--steps 4] [--out verify_node.json]
       scripts/verify_node.sh --dry-run [...]      two processes over gloo on a tiny model, no GPU
  PYTHON  interpreter (default: the active environment's, else of .venv-cuda (beside a GPU) or .venv of this checkout)
Exit code 0: every figure is within its limit; 1: the JSON and the last line say which is not; 2: bad arguments."
here=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=scripts/common.sh
source "$here/scripts/common.sh"
case "${1:-}" in "" | -h | --help) echo "$usage"; exit $(($# == 0 ? 2 : 0)) ;; esac
exec "$python" "$here/benchmarks/verify_node.py" "$@"
