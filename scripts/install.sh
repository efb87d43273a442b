#!/usr/bin/env bash
# Build a locked environment: install.sh [FOLDER] [cpu|cuda], by default .venv for CPUs. Safe to run again.
set -euo pipefail
venv=${1:-.venv}
device=${2:-cpu}
here=$(cd "$(dirname "$0")/.." && pwd)
torch_cpu=2.13.0+cpu
torch_index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

if [ "$device" != cpu ] && [ "$device" != cuda ]; then
    echo "install: DEVICE is cpu or cuda, not '$device'" >&2
    exit 2
fi

usable() { "$1" -c 'import sys, venv; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12)))' >/dev/null 2>&1; }
python=""
for candidate in "${PYTHON:-python3.11}" python3.11 python3 python3.12 python; do
    if usable "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "install: no Python 3.11 or 3.12 found; set PYTHON=/path/to/python3.11" >&2
    exit 2
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
quietly() {  # pip's warnings are only worth reading when something failed
    if ! "$@" >"$log" 2>&1; then tail -n 25 "$log" >&2; echo "install: failed: $*" >&2; exit 1; fi
}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-deps -q)
if [ "$device" = cuda ]; then
    echo "install: $("$venv/bin/python" -V) in $venv; about 9 GB, four to ten minutes"
    quietly "${pip[@]}" -r "$here/requirements/gpu.txt"
else
    echo "install: $("$venv/bin/python" -V) in $venv; about 3.4 GB, one to five minutes"
    # CPU torch first, from wherever pip is set up to find it, else from PyTorch's own CPU index; the lock then finds it satisfied
    if ! "${pip[@]}" "torch==$torch_cpu" >"$log" 2>&1; then
        quietly "${pip[@]}" --index-url "$torch_index" "torch==$torch_cpu"
    fi
    quietly "${pip[@]}" -r "$here/requirements/cpu.txt"
fi
quietly "${pip[@]}" --no-build-isolation -e "$here"
"$venv/bin/python" - "$device" <<'END'
import sys

import sophiavl_fast, torch
from sophiavl_fast.kernels import cpu_logprob

why = cpu_logprob.load_library()
print("install: C++ CPU kernels", f"absent, PyTorch runs in their place: {why}" if why else "built")
print("install: ready, torch", torch.__version__)
if sys.argv[1] == "cuda" and torch.version.cuda is None:
    sys.exit("install: pip found a CPU build of torch first: look for find-links or an index of CPU wheels in `pip config list`, then remove the folder and install again")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    print("install: no GPU is visible here: what this environment is for will not run")
END
