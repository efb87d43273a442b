"""What sampling one step ahead saves: the demo's step with `rollout.staleness` 0 and 1, trainer and engine pinned to cores of their own.

    python benchmarks/staleness.py --data data/demo --model models/demo --judge models/demo-judge --out benchmarks/results/staleness_cpu.json

Pinned apart, the two phases share nothing but memory, as on GPUs of their own. At staleness 0 they wait for each other, and a step's phases
are what each costs alone; at staleness 1 a step should take as long as the longer of the two. Ratios are of means over all steps: which phase
is the longer changes from step to step. The runs are `train configs/demo.yaml` itself, in turns; the first steps of each are left out.
`--judge ""` trains without a thinking reward: a local judge is scored by the trainer's own core.

Two cores share memory and caches, so that phases beside each other are slower than alone, whoever starts them. What the cores allow is what `--apart` measures:
one run that only samples (`debug.rollout_only`), another that only trains, on what a third sampled (`debug.replay`), first alone and then both at once.

    python benchmarks/staleness.py --compare runs/s0-1 runs/s1-1 --compare runs/s0-2 runs/s1-2 ... --out benchmarks/results/staleness_accuracy.json

compares finished runs instead, pairs of one seed: held-out accuracy and sound reasoning at their end, the mean difference and its 95 % interval
(Student's t).
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import psutil
import yaml
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import common  # noqa: E402

PHASES = ("rollout_s", "reward_s", "update_s", "transfer_s", "step_s")
WARM = 4   # steps left out
LOOK_S = 0.2


def main() -> None:
    a = arguments()
    if a.compare:
        compare(a)
        return
    if a.apart:
        common.write(a.out, {"steps": a.steps, "cores": [a.cores[0], a.cores[1:]], **apart(a)})
        print(a.out.read_text())
        return
    found: dict[int, list[dict[str, Any]]] = {k: [] for k in a.staleness}
    for turn in range(a.turns):
        for k in a.staleness:
            found[k] += steps(a, k, turn)
            print(f"turn {turn + 1}/{a.turns}, staleness {k}: {medians(found[k])}", flush=True)
    rows = {str(k): medians(rows) for k, rows in found.items()}
    alone = longer(found[0])
    steps_s = {k: [row["time/step_s"] for row in rows] for k, rows in found.items()}
    ratios = {str(k): {name: mean(s) / value for name, value in {**alone, "staleness_0": mean(steps_s[0])}.items()} for k, s in steps_s.items()}
    shape = {"steps": a.steps, "turns": a.turns, "left_out": WARM, "judge": "local" if a.judge else "none", "cores": [a.cores[0], a.cores[1:]]}
    common.write(a.out, {"shape": shape, "medians": rows, "step_s": steps_s, "alone": alone, "ratios": ratios})
    for k, row in ratios.items():
        print(f"staleness {k}: a step is {row['longer_phase']:.2f} x max(rollout, update), {row['longer_side']:.2f} x (transfer + max(rollout, reward + "
              f"update)), {row['staleness_0']:.2f} x a step at staleness 0")


def longer(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of the longer phase of each step at staleness 0, and of the longer of what trainer and engine each must do: both wait for a transfer."""
    def spent(row: dict[str, Any], *names: str) -> float:
        return sum(row[f"time/{name}_s"] for name in names)

    return {"longer_phase": mean(max(spent(r, "rollout"), spent(r, "update")) for r in rows),
            "longer_side": mean(max(spent(r, "rollout", "transfer"), spent(r, "reward", "update", "transfer")) for r in rows)}


def steps(a: argparse.Namespace, staleness: int, turn: int) -> list[dict[str, Any]]:
    """Metrics of one run's steps after the first few."""
    out = a.work / f"staleness{staleness}-{turn}"
    with running(a, out, turn, "rollout.engine=server", f"rollout.staleness={staleness}") as run:
        run.wait()
    return records(out)[WARM:]


