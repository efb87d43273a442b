"""Check a node of GPUs in ten minutes: the trainer against Hugging Face, weights into engines by each way, greedy answers, rates. One JSON.

    scripts/verify_node.sh MODEL_FOLDER [--out FILE]        eight GPUs: half for a tensor-parallel trainer, half for its engines (nccl), then ipc
    scripts/verify_node.sh --dry-run                        two processes over gloo on the demo's tiny model, no GPU

Three real runs of the recipe on the demo's pictures, each a few steps: trainer and engines on different GPUs (nccl), an engine on each trainer's own
GPU (ipc; one a replica), both compared with plain transformers at every step; then greedy answers of vLLM and of transformers from the exported folder. With
--dry-run the two runs go over gloo: two tensor-parallel ranks with two engines, two replicas with an engine each.
"""
from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import checkout, common

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("gather", "convert", "send", "load", "reset")
# limits of a pass: fp32 on a CPU, bf16 on GPUs (trainer and engine round differently; greedy ties break either way)
LIMITS = {"float32": {"hf": 1e-4, "engine": 1e-4, "greedy": 1.0}, "bfloat16": {"hf": 0.2, "engine": 0.3, "greedy": 0.5}}


@dataclass
class Plan:
    """What runs: name of the run -> processes and settings; dtype, steps."""

    runs: dict[str, tuple[int, list[str]]]
    dtype: str
    steps: int
    shared: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(prog="verify_node", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="", help="Hugging Face folder of the model, such as Qwen2.5-VL-7B-Instruct; needed without --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="two processes over gloo, the demo's tiny model")
    parser.add_argument("--gpus", type=int, help="GPUs of the node (default 8); not with --dry-run")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run, at least 2: the first is left out of the rates")
    parser.add_argument("--work", default="", help="folder for data, runs and exports; a temporary one by default")
    parser.add_argument("--out", default="verify_node.json")
    a = parser.parse_args()
    keys = usable(a, parser)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(a.work or temporary).resolve()             # the runs start in the checkout's folder, not here
        plan = dry_plan(a.steps) if a.dry_run else gpu_plan(a.gpus, a.steps, keys)
        model = prepare(work, a.model)
        runs = {name: run(work, model, name, processes, [*plan.shared, *settings], plan) for name, (processes, settings) in plan.runs.items()}
        found = {"dry_run": a.dry_run, "model": str(a.model or "the demo's tiny model"), "dtype": plan.dtype, "runs": runs,
                 "greedy_match": greedy(work, next(iter(plan.runs)), plan.dtype), "limits": LIMITS[plan.dtype]}
    found["failures"] = failures(found)
    found["seconds"] = time.perf_counter() - began
    checkout.use()
    common.write(Path(a.out), found)
    print(table(found))
    return int(bool(found["failures"]))


def usable(a: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The model's key heads, 0 in a dry run. Ends here (exit code 2) where the arguments could only fail minutes later."""
    if a.steps < 2:
        parser.error(f"--steps {a.steps}: at least 2, since the first is left out of the rates")
    if (a.model or not a.dry_run) and not (Path(a.model) / "config.json").is_file():
        parser.error(f"'{a.model}' is no Hugging Face folder; name one, or " + ("leave it out for the demo's tiny model" if a.dry_run else "use --dry-run"))
    if a.dry_run:
        if a.gpus is not None:
            parser.error(f"--gpus {a.gpus}: a dry run has two processes and no GPU; leave it out")
        return 0
    a.gpus = 8 if a.gpus is None else a.gpus
    if a.gpus < 2 or a.gpus % 2:
        parser.error(f"--gpus {a.gpus}: an even number of at least 2")
    import torch

    from sophiavl_fast.errors import UserError

    if (there := torch.cuda.device_count()) < a.gpus:
        parser.error(f"--gpus {a.gpus}: this machine shows {there} CUDA devices; name an even number of them, or use --dry-run")
    try:
        return key_heads(a.model)
    except UserError as error:
        parser.error(str(error))


def dry_plan(steps: int) -> Plan:
    common_settings = ["rollout.transfer=gloo", "rollout.engine=server", "rollout.start_timeout_s=1200", "rollout.transfer_timeout_s=300"]
    return Plan({"gloo": (2, ["parallel.tensor=2", "rollout.engines=2"]), "gloo_replicas": (2, ["parallel.data=2"])}, "float32", steps,
                ["rollout.prompts_per_step=4", "rollout.n=4", "rollout.max_new_tokens=32", *common_settings])


def gpu_plan(gpus: int, steps: int, keys: int = 4) -> Plan:
    """keys: the model's key heads, which bound how many ranks share its weights: a rank that holds 7B alone has no room for an engine on 80 GB."""
    half = gpus // 2
    split = {count: next(t for t in (4, 2, 1) if count % t == 0 and keys % t == 0) for count in (half, gpus)}
    replicas = math.lcm(*(count // tensor for count, tensor in split.items()))
    prompts = -(-32 // replicas) * replicas                   # every replica of either run gets as many
    shared = ["device=cuda", "rollout.engine=server", f"rollout.prompts_per_step={prompts}", "rollout.n=8", "rollout.max_new_tokens=256",
              "policy.recompute=true"]
    apart = [f"parallel.tensor={split[half]}", f"rollout.engines={split[half]}", f"rollout.gpus={list(range(half, gpus))}", "rollout.transfer=nccl",
             "rollout.gpu_memory_utilization=0.8"]
    beside = [f"parallel.tensor={split[gpus]}", "rollout.transfer=ipc", "rollout.gpu_memory_utilization=0.3"]
    return Plan({"nccl": (half, apart), "ipc": (gpus, beside)}, "bfloat16", steps, shared)


def key_heads(model: str) -> int:
    """Raises UserError for a folder whose config.json does not tell."""
    from sophiavl_fast.monitor import shapes

    return shapes.read(model).language.key_heads


def prepare(work: Path, model: str) -> Path:
    """The demo's data, a twentieth of it; and its tiny model where no other is named."""
    from sophiavl_fast.data.demo import generate, tiny_model

    generate.write(work / "data", 0, lambda rows, label, total: rows, scale=0.05)
    if not model:
        tiny_model.build(work / "model", 0)
    return Path(model).resolve() if model else work / "model"


def run(work: Path, model: Path, name: str, processes: int, settings: list[str], plan: Plan) -> dict[str, Any]:
    """One run of the recipe under torchrun; its figures from metrics.jsonl."""
    out = work / name
    print(f"{name}: {processes} processes, {plan.steps} steps ...", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "sophiavl_fast", "train",
               "configs/demo.yaml", f"data.registry={work}/data/dataset_info.json", f"model.path={model}", f"model.dtype={plan.dtype}", f"run.dir={out}",
               f"run.steps={plan.steps}", "run.resume=never", "eval.every=0", "checkpoint.every=0", "thinking.backend=off", "optim.lr=1e-6",
               "debug.compare_hf=true", "rollout.max_logprob_diff=null", "monitor.tensorboard=false", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: the run failed with exit code {done.returncode}\n{culprit(done.stderr)}")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    later = steps[1:]
    middle, worst = lambda key: median(m[key] for m in later), lambda key: max(m[key] for m in steps)
    return {"processes": processes, "settings": settings, "steps": len(steps),
            "parity": {"policy_hf_max": worst("debug/hf_logprob_diff_max"), "policy_engine_max": worst("rollout/logprob_diff_max")},
            "transfer": {"seconds": middle("time/transfer_s"), "bytes": steps[0]["transfer/bytes"],
                         "phases": {p: middle(f"time/transfer_{p}_s") for p in PHASES}},
            "rollout_tokens_per_s": middle("rollout/tokens_per_s"), "train_tokens_per_s": middle("train/tokens_per_s"),
            "engines": steps[-1]["rollout/engines"], "restarts": sum(m["rollout/restarts"] for m in steps)}


def culprit(stderr: str) -> str:
    """The program's own lines, then the last of the others, most of which are torchrun's."""
    lines = stderr.splitlines()
    own = [line for line in lines if line.startswith("sophiavl-fast: ")]
    return "\n".join([*own, *[line for line in lines if line not in own][-30:]])


def greedy(work: Path, name: str, dtype: str) -> float:
    """Share of held-out prompts that vLLM and transformers answer alike, greedily, from the folder that the run exported."""
    answers = []
    for engine in ("vllm", "transformers"):
        out = work / f"{engine}.json"
        subprocess.run([sys.executable, "-m", "sophiavl_fast", "evaluate", "--model", str(work / name / "hf"), "--data", "demo_eval", "--registry",
                        str(work / "data" / "dataset_info.json"), "--engine", engine, "--templates", "plain", "--max-new-tokens", "32", "--dtype", dtype,
                        "--limit", "32", "--out", str(out)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        answers.append([a["response"] for a in json.loads(out.read_text())["answers"]])
    return sum(a == b for a, b in zip(*answers, strict=True)) / len(answers[0])


def failures(found: dict[str, Any]) -> list[str]:
    """What lies beyond the limits, in words."""
    limits, bad = found["limits"], []
    for name, r in found["runs"].items():
        for key, limit in (("policy_hf_max", limits["hf"]), ("policy_engine_max", limits["engine"])):
            if not r["parity"][key] <= limit:
                bad.append(f"{name}: {key} = {r['parity'][key]:.3g}, limit {limit:g}")
        if r["restarts"]:
            bad.append(f"{name}: engines were restarted {r['restarts']:.0f} times")
        if not r["transfer"]["bytes"] > 0:
            bad.append(f"{name}: no bytes were transferred")
    if not found["greedy_match"] >= limits["greedy"]:
        bad.append(f"greedy answers agree on {found['greedy_match']:.0%} of the prompts, limit {limits['greedy']:.0%}")
    return bad


def table(found: dict[str, Any]) -> str:
    lines = []
    for name, r in found["runs"].items():
        t, p = r["transfer"], r["parity"]
        lines.append(f"{name:14} policy-HF {p['policy_hf_max']:.1e}  policy-engine {p['policy_engine_max']:.1e}  transfer {t['bytes'] / 1e6:,.0f} MB in "
                     f"{t['seconds']:.2f} s  rollout {r['rollout_tokens_per_s']:,.0f} tokens/s  train {r['train_tokens_per_s']:,.0f} tokens/s")
    lines.append(f"greedy answers agree on {found['greedy_match']:.0%}; {found['seconds'] / 60:.1f} minutes; {'; '.join(found['failures']) or 'passed'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
