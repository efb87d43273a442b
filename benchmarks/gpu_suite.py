"""Everything that needs a GPU, in one command: are the kernels right there, how fast, how fast are others, and a real training step.

    python benchmarks/gpu_suite.py --out gpu.json                  # under nine minutes on one GPU; also writes gpu.png or gpu.svg
    python benchmarks/gpu_suite.py --only linear/qwen7b,peers/qwen7b
    python benchmarks/gpu_suite.py --dry-run                       # no GPU: every code path at tiny shapes, Triton interpreted in a child

Needs torch, triton and liger-kernel; megatron-core and transformers for attention and training. No installation: PYTHONPATH is set
here. Parts run in order of importance, each on its own: a failure is recorded in the file, which is rewritten after every part, and
makes the exit code 1; so does a part for which no time was left.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
from benchmarks import checkout, common  # noqa: E402

checkout.use()
TRITON = "triton"    # parts whose kernels the dry run interprets, in a child process


def parts() -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """name -> (what it needs, what it does), the most important first."""
    from benchmarks.gpu import attention, clock, correct, heads, losses, training

    return {
        "ceilings": ("", clock.ceilings),
        "correct": (TRITON, correct.run),
        "linear/qwen7b": (TRITON, lambda b: heads.linear(b, "qwen7b", shares=True)),
        "grpo_loss": (TRITON, losses.grpo),
        "trust_advantage": (TRITON, losses.trust),
        "peers/qwen7b": ("", lambda b: heads.linear_peers(b, "qwen7b")),
        "training": ("", training.run),
        "logits": (TRITON, heads.logits),
        "attention": ("", attention.run),
        "linear/llama": (TRITON, lambda b: heads.linear(b, "llama", shares=False)),
        "linear/qwen3b": (TRITON, lambda b: heads.linear(b, "qwen3b", shares=True)),
        "sanitizer": ("", correct.sanitize),
        "peers/qwen3b": ("", lambda b: heads.linear_peers(b, "qwen3b")),
        "peers/llama": ("", lambda b: heads.linear_peers(b, "llama")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="check everything but the device")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_suite.json"), metavar="FILE")
    parser.add_argument("--only", default="", metavar="NAME,...", help="these parts (and the ceilings that rates refer to)")
    parser.add_argument("--budget", type=float, default=530.0, metavar="SECONDS", help="no part is started after this")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    import torch

    known, wish = parts(), [name for name in a.only.split(",") if name]
    if unknown := [name for name in wish if name not in known]:
        parser.error(f"--only {unknown[0]}: expected {', '.join(known)}")
    if not a.dry_run and not torch.cuda.is_available():
        print("no CUDA device: only --dry-run is possible here", file=sys.stderr)
        return 2
    chosen = {name: known[name] for name in known if not wish or name in wish or name == "ceilings"}
    if a.dry_run and not a.child:  # two processes: Triton interprets or compiles, from its import on
        chosen = {name: part for name, part in chosen.items() if part[0] != TRITON}
    results = {"machine": common.machine() | _device(), "dry_run": a.dry_run, "parts": {}, "errors": {}}
    run(chosen, a, results)
    if a.dry_run and not a.child:
        _child(known, wish, a, results)
    if not a.child:
        results["plot"] = _plot(results, a.out)
        write(a.out, results)
        _summary(results)
    return bool(results["errors"])


def run(chosen: dict[str, tuple[str, Callable[[Any], Any]]], a: argparse.Namespace, results: dict[str, Any]) -> None:
    """Each part in order; the file is complete after each."""
    import torch

    from benchmarks.gpu.clock import Bench

    torch.manual_seed(0)
    began = time.monotonic()
    bench = Bench(torch.device("cpu" if a.dry_run else "cuda"), a.dry_run, backend=TRITON if not a.dry_run or a.child else "reference")
    for name, (_, part) in chosen.items():
        start = time.monotonic()
        if start - began > a.budget:
            results["errors"][name] = f"not started: {a.budget:g} s were spent"
            continue
        print(f"{name} ...", flush=True, file=sys.stderr)
        try:
            found = part(bench)
            if isinstance(found, dict) and (error := found.get("error")):
                results["errors"][name] = error
            results["parts"][name] = found
        except Exception as error:
            results["errors"][name] = _line(error)
            print(f"{name} FAILED: {results['errors'][name]}", file=sys.stderr)
        results["parts"].setdefault(name, {})["seconds"] = round(time.monotonic() - start, 2)
        bench.generators.clear()
        if not bench.dry:
            bench.clear()
        write(a.out, results)


def _device() -> dict[str, Any]:
    """What common.machine leaves out: memory, compute capability, CUDA and driver."""
    import torch

    if not torch.cuda.is_available():
        return {}
    card = torch.cuda.get_device_properties(0)
    driver = Path("/proc/driver/nvidia/version")
    return {"gpu_memory_gib": round(card.total_memory / 2 ** 30, 1), "multiprocessors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda, "driver": driver.read_text().splitlines()[0] if driver.exists() else None}


def _line(error: BaseException) -> str:
    """The error and what lay under it, where each was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} ({Path(where.filename).name}:{where.lineno})"
    under = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return line + (f" <- {_line(under)}" if under else "")


def _child(known: dict[str, Any], wish: list[str], a: argparse.Namespace, results: dict[str, Any]) -> None:
    """The Triton parts of a dry run, interpreted; merged into `results`."""
    names = [name for name, part in known.items() if part[0] == TRITON and (not wish or name in wish)]
    if not names:
        return
    out = a.out.with_suffix(".triton.json")
    command = [sys.executable, __file__, "--dry-run", "--child", "--only", ",".join(names), "--out", str(out)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=1800)
    if done.returncode not in (0, 1) or not out.exists():
        results["errors"]["triton"] = f"the interpreted parts ended with exit code {done.returncode}"
        return
    theirs = json.loads(out.read_text())
    out.unlink()
    for key in ("parts", "errors"):
        results[key] |= {name: value for name, value in theirs[key].items() if name != "ceilings"}


def write(path: Path, results: dict[str, Any]) -> None:
    """All at once, so that whoever interrupts finds a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(results, indent=1) + "\n")
    fresh.replace(path)


def _plot(results: dict[str, Any], out: Path) -> str | None:
    from benchmarks.gpu import plot

    try:
        return str(plot.draw(results, out))
    except Exception as error:
        results["errors"]["plot"] = f"{type(error).__name__}: {error}"
        return None


def _summary(results: dict[str, Any]) -> None:
    """A line a figure, the failures last."""
    from benchmarks.gpu import plot

    for name, figure in plot.figures(results):
        print(f"{name:58}{figure['median_ms']:10.4f} ms  {100 * figure.get('of_floor', float('nan')):6.1f} % of the floor"
              + (f"  {figure['tflops']:7.1f} TFLOP/s" if "tflops" in figure else "") + (f"  {figure['gb_per_s']:7.1f} GB/s" if "gb_per_s" in figure else "")
              + (f"  peak {figure['peak_extra_mb']:9.1f} MB" if "peak_extra_mb" in figure else ""))
    for name, error in results["errors"].items():
        print(f"FAILED {name}: {error}")


if __name__ == "__main__":
    sys.exit(main())