def apart(a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of sampling and of the update in runs that do nothing else: each alone, and both at the same time."""
    kept = a.work / "responses"
    sampling = ("rollout.engine=server", "debug.rollout_only=true")
    # what was sampled is all of the first weights, which the trainer leaves behind: the same work, no agreement
    training = (f"debug.replay={kept.resolve()}", "rollout.max_logprob_diff=1000")
    with running(a, a.work / "sampling", 0, *sampling, f"debug.record={kept.resolve()}") as run:
        run.wait()
    with running(a, a.work / "training", 0, *training) as run:
        run.wait()
    alone = {"rollout_s": phase(records(a.work / "sampling")[WARM:], "rollout"), "update_s": phase(records(a.work / "training")[WARM:], "update")}
    during: list[dict[str, Any]] = []
    out, beside = a.work / "sampling-beside", a.work / "training-beside"
    with running(a, out, 0, *sampling, "run.steps=100000") as sampler:
        while sampler.poll() is None and len(records(out)) < WARM:
            time.sleep(LOOK_S)
        with running(a, beside, 0, *training) as trainer:
            while trainer.poll() is None and len(records(beside)) < WARM:
                time.sleep(LOOK_S)
            before = len(records(out)) + 1
            while trainer.poll() is None and len(records(beside)) < a.steps:
                time.sleep(LOOK_S)
            during = records(out)[before:]
            trainer.wait()
    return {"alone": alone, "beside": {"rollout_s": phase(during, "rollout"), "update_s": phase(records(beside)[WARM:], "update")}}


def phase(rows: list[dict[str, Any]], name: str) -> float:
    return median(row[f"time/{name}_s"] for row in rows)


@contextmanager
def running(a: argparse.Namespace, out: Path, seed: int, *settings: str) -> Iterator[subprocess.Popen]:
    """A run whose trainer and engine have cores of their own; exits where it fails."""
    judge = [f"thinking.path={a.judge}"] if a.judge else ["thinking.backend=off"]
    command = [sys.executable, "-m", "sophiavl_fast", "train", "configs/demo.yaml", f"run.dir={out.resolve()}", f"run.steps={a.steps}", f"run.seed={seed}",
               f"data.registry={a.data.resolve()}/dataset_info.json", f"model.path={a.model.resolve()}", "run.resume=never", "eval.every=0",
               "checkpoint.every=0", *judge, *settings, *a.settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, a.cores[1:]))}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "train.log").open("w") as log:
        run = subprocess.Popen(["taskset", "-c", str(a.cores[0]), *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    over = threading.Event()
    pins = threading.Thread(target=pin, args=(run.pid, set(a.cores[1:]), over))
    pins.start()
    try:
        yield run
    finally:
        ended = run.poll() is not None
        if not ended:
            run.terminate()
        code = run.wait()
        over.set()
        pins.join()
    if ended and code:
        sys.exit(f"{out}/train.log: exit code {code}\n{(out / 'train.log').read_text()[-1500:]}")


def pin(trainer: int, cores: set[int], over: threading.Event) -> None:
    """Every thread of the engine's processes on its cores, from the moment it is there: children inherit the trainer's."""
    while not over.wait(LOOK_S):
        with suppress(psutil.Error):
            engines = [p for p in psutil.Process(trainer).children(recursive=True) if "sophiavl_fast.rollout.supervisor" in p.cmdline()]
            for process in [p for e in engines for p in (e, *e.children(recursive=True))]:
                for thread in process.threads():
                    with suppress(OSError):
                        if os.sched_getaffinity(thread.id) != cores:
                            os.sched_setaffinity(thread.id, cores)


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase; `busy_s`: how long the engines worked on a step that was sampled ahead."""
    keys = [*(f"time/{p}" for p in PHASES), "rollout/busy_s", "rollout/lag_mean"]
    return {key.rpartition("/")[2]: round(median(row[key] for row in rows), 4) for key in keys if key in rows[0]}


def compare(a: argparse.Namespace) -> None:
    """Second run minus first, pair by pair, as shares of the questions."""
    found = {}
    for key in ("eval/accuracy", "eval/reasoning"):
        ends = [[records(Path(folder))[-1][key] for folder in pair] for pair in a.compare]
        change = [second - first for first, second in ends]
        found[key] = {"ends": ends, "difference": mean(change), "interval": interval(change)}
        print(f"{key}: {ends}; difference {mean(change):+.3f}, 95 % interval {found[key]['interval']}")
    lag = [mean(r["rollout/lag_mean"] for r in records(Path(pair[1]))[1:]) for pair in a.compare]
    common.write(a.out, {"seeds": [yaml.safe_load((Path(pair[0]) / "config.yaml").read_text())["run"]["seed"] for pair in a.compare], "lag_mean": lag, **found})


def interval(values: list[float]) -> list[float]:
    """95 % of the mean, few values from a normal distribution."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return [round(mean(values) - half, 4), round(mean(values) + half, 4)]


def records(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--judge", default="", help="a thinking reward model's folder; none: no thinking reward")
    parser.add_argument("--work", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="the trainer's, then the engine's")
    parser.add_argument("--apart", action="store_true", help="runs that only sample and only train, alone and beside each other")
    parser.add_argument("--compare", type=Path, nargs=2, action="append", metavar=("RUN", "RUN"), help="two finished runs of one seed; at least two pairs")
    parser.add_argument("settings", nargs="*", help="further settings of train, after --")
    a = parser.parse_args()
    a.judge = str(Path(a.judge).resolve()) if a.judge else ""
    if a.compare and len(a.compare) < 2:
        parser.error("--compare: an interval wants at least two pairs")
    if a.apart and a.steps < 3 * WARM:
        parser.error(f"--apart: --steps must be at least {3 * WARM}, for whole samplings to lie within them")
    if 0 not in a.staleness or len(a.cores) < 2 or a.steps <= WARM:
        parser.error(f"--staleness must hold 0, --cores a core for each side, and --steps must be more than {WARM}")
    return a


if __name__ == "__main__":
    main()
