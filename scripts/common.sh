# What the launchers share; sourced, with `here` set to the checkout's folder.
# shellcheck shell=bash disable=SC2034
dry=""
rest=()

fail() { echo "$(basename "$0"): $*" >&2; exit 2; }

count_gpus() { { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true; }

# PYTHON, or that of the environment that is active where it holds the package, else of the checkout's: .venv-cuda beside a GPU, .venv
choose_python() {
    [ -z "${PYTHON:-}" ] || { echo "$PYTHON"; return; }
    local tried=("$here/.venv/bin/python")
    [ "$(count_gpus)" -eq 0 ] || tried=("$here/.venv-cuda/bin/python" "${tried[@]}")
    for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} "${tried[@]}"; do
        if [ -x "$python" ] && "$python" -P -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("sophiavl_fast"))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo python
}
python=$(choose_python)

# options USAGE ARGUMENTS...: takes --dry-run and --help out; what is left is in `rest`
options() {
    local usage=$1 argument
    shift
    for argument in "$@"; do
        case "$argument" in
            -h | --help) echo "$usage"; exit 0 ;;
            --dry-run) dry=yes ;;
            -*) echo "$usage" >&2; fail "unknown option $argument" ;;
            *) rest+=("$argument") ;;
        esac
    done
    if [ ${#rest[@]} -eq 0 ]; then echo "$usage" >&2; exit 2; fi
    [ -f "${rest[0]}" ] || fail "config file '${rest[0]}' does not exist"
    command -v "$python" >/dev/null || fail "PYTHON = '$python' cannot be run; name an interpreter, or run \`make install\`"
}

need() { local name; for name in "$@"; do [ -n "${!name:-}" ] || fail "$name is not set; see --help"; done; }

# whole LEAST NAME...: each names a variable that holds a number, unless it is unset or empty
whole() {
    local least=$1 name
    shift
    for name in "$@"; do
        [ -z "${!name:-}" ] || [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ && ${!name} -ge $least ]] ||
            fail "$name = '${!name}': expected a whole number of at least $least"
    done
}

# port NAME: a variable that holds a port, unless it is unset or empty
port() {
    [ -z "${!1:-}" ] || [[ ${!1} =~ ^[1-9][0-9]{0,4}$ && ${!1} -le 65535 ]] || fail "$1 = '${!1}': expected a port from 1 to 65535"
}

# read_config PROCESSES CONFIG [a.b=value ...]: refuses what so many processes of the trainer would refuse; prints rollout.tensor_parallel
read_config() {
    "$python" - "$(basename "$0")" "$@" <<'END'
import sys

from sophiavl_fast import config, errors

name, processes, path, *overrides = sys.argv[1:]
try:
    print(config.load(path, overrides, world_size=int(processes)).rollout.tensor_parallel)
except errors.UserError as error:
    print(f"{name}: {error}", file=sys.stderr)
    sys.exit(2)
END
}

# host names of a Slurm list; without Slurm (a dry run) a plain comma-separated one
node_names() { if command -v scontrol >/dev/null; then scontrol show hostnames "$1"; else tr , '\n' <<<"$1"; fi; }

# read_nodes: the job's host names into `nodes`; the cores that each of them has into `cores`, since srun (Slurm 22.05 on) inherits no --cpus-per-task
read_nodes() {
    local list=$SLURM_JOB_NODELIST names said
    if ! names=$(node_names "$list" 2>/dev/null) || [ -z "$names" ]; then
        said=$(node_names "$list" 2>&1 | head -n 1 || true)
        fail "scontrol does not tell the nodes of SLURM_JOB_NODELIST = '$list'; it said: ${said:-nothing}"
    fi
    mapfile -t nodes <<<"$names"
    local told=${SLURM_JOB_CPUS_PER_NODE:-} least="" part     # as in 96(x2),64
    for part in ${told//,/ }; do
        part=${part%%(*}
        if [ -z "$least" ] || [ "$part" -lt "$least" ]; then least=$part; fi
    done
    cores=(${least:+--cpus-per-task "$least"})
}

say() { printf '%q ' "$@"; echo; }
# the last command of a launcher: in its place, or only shown
launch() { if [ -n "$dry" ]; then say "$@"; else exec "$@"; fi; }
# the same, but traps of the launcher still run
launch_step() { if [ -n "$dry" ]; then say "$@"; else "$@"; fi; }
background() { if [ -n "$dry" ]; then say "$@"; else "$@" & started+=($!); fi; }
