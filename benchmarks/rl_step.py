"""One GRPO step, this trainer against TRL's GRPOTrainer: same model, prompts, group size, token counts and KL term.

    python benchmarks/rl_step.py --trl build/trl --out benchmarks/results/rl_step_cpu.json

Every response has exactly --tokens tokens (end-of-text does not end one), rewards are free, both use --threads threads.
The floors are taken in the same run: the engine alone for the same tokens (through this project's own client), one bare forward
and backward of the policy and one forward of the reference, one copy of the transferred bytes. Contestants run one after the other,
in turns, as processes of their own.
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from sophiavl_fast.compat import heap

PHASES = ("time/rollout_s", "time/reward_s", "time/update_s", "time/transfer_s", "time/step_s")


def main() -> None:
    a = _arguments()
    model = Path(a.work) / "model"
    banned = _build_model(model)
    if a.child:
        print(json.dumps({"ours": ours, "floors": floors}[a.child](a, model, banned)))
        return
    turns: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": [], "floors": []}
    for turn in range(a.turns):
        for name in ("ours", "floors", *(["trl"] if a.trl else [])):
            print(f"turn {turn + 1}/{a.turns}: {name}", flush=True)
            turns[name].append(_child(a, name, model, banned))
    common.write(Path(a.out), {"shape": {k: getattr(a, k) for k in ("prompts", "n", "tokens", "threads", "steps", "engine")}, **_summary(a, turns)})


def ours(a: argparse.Namespace, model: Path, banned: list[int]) -> dict[str, Any]:
    """Steps of recipes/rl.py itself; the first two are left out."""
    import torch

    from sophiavl_fast.policy.saver import Saver
    from sophiavl_fast.recipes import ranks, rl
    from sophiavl_fast.recipes.rooms import Rooms
    from sophiavl_fast.rewards import Rewards

    torch.set_num_threads(a.threads)
    config, _, prompts, policy, rollout = _open(a, model)
    rollout._stop_ids = []  # end-of-text is an ordinary token here: all responses are equally long
    rollout.send(policy, version=0)
    with Rewards(config, device=policy.device) as rewards, rl.Progress(config, "bench", steps=0) as progress:
        saver = Saver(policy, a.work, keep=1, background=False)
        rooms = Rooms(config, _Loader(prompts), policy, ranks.Lead(rollout, policy), rewards, progress, [], saver)
        found = [rl.one_step(rooms, step)[0] for step in range(1, a.steps + 1)][2:]
    rollout.close()
    policy.close()
    assert all(m["response/length_mean"] == a.tokens for m in found)
    return {"seconds": [m["time/step_s"] for m in found], "phases": {p: median(m[p] for m in found) for p in PHASES},
            "logprob_diff_max": max(m["rollout/logprob_diff_max"] for m in found), "peak_gib": _peak()}


def floors(a: argparse.Namespace, model: Path, banned: list[int]) -> dict[str, Any]:
    """What cannot be saved: bare generation, bare forward and backward (+ reference forward), bare copy of the weights."""
    import torch

    torch.set_num_threads(a.threads)
    a.engine = "inline"
    _, _, prompts, policy, rollout = _open(a, model)
    rollout._stop_ids = []
    ask = {"n": a.n, "seed": 0, "temperature": 1.0, "max_new_tokens": a.tokens}
    groups = rollout.generate(prompts, step=0, **ask)
    batches = policy.pack(groups, torch.ones(a.prompts * a.n))
    copies = [t.clone() for _, t in policy.weights()]
    times: dict[str, list[float]] = {"generate": [], "forward_backward": [], "reference": [], "copy": []}
    for step in range(1, a.steps + 1):
        for name, work in (
            ("generate", lambda step=step: rollout.generate(prompts, step=step, **ask)),
            ("forward_backward", lambda: policy.update(batches, lambda batch, lp, entropy: (-lp.sum() / 6144, torch.zeros(19)))),
            ("reference", lambda: policy.logprobs(batches, reference=True)),
            ("copy", lambda: [c.copy_(t) for c, (_, t) in zip(copies, policy.weights(), strict=True)]),
        ):
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    rollout.close()
    policy.close()
    return {name: median(t[2:]) for name, t in times.items()}


class _Loader:
    """The same prompts every step."""

    skipped = 0

    def __init__(self, prompts: list[Any]) -> None:
        self.prompts = prompts

    def next(self, count: int, **_: Any) -> list[Any]:
        return self.prompts


def _open(a: argparse.Namespace, model: Path) -> tuple[Any, ...]:
    import numpy as np
    from PIL import Image

    from sophiavl_fast import config as tree
    from sophiavl_fast.data.processor import Processor
    from sophiavl_fast.policy import Policy
    from sophiavl_fast.rollout import open_rollout
    from sophiavl_fast.types import Prompt

    config = tree.build({
        "device": "cpu", "model": {"path": str(model), "dtype": "float32"}, "thinking": {"backend": "off"}, "optim": {"lr": 1e-5},
        "data": {"max_prompt_tokens": 256}, "algorithm": {"kl_coef": 0.04}, "monitor": {"progress": False},
        "rollout": {"engine": a.engine, "n": a.n, "prompts_per_step": a.prompts, "max_new_tokens": a.tokens},
    }, "benchmark")
    processor, random, prompts = Processor(str(model)), np.random.RandomState(0), []
    for i in range(a.prompts):
        picture = Image.fromarray((random.rand(28, 84, 3) * 255).astype("uint8"))
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "max-min?"}]}]
        text, ids, expanded, images, pixels, grid = processor.prepare(messages, [picture])
        prompts.append(Prompt(id=f"bench:{i}", dataset="bench", problem_type="numerical", question="max-min?", gold="3", text=text, token_ids=ids,
                              expanded_ids=expanded, images=images, image_paths=[""], pixel_values=pixels, image_grid_thw=grid))
    policy = Policy.create(config, banned_ids=processor.banned_ids, reference=True, total_steps=a.steps)
    rollout = open_rollout(config, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids, vocab_size=processor.vocab_size, decode=processor.decode,
                           device=policy.device, run_dir=a.work)
    return config, processor, prompts, policy, rollout


def _build_model(folder: Path) -> list[int]:
    """The demo's tiny model, and the ids that TRL must not sample for equal lengths."""
    from sophiavl_fast.data.demo import tiny_model
    from sophiavl_fast.data.processor import Processor

    if not (folder / "config.json").exists():
        tiny_model.build(folder, 0)
    processor = Processor(str(folder))
    return sorted({*processor.banned_ids, *processor.stop_ids})


