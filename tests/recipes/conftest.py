"""A small demo on disk: data at a fiftieth of its size, and models warmed up just enough to answer in the right format."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str, cwd: Path = ROOT, check: bool = True, timeout: float = 1800, **environment: str) -> subprocess.CompletedProcess:
    """`sophiavl-fast ARGUMENTS` as its own process, as a user starts it."""
    done = subprocess.run([sys.executable, "-m", "sophiavl_fast", *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **environment})
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """Folder with data/ (registry, records, pictures), init/ (random model), warm/ and judge/ (a minute of SFT between them)."""
    from sophiavl_fast.data.demo import generate, tiny_model

    folder = tmp_path_factory.mktemp("demo")
    generate.write(folder / "data", 3, lambda rows, label, total: rows, scale=0.05)
    tiny_model.build(folder / "init", 3)
    registry = f"data.registry={folder}/data/dataset_info.json"
    quick = ["optim.warmup_steps=5", "monitor.tensorboard=false"]
    run("train", "configs/demo_warmup.yaml", registry, f"run.dir={folder}/runs/warm", f"run.export={folder}/warm", f"model.path={folder}/init",
        "run.steps=120", *quick)
    run("train", "configs/demo_judge.yaml", registry, f"run.dir={folder}/runs/judge", f"run.export={folder}/judge", f"model.path={folder}/warm",
        "run.steps=20", *quick)
    return folder


@pytest.fixture
def rl(demo):
    """Arguments of a short RL run in a folder of the caller's choice."""
    def arguments(run_dir: Path, *more: str) -> list[str]:
        return ["train", "configs/demo.yaml", f"data.registry={demo}/data/dataset_info.json", f"run.dir={run_dir}", f"model.path={demo}/warm",
                f"thinking.path={demo}/judge", "run.steps=3", "rollout.prompts_per_step=6", "rollout.n=5", "eval.every=2", "eval.limit=12",
                "checkpoint.every=1", "algorithm.kl_coef=0.04", *more]
    return arguments
