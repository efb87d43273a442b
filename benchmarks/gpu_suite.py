"""Everything that needs a GPU, in one command: are the kernels right there, how fast, how fast are others, and a real training step.

    python benchmarks/gpu_suite.py --out gpu.json                  # under nine minutes on one GPU; also writes gpu.png or gpu.svg
    python benchmarks/gpu_suite.py --only linear/qwen7b,peers/qwen7b
    python benchmarks/gpu_suite.py --wheels build/wheels           # packages that the machine lacks, see benchmarks/requirements-gpu-suite.txt
    python benchmarks/gpu_suite.py --dry-run                       # no GPU: every code path at tiny shapes, Triton interpreted in a child

Needs torch >= 2.11 and triton; liger-kernel for the peers (trl and verl may be absent); transformers, accelerate, megatron-core and pydantic for
attention and training. What is absent is said first, one line a package. No installation: PYTHONPATH is set here.

Parts run in order of importance in a child process. A part that fails, or whose process ends or hangs, is recorded in the file (while a process
runs in FILE.worker.json, rewritten before and after every part); after an error that leaves the device unusable the rest runs in a fresh process.
Each part starts only where its estimate fits in what is left of --budget. Exit code 1: a part failed, or had no time left. `aims` says which
figures are where they should be.
"""
from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
from benchmarks import checkout, common  # noqa: E402
from benchmarks.gpu import aims, needs, process  # noqa: E402

checkout.use()
BUDGET = 525.0
UNFINISHED = "its process ended, or was ended, while it ran"


@dataclass(frozen=True, slots=True)
class Part:
    """seconds: what it is taken to need, a guess until a GPU says better; triton: a dry run interprets its kernels; needs: modules it imports."""

    seconds: float
    run: Callable[[Any], Any]
    triton: bool = False
    needs: tuple[str, ...] = ()


def parts() -> dict[str, Part]:
    """The most important first. The estimates fit together in the budget."""
    from benchmarks.gpu import attention, clock, correct, heads, losses, training

    peers = (needs.LIGER, needs.TRL, needs.VERL)
    house = (needs.MEGATRON, needs.PYDANTIC)
    return {
        "ceilings": Part(10, clock.ceilings),
        "correct": Part(90, correct.run, triton=True),
        "linear/qwen7b": Part(35, lambda b: heads.linear(b, "qwen7b"), triton=True),
        "grpo_loss": Part(25, losses.grpo, triton=True),
        "trust_advantage": Part(20, losses.trust, triton=True),
        "logits": Part(40, heads.logits, triton=True, needs=(needs.LIGER, needs.TRL)),
        "attention": Part(55, attention.run, needs=house),
        "linear/llama": Part(25, lambda b: heads.linear(b, "llama"), triton=True),
        "linear/qwen3b": Part(15, lambda b: heads.linear(b, "qwen3b"), triton=True),
        "peers/qwen7b": Part(40, lambda b: heads.linear_peers(b, "qwen7b"), needs=peers),
        "training": Part(60, training.run, needs=house),
        "sanitizer": Part(55, correct.sanitize),
        "peers/qwen3b": Part(15, lambda b: heads.linear_peers(b, "qwen3b"), needs=peers),
        "peers/llama": Part(20, lambda b: heads.linear_peers(b, "llama"), needs=peers),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="check everything but the device")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_suite.json"), metavar="FILE")
    parser.add_argument("--only", default="", metavar="NAME,...", help="these parts (and the ceilings that rates refer to)")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"of all parts together (default {BUDGET:g}; a dry run has none)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages to put on the path, as wheels")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    site = None
    try:
        if a.wheels:
            site = needs.install(a.wheels)
            sys.path.insert(1, str(site))
            os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], str(site)])
        return _main(parser, a)
    except ValueError as error:
        if site is None and a.wheels:
            parser.error(f"--wheels {error}")
        raise
    finally:
        if site is not None:
            shutil.rmtree(site, ignore_errors=True)


def _main(parser: argparse.ArgumentParser, a: argparse.Namespace) -> int:
    began = time.monotonic()
    import torch

    known, wish = parts(), [name for name in a.only.split(",") if name]
    if unknown := [name for name in wish if name not in known]:
        parser.error(f"--only {unknown[0]}: expected {', '.join(known)}")
    if not a.dry_run and not torch.cuda.is_available():
        print("no CUDA device: only --dry-run is possible here", file=sys.stderr)
        return 2
    chosen = {name: known[name] for name in known if not wish or name in wish or name == "ceilings"}
    a.deadline = math.inf if a.dry_run else began + a.budget
    if a.worker:
        results = blank(a)
        run(chosen, a, results)
        if not a.dry_run:
            os._exit(bool(results["errors"]))  # taking down a broken context can hang, and the file is written
        return bool(results["errors"])
    results = blank(a) | {"machine": common.machine(), "absent": needs.absent({name: part.needs for name, part in chosen.items()})}
    for module, why in results["absent"].items():
        print(f"absent: {module}: {why}", file=sys.stderr)
    if a.dry_run:  # two processes: Triton interprets or compiles, from its import on
        for triton in (False, True):
            work([name for name, part in chosen.items() if part.triton == triton], a, results, {"TRITON_INTERPRET": "1"} if triton else {})
    else:
        work(list(chosen), a, results)
    results["parts"] = {name: results["parts"][name] for name in known if name in results["parts"]}
    results["aims"] = {} if a.dry_run else aims.judge(results["parts"])
    results["plot"] = _plot(results, a.out)
    results["seconds"] = round(time.monotonic() - began, 1)
    write(a.out, results)
    _summary(results)
    return bool(results["errors"])