def _child(a: argparse.Namespace, name: str, model: Path, banned: list[int]) -> dict[str, Any]:
    shape = [f"--{k}={getattr(a, k)}" for k in ("prompts", "n", "tokens", "steps", "threads")]
    here = Path(__file__).resolve().parent
    if name == "trl":
        command, path = [str(here / "trl_step.py"), str(model), *shape, f"--banned={json.dumps(banned)}", f"--rows={a.trl_rows}"], a.trl
    else:
        command, path = [str(Path(__file__).resolve()), f"--child={name}", f"--work={a.work}", f"--engine={a.engine}", *shape], ""
    environment = {"GLIBC_TUNABLES": heap.TUNABLE, **os.environ, "OMP_NUM_THREADS": str(a.threads),
                   "PYTHONPATH": os.pathsep.join(p for p in (path, os.environ.get("PYTHONPATH", "")) if p)}
    if name != "trl":
        environment |= heap.CACHES  # as the command line sets them
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{name} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _summary(a: argparse.Namespace, turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    samples = a.prompts * a.n
    mine = [s for t in turns["ours"] for s in t["seconds"]]
    base = {k: median(t[k] for t in turns["floors"]) for k in turns["floors"][0]}
    out: dict[str, Any] = {
        "ours": {"step_s": common.spread(mine), "samples_per_s": samples / median(mine), "peak_gib": max(t["peak_gib"] for t in turns["ours"]),
                 "phases_s": {p: median(t["phases"][p] for t in turns["ours"]) for p in PHASES},
                 "logprob_diff_max": max(t["logprob_diff_max"] for t in turns["ours"])},
        "floors_s": base, "step_over_floors": median(mine) / sum(base.values()),
    }
    if a.trl:
        theirs = [s for t in turns["trl"] for s in t["seconds"][2:]]
        out["trl"] = {"step_s": common.spread(theirs), "samples_per_s": samples / median(theirs), "peak_gib": max(t["peak_gib"] for t in turns["trl"])}
        out["speedup_over_trl"] = median(theirs) / median(mine)
    print(json.dumps(out, indent=1))
    return out


def _peak() -> float:
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 2**20


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("prompts", 32), ("n", 8), ("tokens", 24), ("steps", 8), ("threads", 2), ("turns", 3), ("trl-rows", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--engine", choices=("inline", "server"), default="inline")
    parser.add_argument("--trl", default="", help="folder of TRL's packages; empty: leave TRL out")
    parser.add_argument("--work", default="build/bench")
    parser.add_argument("--out", default="benchmarks/results/rl_step_cpu.json")
    parser.add_argument("--child", choices=("ours", "floors"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
