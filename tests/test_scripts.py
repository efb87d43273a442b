"""The launchers: what they would run, what they refuse, and that bash can read them."""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
SPLIT = ("configs/demo.yaml", "device=cuda", "rollout.engine=server")     # what trainer and engines on different nodes need
LAUNCHERS = ("train_node.sh", "train_nodes.sh", "train_slurm.sh", "train_split_slurm.sh")
NODES = {"NODES": "2", "NODE_RANK": "0", "HEAD": "first", "GPUS": "8"}
JOB = {"SLURM_JOB_NODELIST": "a,b", "GPUS": "8"}


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in ("GPUS", "NODES", "HEAD", "NODE_RANK")}
    return subprocess.run(["bash", str(ROOT / "scripts" / name), *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=kept | {"PYTHON": sys.executable} | environment)


def commands(name: str, *arguments: str, **environment: str) -> list[list[str]]:
    """What a dry run shows, as the words that would be run."""
    done = script(name, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_bash_can_read_it(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


def test_one_node():
    [command] = commands("train_node.sh", *SPLIT, "parallel.tensor=2", "run.dir=with a space", GPUS="2")
    assert command == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sophiavl_fast", "train", *SPLIT,
                       "parallel.tensor=2", "run.dir=with a space"]


def test_whose_python(tmp_path):
    """PYTHON, the active environment's where it holds the package, the checkout's for a GPU where there is one, the checkout's, any."""
    def environment(name: str, holds: bool) -> Path:
        (bin_ := tmp_path / name / "bin").mkdir(parents=True)
        (bin_ / "python").write_text(f"#!/bin/sh\nexit {int(not holds)}\n")
        (bin_ / "python").chmod(0o755)
        return tmp_path / name

    def chosen(**extra: str) -> str:
        command = f"here={tmp_path}; source {ROOT}/scripts/common.sh; echo $python"
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VIRTUAL_ENV")}
        return subprocess.run(["bash", "-euc", command], capture_output=True, text=True, check=True, env=kept | extra).stdout.strip()

    gpu = environment("gpu", True)
    (gpu / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: one'\n")
    (gpu / "bin" / "nvidia-smi").chmod(0o755)
    path = {"PATH": f"{gpu}/bin:{os.environ['PATH']}"}
    mine, others = environment("mine", True), environment("others", False)
    assert chosen() == "python"
    environment(".venv", True), environment(".venv-cuda", True)
    assert chosen() == f"{tmp_path}/.venv/bin/python"
    assert chosen(**path) == f"{tmp_path}/.venv-cuda/bin/python"
    assert chosen(**path, VIRTUAL_ENV=str(mine)) == f"{mine}/bin/python"
    assert chosen(VIRTUAL_ENV=str(others)) == f"{tmp_path}/.venv/bin/python"
    assert chosen(**path, VIRTUAL_ENV=str(mine), PYTHON="/usr/bin/python3") == "/usr/bin/python3"


def test_several_nodes():
    [command] = commands("train_nodes.sh", *SPLIT, "rollout.prompts_per_step=24", NODES="3", NODE_RANK="1", HEAD="first", GPUS="8")
    assert " --nnodes 3 --node-rank 1 --nproc-per-node 8 --master-addr first --master-port 29500 " in " ".join(command)
    done = script("train_nodes.sh", "--dry-run", "configs/demo.yaml", NODES="3", NODE_RANK="3", HEAD="first", GPUS="8")
    assert done.returncode == 2 and "NODE_RANK = 3: must be below NODES = 3" in done.stderr


def test_slurm():
    [command] = commands("train_slurm.sh", *SPLIT, SLURM_JOB_NODELIST="a,b", GPUS="4")
    assert command[:2] == ["srun", "--kill-on-bad-exit=1"] and " --nnodes 2 --nproc-per-node 4 " in " ".join(command) and "a:29500" in command


@pytest.mark.parametrize("name", ["train_slurm.sh", "train_split_slurm.sh"])
def test_ranks_get_all_cores_of_their_nodes(name):
    """One task a node has one core by default, and srun takes none of what sbatch was asked for."""
    assert "\n#SBATCH --exclusive\n#SBATCH --mem=0\n" in (ROOT / "scripts" / name).read_text()
    for told, least in (("96(x2)", "96"), ("128(x2),96", "96"), ("64,128(x3)", "64")):
        for command in commands(name, *SPLIT, **JOB, SLURM_JOB_CPUS_PER_NODE=told):
            assert command[0] == "srun" and command[command.index("--cpus-per-task") + 1] == least
    assert not any("--cpus-per-task" in command for command in commands(name, *SPLIT, **JOB))


@pytest.mark.parametrize("tool,told", [("echo slurm_load: no route >&2; exit 1", "slurm_load: no route"), ("exit 1", "nothing"), ("true", "nothing")])
@pytest.mark.parametrize("name", ["train_slurm.sh", "train_split_slurm.sh"])
def test_a_list_of_nodes_that_slurm_does_not_tell(tmp_path, name, tool, told):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{tool}\n")
    (tmp_path / "scontrol").chmod(0o755)
    done = script(name, "--dry-run", *SPLIT, **JOB, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{name}: scontrol does not tell the nodes of SLURM_JOB_NODELIST = 'a,b'; it said: {told}\n")


def test_trainer_and_engines_on_different_nodes():
    *engines, trainer = commands("train_split_slurm.sh", *SPLIT, "run.steps=5", "parallel.tensor=4", SLURM_JOB_NODELIST="a,b,c,d", GPUS="8",
                                   ENGINE_GPUS="4", ROLLOUT_NODES="2")
    placed = [(words[words.index("--nodelist") + 1], next(w for w in words if w.startswith("CUDA_VISIBLE")), words[-3]) for words in engines]
    assert placed == [("c", "CUDA_VISIBLE_DEVICES=0,1,2,3", "rollout.port=29501"), ("c", "CUDA_VISIBLE_DEVICES=4,5,6,7", "rollout.port=29502"),
                      ("d", "CUDA_VISIBLE_DEVICES=0,1,2,3", "rollout.port=29503"), ("d", "CUDA_VISIBLE_DEVICES=4,5,6,7", "rollout.port=29504")]
    assert trainer[trainer.index("--nodelist") + 1] == "a,b"
    assert f"rollout.urls=[{','.join(f'http://127.0.0.1:{29500 + i}' for i in range(1, 5))}]" in trainer and "run.steps=5" in trainer
    step = trainer[trainer.index("-c") + 1]
    assert "29503:127.0.0.1:29503@d" in step and subprocess.run(["bash", "-n"], input=step, text=True).returncode == 0
    assert not [w for words in (*engines, trainer) for w in words if "TOKEN" in w], "a command line is for everybody to read"
    done = script("train_split_slurm.sh", "--dry-run", *SPLIT, SLURM_JOB_NODELIST="a", GPUS="8")
    assert done.returncode == 2 and "none is left for the trainer" in done.stderr


def test_an_engines_gpus_are_its_tensor_parallel_size():
    """Said by the configuration or by ENGINE_GPUS; a trainer of several ranks a replica leaves the server's own process alone."""
    engine, *_ = commands("train_split_slurm.sh", *SPLIT, "rollout.tensor_parallel=4", "parallel.tensor=4", SLURM_JOB_NODELIST="a,b", GPUS="4")
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3" in engine and "rollout.tensor_parallel=4" in engine[-3:]
    done = script("train_split_slurm.sh", "--dry-run", *SPLIT, "rollout.tensor_parallel=4", SLURM_JOB_NODELIST="a,b", ENGINE_GPUS="2")
    assert (done.returncode, done.stdout) == (2, "") and "ENGINE_GPUS = 2, but rollout.tensor_parallel = 4: leave one of them out" in done.stderr


@pytest.mark.parametrize("override,said", [("rollout.sleep=true", "rollout.sleep: true needs engines on the trainer's own GPUs"),
                                           ("rollout.engines=2", "rollout.urls names servers that run already"),
                                           ("parallel.tensor=1", "rollout.urls names 1 servers for 2 data-parallel replicas")])
def test_what_the_trainer_would_refuse_starts_no_engine(override, said):
    done = script("train_split_slurm.sh", "--dry-run", *SPLIT, "parallel.tensor=2", override, SLURM_JOB_NODELIST="a,b", GPUS="2", ENGINES="1")
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr, done.stderr


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_configuration_that_the_trainer_would_refuse_is_refused_before_anything_starts(name, dry):
    """As its processes will read it, with their number, which the launcher knows."""
    for override, said in (("rollot.n=2", "configs/demo.yaml: unknown key 'rollot'; did you mean 'rollout'?"),
                           ("parallel.tensor=3", "parallel.tensor x pipeline x context = 3 does not divide the ")):
        done = script(name, *["--dry-run"] * dry, *SPLIT, override, **NODES | JOB)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"{name}: {said}") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_an_interpreter_that_is_not_there(name):
    done = script(name, "--dry-run", *SPLIT, **NODES | JOB, PYTHON="pithon")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{name}: PYTHON = 'pithon' cannot be run; name an interpreter, or run `make install`\n")


def test_a_server_by_hand_takes_a_configuration_of_many_ranks(monkeypatch, capsys):
    """Its own process is no rank of the trainer: it gets as far as the token, which is not there."""
    from sophiavl_fast.rollout import serve

    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    assert serve.command([str(ROOT / "configs" / "trust_grpo_qwen2_5_vl_7b.yaml"), "rollout.tensor_parallel=4", "rollout.transfer=nccl"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"sophiavl-fast: set the environment variable {serve.TOKEN_VARIABLE}") and line.count("\n") == 1


@pytest.mark.parametrize("name,environment,expected", [
    ("train_node.sh", {}, "no GPU found; set GPUS to the number of processes"),
    ("train_nodes.sh", NODES | {"GPUS": ""}, "no GPU found; set GPUS to the number of processes a node"),
    ("train_node.sh", {"GPUS": "abc"}, "GPUS = 'abc': expected a whole number of at least 1"),
    ("train_nodes.sh", NODES | {"NODE_RANK": "-1"}, "NODE_RANK = '-1': expected a whole number of at least 0"),
    ("train_nodes.sh", NODES | {"NODE_RANK": "y"}, "NODE_RANK = 'y': expected a whole number"),
    ("train_nodes.sh", NODES | {"NODES": "08"}, "NODES = '08': expected a whole number"),
    ("train_slurm.sh", JOB | {"GPUS": "0"}, "GPUS = '0': expected a whole number of at least 1"),
    ("train_split_slurm.sh", JOB | {"ROLLOUT_NODES": "0"}, "ROLLOUT_NODES = '0': expected a whole number of at least 1"),
    ("train_split_slurm.sh", JOB | {"ENGINE_GPUS": "16"}, "ENGINE_GPUS = 16 (rollout.tensor_parallel): more than GPUS = 8 of a node"),
    ("train_split_slurm.sh", JOB | {"ENGINES": "0"}, "ENGINES = '0': expected a whole number of at least 1"),
    ("train_nodes.sh", NODES | {"PORT": "65536"}, "PORT = '65536': expected a port from 1 to 65535"),
    ("train_nodes.sh", NODES | {"PORT": "0"}, "PORT = '0': expected a port"), ("train_slurm.sh", JOB | {"PORT": "99999"}, "PORT = '99999': expected a port"),
    ("train_slurm.sh", JOB | {"PORT": "08000"}, "PORT = '08000': expected a port"),
    ("train_split_slurm.sh", JOB | {"PORT": "70000"}, "PORT = '70000': expected a port from 1 to 65535"),
    ("train_split_slurm.sh", JOB | {"PORT": "65528"}, "PORT = 65528: the first of 9 ports, which end at 65535; choose at most 65527"),
    ("train_split_slurm.sh", JOB | {"GPUS": "6"}, "rollout.prompts_per_step = 32 does not divide over 6 data-parallel replicas"),
], ids=str)
def test_counts_that_start_nothing_are_one_line(tmp_path, name, environment, expected):
    """On a machine without nvidia-smi; nothing is shown that would be run."""
    for tool in ("bash", "dirname", "basename", "grep", "tr"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = script(name, "--dry-run", *SPLIT, **environment, PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"{name}: {expected}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [*LAUNCHERS, "verify_node.sh"])
def test_usage_and_bad_input(name):
    assert script(name, "--help").stdout.startswith("usage: ")
    assert script(name).returncode == 2
    done = script(name, "nowhere.yaml")
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr and "Traceback" not in done.stderr


def make(target: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}      # these tests may run under `make test`
    return subprocess.run(["make", "-o", ".venv/.installed", target, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("parallel,processes", [("tensor=2", 2), ("tensor=2 sequence=true", 2), ("tensor=2 data=3 context=2 sequence=true", 12),
                                                ("pipeline=2 stages=[3,1]", 2), ("sequence=false", 1)])
def test_the_demo_has_as_many_processes_as_its_layout(parallel, processes):
    done = make("demo", "-n", f"PARALLEL={parallel}")
    assert done.returncode == 0 and f" --nproc-per-node {processes} -m sophiavl_fast train configs/demo.yaml " in done.stdout, done.stderr
    assert all(f"parallel.{setting}" in done.stdout.splitlines()[-1] for setting in parallel.split())
    assert "torch.distributed" not in make("demo", "-n").stdout


@pytest.mark.parametrize("parallel,said", [("tensr=2", "configs/demo.yaml: unknown key 'parallel.tensr'; did you mean"), ("tensor=two", "parallel.tensor"),
                                           ("tensor=0", "parallel.tensor"), ("tensor=08", "parallel.tensor"), ("tensor=2 data", "override 'parallel.data'"),
                                           ("data=5", "5 data-parallel replicas")])
def test_a_layout_that_cannot_be_ends_the_demo_before_its_long_stages(tmp_path, parallel, said):
    """The warm start and the judge take minutes; the layout is the last stage's."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\ncase "$1" in -m) echo "a stage began" >&2; exit 9;; esac\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    done = make("demo", f"VENV={tmp_path}", f"PARALLEL={parallel}")
    line, *rest = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("PARALLEL: ") and said in line and len(rest) == 1 and "a stage began" not in done.stderr, done.stderr