def blank(a: argparse.Namespace) -> dict[str, Any]:
    return {"machine": {}, "dry_run": a.dry_run, "parts": {}, "errors": {}}


def work(names: list[str], a: argparse.Namespace, results: dict[str, Any], environment: dict[str, str] | None = None) -> None:
    """These parts in child processes, a fresh one whenever one ends before its work does; merged into `results`."""
    out, rest = a.out.with_suffix(".worker.json"), list(names)
    while rest:
        out.unlink(missing_ok=True)
        left = a.deadline - time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--only", ",".join(rest), "--out", str(out)]
        command += ["--dry-run"] if a.dry_run else ["--budget", f"{left:.1f}"]
        ended = "interrupted"
        try:
            code, _ = process.run(command, seconds=1800 if a.dry_run else left + 5, env={**os.environ, **(environment or {})})
            ended = f"exit code {code}" if code is not None else "stopped at the end of the budget"
        finally:
            done = _merge(out, results, ended)
            write(a.out, results)
        if not done & {*rest}:
            results["errors"] |= {name: f"its process ended before it began ({ended})" for name in rest}
            break
        rest = [name for name in rest if name not in done]
    write(a.out, results)


def _merge(out: Path, results: dict[str, Any], ended: str) -> set[str]:
    """A process's file goes into `results`, which win; the parts that it has anything of."""
    found = json.loads(out.read_text()) if out.exists() else {"parts": {}, "errors": {}}
    out.unlink(missing_ok=True)
    for name, error in found["errors"].items():
        results["errors"].setdefault(name, f"{error} ({ended})" if error == UNFINISHED else error)
    results["parts"] = found["parts"] | results["parts"]
    results["machine"] |= found.get("machine", {})
    return {*found["parts"], *found["errors"]}


def run(chosen: dict[str, Part], a: argparse.Namespace, results: dict[str, Any]) -> None:
    """Each part in order, in this process; ends early where the device takes no more work. The file is complete before and after each."""
    import torch

    from benchmarks.gpu.clock import Bench

    torch.manual_seed(0)
    triton = not a.dry_run or os.environ.get("TRITON_INTERPRET") == "1"
    bench = Bench(torch.device("cpu" if a.dry_run else "cuda"), a.dry_run, backend="triton" if triton else "reference", deadline=a.deadline)
    if not a.dry_run:
        results["machine"] = _device()
    for name, part in chosen.items():
        start = time.monotonic()
        if part.seconds > bench.left():
            results["errors"][name] = f"not started: it is taken to need {part.seconds:g} s, {max(bench.left(), 0):.0f} s were left"
            write(a.out, results)
            continue
        print(f"{name} ...", flush=True, file=sys.stderr)
        results["errors"][name] = UNFINISHED
        write(a.out, results)
        del results["errors"][name]
        if not a.dry_run:  # a hanging kernel: say where, and leave; the parent goes on with the rest
            faulthandler.dump_traceback_later(min(max(3 * part.seconds, 60), bench.left() + 3), exit=True)
        try:
            found = part.run(bench)
            results["parts"][name] = found
            bench.clear()
            if isinstance(found, dict) and (error := found.get("error")):
                results["errors"][name] = error
        except Exception as error:
            results["errors"][name] = _line(error)
            print(f"{name} FAILED: {results['errors'][name]}", file=sys.stderr)
        faulthandler.cancel_dump_traceback_later()
        results["parts"].setdefault(name, {})["seconds"] = round(time.monotonic() - start, 2)
        bench.generators.clear()
        write(a.out, results)
        if not bench.alive():
            return


def _device() -> dict[str, Any]:
    """What common.machine leaves out: memory, compute capability, CUDA and driver."""
    import torch

    card = torch.cuda.get_device_properties(0)
    driver = Path("/proc/driver/nvidia/version")
    return {"gpu_memory_gib": round(card.total_memory / 2 ** 30, 1), "multiprocessors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda, "driver": driver.read_text().splitlines()[0] if driver.exists() else None}


def _line(error: BaseException) -> str:
    """The error and what lay under it, where each was raised, if it was."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}{where}"
    under = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return line + (f" <- {_line(under)}" if under else "")


def write(path: Path, results: dict[str, Any]) -> None:
    """All at once, so that whoever interrupts finds a whole file. Strict JSON: what is no finite number is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(_strict(results), indent=1, allow_nan=False) + "\n")
    fresh.replace(path)


def _strict(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _strict(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_strict(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def _plot(results: dict[str, Any], out: Path) -> str | None:
    from benchmarks.gpu import plot

    try:
        return str(plot.draw(results, out))
    except Exception as error:
        results["errors"]["plot"] = _line(error)
        return None


def _summary(results: dict[str, Any]) -> None:
    """A line a figure, then the aims, the failures last."""
    from benchmarks.gpu import plot

    for name, figure in plot.figures(results):
        units = {"tflops": "TFLOP/s", "gb_per_s": "GB/s", "peak_extra_mb": "MB extra"}
        shown = [f"{figure[key]:9.1f} {unit}" for key, unit in units.items() if figure.get(key) is not None]
        share = figure.get("of_floor")
        print(f"{name:58}{figure['median_ms']:10.4f} ms  {'' if share is None else f'{100 * share:6.1f} % of the floor'}  {'  '.join(shown)}")
    for name, aim in results["aims"].items():
        verdict = {True: "met", False: "MISSED", None: "not measured"}[aim["met"]]
        value = "" if aim["value"] is None else f"{aim['value']:.3g}, "
        print(f"aim {name}: {value}{aim['aim']}: {verdict}" + (f" ({aim['peer']})" if "peer" in aim else ""))
    for name, error in results["errors"].items():
        print(f"FAILED {name}: {error}")


if __name__ == "__main__":
    sys.exit(main())
