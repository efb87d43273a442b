"""Checkpoints: seconds to save, seconds that training stands still for a save in the background, seconds to load, in both formats and several layouts.

    python benchmarks/checkpoints.py --out benchmarks/results/checkpoints_cpu.json

A Qwen2.5-VL of random weights in bf16 with its optimizer (14 bytes a parameter), trained ranks as torchrun starts them, over gloo; the formats take turns in
one run. Before anything is timed, what each format loads is compared, weight by weight and moment by moment, with what was saved. Files are flushed to the
disk in both; loads find them in the page cache. Predictions were written before the first run and are kept beside the results.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import checkout, common, transfer

SHAPES = {name: transfer.SHAPES[name] for name in ("30M", "300M")} | {"100M": (768, 2048, 12, 12, 4, 16384, 6, 384, "bfloat16")}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"1": (1, {}), "tensor=2": (2, {"tensor": 2}), "data=2": (2, {}), "pipeline=2": (2, {"pipeline": 2})}
FORMATS = ("safetensors", "torch_dist")
# One process: both copy and write the same bytes. Two: safetensors gathers every tensor on both ranks and writes in turns within files, torch_dist writes
# two files at once and moves nothing between ranks; on two cores of one machine with one disk the disk limits both.
PREDICTED = {
    "save, 1 process": "torch_dist 1.0x of safetensors", "save, 2 processes": "torch_dist 0.6x", "stall in the background, 2 processes": "torch_dist 0.3x",
    "load, 1 process": "1.0x", "load, 2 processes": "0.7x: each rank reads its own moments only",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="30M,100M", help=f"of {', '.join(SHAPES)}; two ranks hold 300M in 32 GiB")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}, by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/checkpoints_cpu.json")
    parser.add_argument("--work", default=None, help="folder on the disk to be measured; default: a temporary one")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        measure(**json.loads(a.child), repeats=a.repeats)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=a.work) as work:
        for size in a.sizes.split(","):
            write_model(Path(work) / size, size)
            for layout in a.layouts.split(","):
                rows += started(Path(work), size, layout, a.repeats)
                print(table(rows[-len(FORMATS):], head=len(rows) == len(FORMATS)), flush=True)
                common.write(Path(a.out), {"load_average": os.getloadavg(), "predicted": PREDICTED, "checkpoints": rows})


def table(rows: list[dict[str, Any]], head: bool = True) -> str:
    """Markdown; in brackets the ratio to safetensors."""
    lines = ["| parameters | layout | format | GB | save, s | stands still in the background, s | load, s |", "|" + "---|" * 7] if head else []
    first = next(r for r in rows if r["format"] == FORMATS[0])
    for r in rows:
        figures = [f"{r[k]['median']:.2f} ({r[k]['median'] / first[k]['median']:.2f}x)" for k in ("save_s", "stall_s", "load_s")]
        lines.append(f"| {r['parameters'] / 1e6:.0f} M | {r['layout']} | {r['format']} | {r['bytes'] / 1e9:.2f} | {' | '.join(figures)} |")
    return "\n".join(lines)


def write_model(folder: Path, size: str) -> None:
    """A model folder of that shape with random weights in it."""
    checkout.use()
    import torch
    from safetensors.torch import save_file

    transfer.SHAPES |= SHAPES
    named = transfer.write_model(folder, size)
    (folder / "model.safetensors.index.json").unlink()
    random = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=random).mul_(0.02).bfloat16() for name, shape in named}, str(folder / "model.safetensors"))


def started(work: Path, size: str, layout: str, repeats: int) -> list[dict[str, Any]]:
    """The ranks of a layout, and what the first of them found."""
    out = work / "result.json"
    child = json.dumps({"work": str(work), "size": size, "layout": layout, "out": str(out)})
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={LAYOUTS[layout][0]}", __file__,
               "--child", child, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{size}, {layout} failed:\n{done.stderr[-9000:]}")
    return json.loads(out.read_text())


def measure(work: str, size: str, layout: str, out: str, repeats: int) -> None:
    """A rank's part: both formats in turn, saved, saved in the background, loaded."""
    checkout.use()
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file

    from sophiavl_fast.config import build
    from sophiavl_fast.policy import Policy, checkpoint, optimizer
    from sophiavl_fast.policy.saver import Saver

    model, runs = Path(work) / size, Path(out).with_name(f"runs-{size}-{layout}")
    config = build({"model": {"path": str(model), "dtype": "bfloat16"}, "device": "cpu", "parallel": LAYOUTS[layout][1]})
    policy = Policy.create(config, reference=False, total_steps=1)
    random = torch.Generator().manual_seed(policy.replica)   # tensor ranks hold the same norms
    held = [shard for p in policy.model.parameters() if (shard := optimizer.shard_of(policy.optimizer, p)) is not None]
    for shard in held:
        for moment in shard.moments.values():
            moment.copy_(torch.randn(moment.shape, generator=random))
    policy.updates = 1
    tensors = [*(p.data for p in policy.model.parameters()), *(s.held(k) for s in held for k in optimizer.state_keys(torch.bfloat16))]
    expected = [t.clone() for t in tensors]
    seconds: dict[str, dict[str, list[float]]] = {form: {"save_s": [], "stall_s": [], "load_s": []} for form in FORMATS}
    for turn in range(repeats + 1):   # the first is not counted: it checks
        for form in FORMATS if turn % 2 else reversed(FORMATS):
            policy.config.checkpoint.format = form  # type: ignore[assignment]
            with Saver(policy, runs / form, keep=1, background=False) as now, Saver(policy, runs / form, keep=1, background=True) as later:
                for key, saver in (("save_s", now), ("stall_s", later)):
                    policy.layout.wait("benchmark")
                    began = time.perf_counter()
                    saver.save(turn + 1, {})
                    policy.layout.wait("benchmark")
                    seconds[form][key] += [time.perf_counter() - began] if turn else []
                    saver.wait()
            if not turn:
                for t in tensors:
                    t.zero_()
            policy.layout.wait("benchmark")
            began = time.perf_counter()
            checkpoint.load(policy, runs / form / "checkpoints" / f"step_{turn + 1}")
            seconds[form]["load_s"] += [time.perf_counter() - began] if turn else []
            if not all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True)):
                raise SystemExit(f"{form}: what was loaded is not what was saved")
    if dist.get_rank() == 0:
        parameters = sum(t.numel() for t in load_file(model / "model.safetensors").values())
        rows = [{"size": size, "parameters": parameters, "layout": layout, "format": form,
                 "bytes": sum(f.stat().st_size for f in checkpoint.newest(runs / form).rglob("*")),  # type: ignore[union-attr]
                 **{key: common.spread(values) for key, values in found.items()}} for form, found in seconds.items()]
        Path(out).write_text(json.dumps(rows))
    policy.layout.wait("benchmark")
    policy.close()


if __name__ == "__main__":
    main()
