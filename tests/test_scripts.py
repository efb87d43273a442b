"""The launchers: what they would run, what they refuse, and that bash can read them."""
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
LAUNCHERS = ("train_node.sh", "train_nodes.sh", "train_slurm.sh", "train_split_slurm.sh")


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM") and k not in ("GPUS", "NODES", "HEAD", "NODE_RANK")}
    return subprocess.run(["bash", str(ROOT / "scripts" / name), *arguments], cwd=ROOT, capture_output=True, text=True, env=kept | environment)


def commands(name: str, *arguments: str, **environment: str) -> list[list[str]]:
    """What a dry run shows, as the words that would be run."""
    done = script(name, "--dry-run", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_bash_can_read_it(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0


def test_one_node():
    [command] = commands("train_node.sh", "configs/demo.yaml", "parallel.tensor=2", "run.dir=with a space", GPUS="2", PYTHON="py")
    assert command == ["py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sophiavl_fast", "train", "configs/demo.yaml",
                       "parallel.tensor=2", "run.dir=with a space"]


def test_several_nodes():
    [command] = commands("train_nodes.sh", "configs/demo.yaml", NODES="3", NODE_RANK="1", HEAD="first", GPUS="8")
    assert " --nnodes 3 --node-rank 1 --nproc-per-node 8 --master-addr first --master-port 29500 " in " ".join(command)
    done = script("train_nodes.sh", "--dry-run", "configs/demo.yaml", NODES="3", NODE_RANK="3", HEAD="first", GPUS="8")
    assert done.returncode == 2 and "NODE_RANK = 3: must be below NODES = 3" in done.stderr


def test_slurm():
    [command] = commands("train_slurm.sh", "configs/demo.yaml", SLURM_JOB_NODELIST="a,b", GPUS="4")
    assert command[:2] == ["srun", "--kill-on-bad-exit=1"] and " --nnodes 2 --nproc-per-node 4 " in " ".join(command) and "a:29500" in command


def test_trainer_and_engines_on_different_nodes():
    *engines, trainer = commands("train_split_slurm.sh", "configs/demo.yaml", "run.steps=5", SLURM_JOB_NODELIST="a,b,c,d", GPUS="8", ENGINE_GPUS="4",
                                   ROLLOUT_NODES="2")
    placed = [(words[words.index("--nodelist") + 1], next(w for w in words if w.startswith("CUDA_VISIBLE")), words[-3]) for words in engines]
    assert placed == [("c", "CUDA_VISIBLE_DEVICES=0,1,2,3", "rollout.port=29501"), ("c", "CUDA_VISIBLE_DEVICES=4,5,6,7", "rollout.port=29502"),
                      ("d", "CUDA_VISIBLE_DEVICES=0,1,2,3", "rollout.port=29503"), ("d", "CUDA_VISIBLE_DEVICES=4,5,6,7", "rollout.port=29504")]
    assert trainer[trainer.index("--nodelist") + 1] == "a,b"
    assert f"rollout.urls=[{','.join(f'http://127.0.0.1:{29500 + i}' for i in range(1, 5))}]" in trainer and "run.steps=5" in trainer
    step = trainer[trainer.index("-c") + 1]
    assert "29503:127.0.0.1:29503@d" in step and subprocess.run(["bash", "-n"], input=step, text=True).returncode == 0
    assert not [w for words in (*engines, trainer) for w in words if "TOKEN" in w], "a command line is for everybody to read"
    done = script("train_split_slurm.sh", "--dry-run", "configs/demo.yaml", SLURM_JOB_NODELIST="a", GPUS="8")
    assert done.returncode == 2 and "none is left for the trainer" in done.stderr


@pytest.mark.parametrize("name", [*LAUNCHERS, "verify_node.sh"])
def test_usage_and_bad_input(name):
    assert script(name, "--help").stdout.startswith("usage: ")
    assert script(name).returncode == 2
    done = script(name, "nowhere.yaml")
    assert done.returncode == 2 and "nowhere.yaml" in done.stderr and "Traceback" not in done.stderr
