"""Weight transfer: seconds against bytes, each phase's share, and the extra memory it takes, into real vLLM engines of growing shape.

    python benchmarks/transfer.py --out benchmarks/results/transfer_cpu.json

A Qwen2.5-VL of each shape; the engine starts with dummy weights, so nothing of the model's size is ever written to disk. The trainer's
tensors are views of one buffer of random numbers as large as the largest of them: its own memory is left to the transfer.
`gloo` is a server in processes of its own, `inproc` an engine inside this one. Every size runs in a fresh process. Checksums of every
tensor are compared once, before the timed transfers. Predictions were written before the first run and are kept beside the results.

With `--halves` the tensors are gathered, as under tensor parallelism: another process has the other half of each, over gloo. Every second transfer
then gathers a bucket only after the one before it has arrived; both kinds are reported, side by side.
"""
from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import checkout, common

# name: hidden, feed-forward, layers, heads, key heads, vocabulary, vision layers, vision hidden, dtype
SHAPES: dict[str, tuple[Any, ...]] = {
    "3M": (192, 512, 4, 4, 2, 128, 2, 96, "float32"),
    "30M": (512, 1408, 8, 8, 2, 8192, 4, 256, "bfloat16"),
    "300M": (1024, 2816, 20, 16, 4, 32000, 8, 512, "bfloat16"),
    "1B": (2048, 5632, 20, 16, 2, 64000, 12, 768, "bfloat16"),
    "3B": (2048, 11008, 36, 16, 2, 151936, 32, 1280, "bfloat16"),
}
# One broadcast over loopback and one copy into the engine's layout, about 1 GB/s together on one busy core; 0.15 s for a dozen control calls.
# inproc: the copy alone, 2 GB/s. Extra memory of the trainer: a bucket and the sockets' buffers; of the engine: its largest layer twice.
PREDICTED = {
    "gloo": {"fixed_s": 0.15, "gb_per_s": 1.0}, "inproc": {"fixed_s": 0.03, "gb_per_s": 2.0},
    "growth": "linear in bytes above 100 MB", "phases": "send and load more than 90 % above 100 MB, convert and gather nothing (one process, no sharding)",
    "trainer_extra": "at most one bucket, 256 MiB", "engine_extra": "at most twice the largest module, embedding or head",
}
OVERLAP = {None: "", False: ", gathered", True: ", gathered while it sends"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="3M,30M,300M,1B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--backends", default="gloo,inproc")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", type=int, default=1, help="gloo only: servers that the weights go to side by side")
    parser.add_argument("--halves", action="store_true", help="gloo only: gather every tensor from two processes, with and without overlap")
    parser.add_argument("--out", default="benchmarks/results/transfer_cpu.json")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        print("result:" + json.dumps(measure(*a.child.split(","), a.repeats, a.engines, a.halves)))
        return
    rows = []
    for backend in a.backends.split(","):
        for size in a.sizes.split(","):
            command = [sys.executable, __file__, "--child", f"{size},{backend}", "--repeats", str(a.repeats), "--engines", str(a.engines),
                       *(["--halves"] if a.halves else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            found = [line.removeprefix("result:") for line in done.stdout.splitlines() if line.startswith("result:")]
            if not found:
                raise SystemExit(f"{size} over {backend} failed:\n{done.stderr[-3000:]}")
            rows += json.loads(found[0])
            print(table(rows[-1 - a.halves:], head=len(rows) == 1 + a.halves), flush=True)
            common.write(Path(a.out), {"load_average": os.getloadavg(), "predicted": PREDICTED, "transfers": rows})


def table(rows: list[dict[str, Any]], head: bool = True) -> str:
    """Markdown."""
    title = "| way | parameters | MB | seconds (min, median) | GB/s | gather / convert / send / load / reset, share | extra MiB: trainer, engine |"
    lines = [title, "|" + "---|" * 7] if head else []
    for r in rows:
        shares = " / ".join(f"{r['shares'][k]:.0%}" for k in ("gather_s", "convert_s", "send_s", "load_s", "reset_s"))
        lines.append(f"| {r['backend']}{OVERLAP[r['overlap']]} | {r['parameters'] / 1e6:.1f} M | {r['bytes'] / 1e6:.0f} "
                     f"| {r['seconds']['min']:.2f}, {r['seconds']['median']:.2f} "
                     f"| {r['bytes'] / 1e9 / r['seconds']['median']:.2f} | {shares} | {r['trainer_extra_mib']:.0f}, {r['engine_extra_mib']:.0f} |")
    return "\n".join(lines)


def measure(size: str, backend: str, repeats: int, engines: int, halves: bool) -> list[dict[str, Any]]:
    """One engine of that shape: checksums once, then `repeats` transfers; of halves that many with and without overlap, in turn."""
    checkout.use()
    with tempfile.TemporaryDirectory() as folder:
        named = write_model(Path(folder), size)
        engine = open_engine(Path(folder), SHAPES[size][-1], backend, engines)
        try:
            source = Halves(named, SHAPES[size][-1]) if halves else Random(named, SHAPES[size][-1])
            engine._transfer.checksums = True
            engine.send(source, 1)
            engine._transfer.checksums = False
            kinds = [False, True] if halves else [None]
            runs, peaks = {kind: [] for kind in kinds}, {kind: (0.0, 0.0) for kind in kinds}
            for version in range(2, repeats * len(kinds) + 2):
                kind = kinds[version % len(kinds)]
                engine._transfer.overlap = backend != "inproc" if kind is None else kind
                with Peak() as peak:
                    began = time.perf_counter()
                    times = engine.send(source, version)
                    runs[kind].append(times | {"seconds": time.perf_counter() - began})
                extra = peak.extra(os.getpid()), max((peak.extra(p) for p in peak.others), default=0.0)
                peaks[kind] = max(peaks[kind][0], extra[0]), max(peaks[kind][1], extra[1])
            source.close()
        finally:
            engine.close()
    return [result(size, backend, engines, source, kind, runs[kind], *peaks[kind]) for kind in kinds]


def result(size: str, backend: str, engines: int, source: Random, overlap: bool | None, runs: list[dict[str, float]], trainer: float, engine: float) -> dict:
    """Medians of the runs. trainer, engine: MiB beyond what they had."""
    bytes_ = runs[0]["bytes"]
    phases = {k: median(r[k] for r in runs) for k in runs[0] if k.endswith("_s") and k != "hidden_s"}
    hidden = median(r.get("hidden_s", 0.0) for r in runs)
    return {"size": size, "backend": backend, "engines": engines, "overlap": overlap, "hidden_s": hidden,
            "dtype": SHAPES[size][-1], "parameters": source.parameters, "tensors": source.count,
            "bytes": bytes_, "largest_tensor_bytes": source.largest * source.width, "seconds": common.spread([r["seconds"] for r in runs]),
            "phases": phases, "shares": {k: v / sum(phases.values()) for k, v in phases.items()},
            "trainer_extra_mib": trainer, "engine_extra_mib": engine}


class Random:
    """Tensors of the model's names and shapes, all views of one buffer."""

    def __init__(self, named: list[tuple[str, list[int]]], dtype: str) -> None:
        import torch

        self._named = [(name, shape, torch.Size(shape).numel()) for name, shape in named]
        self.count = len(named)
        self.largest, self.parameters = max(n for _, _, n in self._named), sum(n for _, _, n in self._named)
        self._buffer = torch.randn(self.largest, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(getattr(torch, dtype))
        self.width = self._buffer.element_size()

    def weights(self) -> Iterator[tuple[str, Any]]:
        for name, shape, count in self._named:
            yield name, self._buffer[:count].view(shape)

    def close(self) -> None:
        pass


class Halves(Random):
    """Of each tensor the first half is here; the second comes from another process, as from a tensor-parallel rank (policy/mapping.py)."""

    def __init__(self, named: list[tuple[str, list[int]]], dtype: str) -> None:
        import multiprocessing

        super().__init__(named, dtype)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
        self._peer = context.Process(target=other_half, args=(theirs, named, dtype, port), daemon=True)
        self._peer.start()
        self._group = meet(port, 0)

    def weights(self) -> Iterator[tuple[str, Any]]:
        self._pipe.send("again")
        for name, shape, count in self._named:
            yield name, gathered(self._group, self._buffer[:(count + 1) // 2])[:count].view(shape)

    def close(self) -> None:
        self._pipe.send("end")
        self._peer.join(60)


def other_half(pipe: Any, named: list[tuple[str, list[int]]], dtype: str, port: int) -> None:
    """The other process: takes part in each pass."""
    source, group = Random(named, dtype), meet(port, 1)
    while pipe.recv() == "again":
        for _, _, count in source._named:
            gathered(group, source._buffer[:(count + 1) // 2])


def meet(port: int, rank: int) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    return dist.group.WORLD


def gathered(group: Any, part: Any) -> Any:
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts)


class Peak:
    """Highest resident memory of this process and its descendants, sampled every 5 ms, over what they had before."""

    def __enter__(self) -> Peak:
        import psutil

        me = psutil.Process()
        self._processes = {p.pid: p for p in (me, *me.children(recursive=True))}
        self.others = [pid for pid in self._processes if pid != me.pid]
        self._before = self._look()
        self._peak, self._ended = dict(self._before), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def extra(self, pid: int) -> float:
        """MiB."""
        return (self._peak[pid] - self._before[pid]) / 2**20

    def _look(self) -> dict[int, int]:
        return {pid: p.memory_info().rss for pid, p in self._processes.items()}

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self._peak = {pid: max(self._peak[pid], rss) for pid, rss in self._look().items()}


def write_model(folder: Path, size: str) -> list[tuple[str, list[int]]]:
    """Config, tokenizer and processor of the shape, and an index that names tensors whose files do not exist; names and shapes."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from sophiavl_fast.data.demo import tiny_model

    hidden, wide, layers, heads, keys, vocabulary, depth, vision, _ = SHAPES[size]
    tiny_model.build(folder, 0)
    (folder / "model.safetensors").unlink()
    tree = json.loads((folder / "config.json").read_text())
    width = hidden // heads
    tree["text_config"] |= {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
                            "num_key_value_heads": keys, "vocab_size": vocabulary, "layer_types": ["full_attention"] * layers, "max_window_layers": layers,
                            "rope_parameters": tree["text_config"]["rope_parameters"] | {"mrope_section": [width // 8, width // 8, width // 2 - width // 4]}}
    tree["vision_config"] |= {"depth": depth, "hidden_size": vision, "intermediate_size": 2 * vision, "out_hidden_size": hidden,
                              "num_heads": max(2, vision // 64), "fullatt_block_indexes": [depth - 1]}
    (folder / "config.json").write_text(json.dumps(tree))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tree))
    named = [(name, list(p.shape)) for name, p in model.named_parameters()]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "absent.safetensors" for name, _ in named}}))
    return named


def open_engine(folder: Path, dtype: str, backend: str, engines: int) -> Any:
    from sophiavl_fast import rollout
    from sophiavl_fast.config import build
    from sophiavl_fast.rollout import arguments, inline, server

    plain = arguments.engine_arguments
    for module in (inline, server):   # the one thing that no config can ask for: weights that are nowhere
        module.engine_arguments = lambda *a: plain(*a) | {"load_format": "dummy"}  # type: ignore[attr-defined]
    kind = {"engine": "inline"} if backend == "inproc" else {"engine": "server", "transfer": backend, "engines": engines}
    config = build({"device": "cpu", "model": {"path": str(folder), "dtype": dtype}, "data": {"max_prompt_tokens": 256},
                    "rollout": {"max_new_tokens": 56, "max_num_seqs": 8, "start_timeout_s": 1200.0, "transfer_timeout_s": 600.0, **kind}})
    return rollout.open_rollout(config, stop_ids=[2], banned_ids=[], vocab_size=100, decode=str, device="cpu", run_dir=folder)


if __name__ == "__main__":
    main()
