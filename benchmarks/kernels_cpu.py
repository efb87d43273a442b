"""linear_logprob on a CPU: the C++ backend and the reference against PyTorch as one would write it, TRL's path and Liger's.

    python benchmarks/kernels_cpu.py [--shapes demo,middle,large] [--dtypes bfloat16,float32] [--out benchmarks/results/kernels_cpu.json]

Each shape and dtype has a process in which the contestants take turns, so that a noisy moment meets all of them (pytest-benchmark runs one after
the other, which a shared machine turns into fiction); ratios are of one round, then their median. Processor seconds stand beside wall seconds; with
`--threads 1` they hardly depend on what else runs. Memory is the rise of the resident high-water mark over what was there before the call, gradients
not counted. The floor is the C++ forward's own tiled products with every result thrown away, `mm` the same by torch.mm, 4,096 columns at a time.
Errors are against float64 on 64 rows. TRL is taken from --trl (`make bench-env`), and left out where it does not import.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common

SHAPES = {"demo": (3000, 192, 100), "middle": (2048, 1024, 32000), "large": (4096, 1024, 152064)}  # tokens, hidden, vocabulary
DTYPES = {"demo": ["float32"], "middle": ["bfloat16", "float32"], "large": ["bfloat16", "float32"]}
ROUNDS = {"demo": 40, "middle": 7, "large": 3}
CHUNK = 512  # tokens a chunk of the checkpointed contestant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="demo,middle,large")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of each shape those that it has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="0: as many as the shape is small")
    parser.add_argument("--only", default="", help="contestants beside C++, comma-separated; all by default")
    parser.add_argument("--trl", default="build/trl", help="folder with TRL's packages")
    parser.add_argument("--note", default="", help="kept with the results: what else the machine was doing")
    parser.add_argument("--out", default="benchmarks/results/kernels_cpu.json")
    parser.add_argument("--child", nargs=2, metavar=("SHAPE", "DTYPE"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    for name, asked, known in (("--shapes", a.shapes, list(SHAPES)), ("--dtypes", a.dtypes, sorted({d for ds in DTYPES.values() for d in ds}))):
        if wrong := [word for word in asked.split(",") if word not in known]:
            parser.error(f"{name}: '{wrong[0]}' is none of {', '.join(known)}")
    if a.child:
        print(json.dumps(_child(a)))
        return
    rows = []
    for shape in a.shapes.split(","):
        for dtype in (d for d in DTYPES[shape] if d in a.dtypes.split(",")):
            rows.append({"shape": dict(zip("THV", SHAPES[shape])), "dtype": dtype, **_ask(a, shape, dtype)})
            print(_table(rows[-1]), flush=True)
            common.write(Path(a.out), {"threads": a.threads, "note": a.note, "rows": rows})


def _ask(a: argparse.Namespace, shape: str, dtype: str) -> Any:
    command = [sys.executable, __file__, "--threads", str(a.threads), "--trl", a.trl, "--rounds", str(a.rounds), "--only", a.only, "--child", shape, dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"kernels_cpu: {shape} {dtype} failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _table(row: dict[str, Any]) -> str:
    seconds = lambda part: f"{part['wall']['median']:8.4f} s (processor {part['cpu_seconds']['median']:8.4f})"
    lines = [f"{row['shape']} {row['dtype']}: floor {seconds(row['floor'])}, mm {seconds(row['mm'])}, C++ forward / floor {row['cpp_over_floor']:.3f}"
             f" (processor {row['cpp_over_floor_cpu_seconds']:.3f})"]
    for name, result in row["contestants"].items():
        parts = [f"{part} {seconds(result[part])} {result[part]['cpp_is_faster']:5.2f}x ({result[part]['cpp_is_faster_cpu_seconds']:5.2f}x) "
                 f"{result[part]['extra_mib']:6.0f} MiB" for part in ("forward", "both")]
        lines.append(f"  {name:10s}{'   '.join(parts)}   error {result['error']:.1e}")
    return "\n".join(lines)


def contestants(trl_folder: str) -> dict[str, Callable[..., Any]]:
    """name -> f(hidden, weight, target) = log-probs, differentiable. The first is the C++ backend."""
    import torch
    from sophiavl_fast.kernels import linear_logprob
    from torch.utils.checkpoint import checkpoint

    def naive(hidden, weight, target):
        return (hidden @ weight.T).float().log_softmax(1).gather(1, target[:, None])[:, 0]

    def chunked(hidden, weight, target):
        pieces = zip(hidden.split(CHUNK), target.split(CHUNK))
        return torch.cat([checkpoint(naive, h, weight, t, use_reentrant=False) for h, t in pieces])

    found = {"cpp": lambda *x: linear_logprob(*x, backend="cpu")[0], "reference": lambda *x: linear_logprob(*x, backend="reference")[0],
             "naive": naive, "chunked": chunked}
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as liger
        found["liger"] = lambda hidden, weight, target: liger.apply(hidden, weight, target, None, 1.0, 4096)
    except ImportError as error:
        print(f"kernels_cpu: no Liger: {error}", file=sys.stderr)
    sys.path.append(trl_folder)
    try:
        from trl.trainer.utils import selective_log_softmax
        found["trl"] = lambda hidden, weight, target: selective_log_softmax(hidden @ weight.T, target)
    except ImportError as error:
        print(f"kernels_cpu: no TRL: {error}", file=sys.stderr)
    return found


def _child(a: argparse.Namespace) -> Any:
    import torch

    shape, dtype = a.child
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    tokens, width, vocab = SHAPES[shape]
    inputs = (torch.randn(tokens, width).to(getattr(torch, dtype)).requires_grad_(),
              torch.randn(vocab, width).mul_(2 / width ** 0.5).to(getattr(torch, dtype)).requires_grad_(), torch.randint(0, vocab, (tokens,)))
    upstream, found = torch.randn(tokens), contestants(a.trl)
    if a.only:
        found = {name: f for name, f in found.items() if name in ("cpp", *a.only.split(","))}
    small = (inputs[0][:CHUNK], inputs[1], inputs[2][:CHUNK])

    def both(f):
        logprob = f(*inputs)
        torch.autograd.grad(logprob, inputs[:2], upstream.to(logprob.dtype))

    def forward(f):
        with torch.no_grad():
            return f(*inputs)

    return _times(found, inputs, small, forward, both, a.rounds or ROUNDS[shape])


def _times(found: dict[str, Any], inputs: tuple, small: tuple, forward: Callable, both: Callable, rounds: int) -> dict[str, Any]:
    import torch

    hidden, weight, target = inputs
    here = torch.ones(len(target), dtype=torch.bool)
    tile = torch.empty(len(target), min(4096, len(weight)), dtype=hidden.dtype)

    def products():
        torch.ops.sophiavl_cpu.statistics(hidden, weight, None, target, here, len(weight), 1.0, False, True, "auto")

    @torch.no_grad()
    def mm():
        for start in range(0, len(weight), tile.shape[1]):
            part = weight[start : start + tile.shape[1]]
            torch.mm(hidden, part.T, out=tile[:, : len(part)])

    exact = hidden.detach()[:64].double() @ weight.detach().double().T
    exact = exact.log_softmax(1).gather(1, target[:64, None])[:, 0]
    errors = {name: (forward(f)[:64].double() - exact).abs().max().item() for name, f in found.items()}
    del exact
    for f in found.values():
        torch.autograd.grad(f(*small).float().sum(), small[:1])  # micro-kernels, allocations
    work = {("floor", ""): products, ("mm", ""): mm}
    for name, f in found.items():
        work[name, "forward"] = lambda f=f: forward(f)
        work[name, "both"] = lambda f=f: both(f)
    wall, cpu, extra = take_turns(work, rounds)
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2]) / 2 ** 20
    ratio = lambda times, top, bottom: median(x / y for x, y in zip(times[top], times[bottom]))
    figures = lambda key: {"wall": common.spread(wall[key]), "cpu_seconds": common.spread(cpu[key]),
                           "extra_mib": extra[key] - (gradients if key[1] == "both" else 0)}
    against = lambda name, part: {**figures((name, part)), "cpp_is_faster": ratio(wall, (name, part), ("cpp", part)),
                                  "cpp_is_faster_cpu_seconds": ratio(cpu, (name, part), ("cpp", part))}
    return {"floor": figures(("floor", "")), "mm": figures(("mm", "")), "cpp_over_floor": ratio(wall, ("cpp", "forward"), ("floor", "")),
            "cpp_over_floor_cpu_seconds": ratio(cpu, ("cpp", "forward"), ("floor", "")), "loops": torch.ops.sophiavl_cpu.isas()[-1],
            "contestants": {name: {"error": errors[name], "forward": against(name, "forward"), "both": against(name, "both")} for name in found}}


def take_turns(work: dict[Any, Callable[[], Any]], rounds: int) -> tuple[dict[Any, list[float]], dict[Any, list[float]], dict[Any, float]]:
    """Run each once a round: wall seconds, processor seconds, and MiB by which memory rose in a first round of its own (the same one where there is one)."""
    wall: dict[Any, list[float]] = {key: [] for key in work}
    cpu: dict[Any, list[float]] = {key: [] for key in work}
    extra: dict[Any, float] = {}
    for turn in range(rounds + (rounds > 1)):
        for key, run in work.items():
            before = _clean() if turn == 0 else 0.0
            began, used = time.perf_counter(), time.process_time()
            run()
            wall[key].append(time.perf_counter() - began)
            cpu[key].append(time.process_time() - used)
            extra.setdefault(key, _resident("VmHWM") - before)
    return {key: times[-rounds:] for key, times in wall.items()}, {key: times[-rounds:] for key, times in cpu.items()}, extra


def _resident(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def _clean() -> float:
    """Give freed memory back and start the high-water mark at what is resident now, in MiB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


if __name__ == "__main__":
    main()
