"""Build the C++ CPU kernels with ninja: `python kernels/csrc/build.py [FOLDER]` (default kernels/ops, where they are looked for).

They are optional: without a compiler, ninja or torch, one line says so and the exit code is 0 with `--optional`, else 1.
The library's name carries torch's version, whose ABI it is bound to, and a digest of the sources.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("ops.cpp", "statistics.cpp", "gradients.cpp", "rows.cpp")
OPENMP = "-fopenmp"  # without it at::parallel_for is a plain loop
FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", OPENMP]


def digest() -> str:
    """Eight hex digits of everything that is compiled, and how."""
    files = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h", ".inc"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + " ".join(FLAGS).encode()).hexdigest()[:8]


def library_name(torch_version: str) -> str:
    return f"libsophiavl_cpu-torch{torch_version}-{digest()}.so"


def why_not() -> str | None:
    """What is missing, or None."""
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # a virtual environment's own ninja
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) found"
    try:
        import torch  # noqa: F401
        from torch.utils.cpp_extension import is_ninja_available
    except ImportError as error:
        return str(error)
    return None if is_ninja_available() else "ninja is not installed"


def build(folder: Path) -> Path:
    """Compile (two processes at most: a file takes a gigabyte) and put the library into `folder`, older ones removed."""
    import torch
    from torch.utils.cpp_extension import load

    target = folder / library_name(torch.__version__)
    if target.exists():
        return target
    os.environ.setdefault("MAX_JOBS", str(min(2, os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory() as work:
        load("sophiavl_cpu", [str(HERE / name) for name in SOURCES], extra_cflags=FLAGS, extra_ldflags=[OPENMP], build_directory=work, is_python_module=False)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("libsophiavl_cpu-*.so"):
            old.unlink()
        shutil.copy(Path(work) / "sophiavl_cpu.so", folder / (target.name + ".part"))
        (folder / (target.name + ".part")).rename(target)
    return target


def main(arguments: list[str]) -> int:
    """Build, or say in one line why not."""
    optional = "--optional" in arguments
    folder = Path(next((a for a in arguments if not a.startswith("--")), HERE.parent / "ops"))
    why = why_not()
    if why is None:
        try:
            print(f"kernels: {build(folder)}")
            return 0
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            why = next((line.strip() for line in lines if "error:" in line), lines[0])
            if not optional:
                print("\n".join(lines[-30:]), file=sys.stderr)
    print(f"kernels: the C++ CPU kernels were not built ({why}); PyTorch's reference runs in their place, `make kernels` tries again", file=sys.stderr)
    return 0 if optional else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
