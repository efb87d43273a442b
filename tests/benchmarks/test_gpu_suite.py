"""The GPU suite without a GPU: its dry run works, fails where something is broken, and says so where there is no device."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import aims, attention, heads, needs, plot, training
from benchmarks.gpu.clock import Bench, relative
from benchmarks.gpu_suite import Part

ROOT = Path(__file__).resolve().parents[2]


def suite(*arguments, environment=None):
    command = [sys.executable, "benchmarks/gpu_suite.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}, timeout=500)


def strict(text):
    """JSON as others read it: NaN is an error."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_dry_run_of_some_parts(tmp_path):
    out = tmp_path / "gpu.json"
    done = suite("--dry-run", "--only", "trust_advantage,attention", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = strict(out.read_text())
    assert list(found["parts"]) == ["ceilings", "trust_advantage", "attention"] and not found["errors"] and found["aims"] == {}
    assert found["machine"]["versions"]["torch"] and Path(found["plot"]).stat().st_size > 500
    assert found["parts"]["trust_advantage"]["ours_std_graph"]["median_ms"] > 0
    assert found["parts"]["attention"]["exact"]["padded_sdpa"]["worst"] < 1e-5
    assert list(tmp_path.glob("*worker*")) == []


@pytest.mark.slow
def test_dry_run_of_everything(tmp_path):
    done = suite("--dry-run", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_name_or_no_device_is_one_line():
    done = suite("--only", "nonsense")
    assert done.returncode == 2 and "--only nonsense: expected ceilings, correct" in done.stderr
    if not torch.cuda.is_available():
        done = suite()
        assert done.returncode == 2 and done.stderr.strip() == "no CUDA device: only --dry-run is possible here"


def arguments(out, seconds=100.0):
    return SimpleNamespace(dry_run=True, worker=True, deadline=time.monotonic() + seconds, out=out)


def test_a_broken_part_is_recorded_and_the_others_run(tmp_path):
    """One part raises, another finds an error, a third would take too long: three lines, and the file is there before and after each."""
    def breaks(bench):
        assert strict(out.read_text())["errors"]["breaks"] == gpu_suite.UNFINISHED  # what stays if the process dies here
        try:
            raise KeyError("below")
        except KeyError as error:
            raise ValueError("above") from error

    good = lambda b: {"median_ms": 1.0, "of_floor": float("nan")}
    made = {"good": Part(1, good), "breaks": Part(1, breaks), "finds": Part(1, lambda b: {"error": "liger is absent"}), "long": Part(200, good),
            "last": Part(1, good)}
    out, results = tmp_path / "x.json", {"parts": {}, "errors": {}}
    gpu_suite.run(made, arguments(out), results)
    found = strict(out.read_text())
    assert found["parts"]["good"]["median_ms"] == found["parts"]["last"]["median_ms"] == 1.0 and found["parts"]["good"]["of_floor"] is None
    assert found["errors"]["finds"] == "liger is absent"
    assert found["errors"]["breaks"].startswith("ValueError: above (") and "<- KeyError: 'below'" in found["errors"]["breaks"]
    assert found["errors"]["long"].startswith("not started: it is taken to need 200 s, ") and found["errors"].keys() == {"breaks", "finds", "long"}


def test_an_error_that_comes_late_or_ends_the_device(tmp_path, monkeypatch):
    """What the device reports only when waited for belongs to the part, whose figures stay; where it takes no more work no further part begins."""
    monkeypatch.setattr(Bench, "clear", lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")))
    monkeypatch.setattr(Bench, "alive", lambda self: False)
    made = {"first": Part(1, lambda b: {"median_ms": 1.0}), "second": Part(1, lambda b: {})}
    results = {"parts": {}, "errors": {}}
    gpu_suite.run(made, arguments(tmp_path / "x.json"), results)
    found = strict((tmp_path / "x.json").read_text())
    assert found["parts"]["first"]["median_ms"] == 1.0 and "illegal memory access" in found["errors"]["first"]
    assert "second" not in found["parts"] | found["errors"]


def test_a_fresh_process_does_the_rest(tmp_path, monkeypatch):
    """The first process dies in its second part, the next one cannot even start its first: each part is there or has a line."""
    asked = []

    def child(command, *, seconds, env):
        value = dict(pairwise(command))
        asked.append((value["--only"].split(","), float(value["--budget"])))
        if len(asked) < 3:
            made = [({"a": {"x": 1}}, {"b": gpu_suite.UNFINISHED}), ({"c": {"x": 2}, "a": {"x": 9}}, {})][len(asked) - 1]
            gpu_suite.write(Path(value["--out"]), {"parts": made[0], "errors": made[1]})
        return (-6, "") if len(asked) == 1 else (None, "")

    monkeypatch.setattr(gpu_suite.process, "run", child)
    results = {"parts": {}, "errors": {}, "machine": {}}
    given = arguments(tmp_path / "x.json")
    given.dry_run = False
    gpu_suite.work(["a", "b", "c", "d"], given, results)
    assert [names for names, _ in asked] == [["a", "b", "c", "d"], ["c", "d"], ["d"]] and all(0 < left <= 100 for _, left in asked)
    assert results["parts"] == {"a": {"x": 1}, "c": {"x": 2}}
    assert results["errors"] == {"b": f"{gpu_suite.UNFINISHED} (exit code -6)", "d": "its process ended before it began (stopped at the end of the budget)"}


def test_an_interrupted_run_keeps_what_is_there(tmp_path):
    """SIGTERM, as a time limit sends it: no process is left, and the file has what was finished and what was not."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu_suite.py", "--dry-run", "--only", "attention,training", "--out", str(out)]
    running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        worker, until = out.with_suffix(".worker.json"), time.monotonic() + 120
        while not (worker.exists() and "attention" in worker.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        running.terminate()
        assert running.wait(30) == 143 and children
        found = strict(out.read_text())
        # a signal that comes in a callback of C++ is lost: then the process is given three seconds, and may be in its next part
        assert "ceilings" in found["parts"] and [*found["errors"].values()] == [f"{gpu_suite.UNFINISHED} (interrupted)"]
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        running.kill()


def test_a_cause_that_was_never_raised():
    error = ValueError("above")
    error.__cause__ = KeyError("a cause with no place")
    assert gpu_suite._line(error) == "ValueError: above <- KeyError: 'a cause with no place'"


def test_the_estimates_fit_one_call():
    """All parts together, with the start of Python, in less than nine minutes; correctness first."""
    made = gpu_suite.parts()
    assert sum(part.seconds for part in made.values()) + 15 <= gpu_suite.BUDGET <= 530 and list(made)[:2] == ["ceilings", "correct"]


def test_a_path_of_attention_that_fails_loses_no_other(monkeypatch):
    def breaks(*arguments, **options):
        raise NotImplementedError("no flex here")

    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", breaks)
    found = attention.run(Bench(torch.device("cpu"), True, backend="reference"))
    assert found["exact"]["padded_sdpa"]["worst"] < 1e-5 and found["1:1"]["padded_sdpa"]["both_graph"]["median_ms"] > 0
    assert found["error"] == "exact/flex: NotImplementedError: no flex here"


def test_peers_that_are_absent(monkeypatch):
    """Liger must run; TRL and verl are noted."""
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "verl", None)
    bench = Bench(torch.device("cpu"), True, backend="reference")
    for found, key in ((heads.linear_peers(bench, "qwen3b"), "{}"), (heads.logits(bench), "{}_both")):
        assert found["error"].startswith("these peers must run: liger: ModuleNotFoundError") or "liger" in found["error"]
        assert "naive" not in found["error"] and "trl" not in found["error"] and "median_ms" in str(found[key.format("naive")])
    assert "absent" in found["trl_both_entropy"] and found["ours_grpo"]["median_ms"] > 0


def test_memory_without_results_and_floors_with_launches(monkeypatch):
    """A call that holds 700 of 1,000 bytes as its results has 300 extra; two launches of 1 us count beside the traffic."""
    held = iter((5_000_000, 705_000_000))
    nothing = lambda *a: None
    for name, value in (("synchronize", nothing), ("empty_cache", nothing), ("reset_peak_memory_stats", nothing),
                        ("memory_allocated", lambda: next(held)), ("max_memory_allocated", lambda: 1_005_000_000)):
        monkeypatch.setattr(torch.cuda, name, value)
    assert Bench(torch.device("cpu"), False).peak(lambda i: None) == {"peak_extra_mb": 300.0, "results_mb": 700.0}
    bench = Bench(torch.device("cpu"), True, bandwidth=1e12, launch=1e-6)
    assert bench.rates({"median_ms": 0.006}, bytes_=1e6, launches=2)["of_floor"] == pytest.approx(0.5)
    assert bench.rates({"median_ms": 0.006}, bytes_=1e6)["floor_ms"] == pytest.approx(0.001)


def test_aims():
    ms = lambda value, **more: {"median_ms": value, **more}
    parts = {"linear/qwen7b": {"forward": ms(25.0, of_floor=0.9), "both": ms(100.0, of_floor=0.7, peak_extra_mb=546.0), "backward": ms(80.0),
                               "backward_inactive_50": ms(44.0)},
             "peers/qwen7b": {"naive": {"forward": ms(40.0), "both": ms(120.0)}, "liger": {"both": ms(90.0)}, "trl": {"absent": "x"}, "seconds": 3.0},
             "grpo_loss": {"both": ms(0.02), "both_graph": ms(0.01, of_floor=0.8), "naive_both": ms(0.2), "torch.compile_both": ms(0.03)},
             "trust_advantage": {"ours_std": ms(0.02), "ours_std_graph": ms(0.003, of_floor=0.5), "naive_std": ms(0.5)},
             "logits": {"both": ms(3.0), "both_entropy": ms(3.5), "liger_both": ms(2.5), "trl_both_entropy": ms(7.0), "ours_grpo": ms(3.0),
                        "liger_grpo": ms(6.0)},
             "attention": {"4:1": {"tokens": 9, "varlen": {"both": ms(1.0)}, "flex": {"both": ms(2.0)}, "padded_sdpa": {"failed": "x"}}, "exact": {}}}
    found = aims.judge(parts)
    verdict = {name: aim["met"] for name, aim in found.items()}
    assert verdict["forward, share of the product rate"] and verdict["forward and backward, share of the product rate"] is False
    assert verdict["peak extra memory, MB"] and verdict["linear/qwen7b: backward with half the rows inactive over all"]
    assert verdict["linear/llama: backward with half the rows inactive over all"] is None
    assert verdict["grpo_loss/both_graph over its floor"] and verdict["trust_advantage/ours_std_graph over its floor"] is False
    best = {name.split(": best")[0]: (aim["peer"], aim["value"]) for name, aim in found.items() if "peer" in aim}
    assert found["linear/qwen7b/both: best peer's time over ours"] == {"value": 0.9, "aim": ">= 1", "met": False, "peer": "liger"}
    assert best["grpo_loss/both"] == ("torch.compile", 1.5) and best["trust_advantage/std"] == ("naive", 25.0)
    assert best["linear/qwen7b/forward"] == ("naive", 1.6) and best["linear/llama/both"] == ("none ran", None)
    assert best["logits/both"] == ("liger", 2.5 / 3) and best["logits/both_entropy"] == ("trl", 2.0) and best["logits/grpo"] == ("liger", 2.0)
    assert best["attention/4:1/both"] == ("flex", 2.0)


def test_what_is_absent_is_said_first(tmp_path, monkeypatch):
    for package, text in (("there_already", ""), ("breaks_inside", "raise OSError('libcuda is another')")):
        (tmp_path / f"{package}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(needs, "OPTIONAL", ("not_there.kernels",))
    found = needs.absent({"a": ("there_already", "breaks_inside"), "b": ("breaks_inside", "not_there.kernels")})
    assert found == {"breaks_inside": "OSError: libcuda is another; will fail: a, b",
                     "not_there.kernels": "ModuleNotFoundError: No module named 'not_there'; left out of b"}


def test_verl_without_its_init(tmp_path, monkeypatch):
    """Its package wants ray when imported; its kernels do not."""
    inner = tmp_path / "verl" / "utils" / "kernel"
    inner.mkdir(parents=True)
    for folder in (tmp_path / "verl", tmp_path / "verl" / "utils"):
        (folder / "__init__.py").write_text("import ray_that_is_not_there")
    (inner / "__init__.py").write_text("")
    (inner / "linear_cross_entropy.py").write_text("linear_cross_entropy = 7")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("verl", "verl.utils", "verl.utils.kernel", "verl.utils.kernel.linear_cross_entropy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        assert needs.load(needs.VERL).linear_cross_entropy == 7
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "verl"]:
            del sys.modules[name]


def test_wheels_travel(tmp_path):
    """A folder of wheels goes onto the path of the suite and of its children, and away again; one without wheels is one line."""
    pins = {line.split("==")[0] for line in needs.PINS.read_text().splitlines() if line and not line.startswith("#")}
    assert {"megatron-core", "pydantic", "pydantic-core", "liger-kernel", "trl", "verl"} <= pins
    done = suite("--dry-run", "--wheels", str(tmp_path))
    assert done.returncode == 2 and f"--wheels {tmp_path}: expected a folder of .whl files, see requirements-gpu-suite.txt" in done.stderr
    name = "carried_along-1.0"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_along.py", "here = True")
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    site = needs.install(tmp_path)
    try:
        assert (site / "carried_along.py").read_text() == "here = True"
    finally:
        shutil.rmtree(site)


def test_room_for_a_model(tmp_path, monkeypatch):
    free = {str(tmp_path): 3e9, "/": 9e9}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    assert training.room(2_000_000_000, tuple(free)) == str(tmp_path) and training.room(2_800_000_000, tuple(free)) == "/"
    with pytest.raises(OSError, match=r"a model of 9.0 GB fits nowhere: .* has 3.0 GB free, / has 9.0 GB free"):
        training.room(9_000_000_000, tuple(free))


def test_a_checkout_without_installation(tmp_path):
    """kernels/ops maps to sophiavl_fast.kernels where nothing was installed: another interpreter's view, with site-packages but not our hooks."""
    code = ("import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
            "from benchmarks import checkout; checkout.use(); import sophiavl_fast.kernels as k; from sophiavl_fast.kernels import dispatch, grpo_loss;"
            "print(k.__file__, dispatch.__name__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / "kernels" / "ops" / "__init__.py"), "sophiavl_fast.kernels.dispatch"]


def test_relative_error_never_passes_nan():
    one = torch.ones(3)
    assert relative(one, one) == 0 and relative(one * 1.01, one) == pytest.approx(0.01, rel=1e-4)
    assert relative(torch.tensor([1.0, torch.nan, 1.0]), one) == float("inf")


def test_the_picture_without_matplotlib():
    figures = {"machine": {"gpu": "X <1>"}, "parts": {"a": {"naive": {"median_ms": 2.0, "of_floor": 0.5}}, "b": {"median_ms": 1.0, "of_floor": float("nan")}}}
    assert [name for name, _ in plot.figures(figures)] == ["a/naive", "b"]
    text = plot.svg([("a/naive", 0.5, 2.0)], "on X <1>")
    assert "X &lt;1&gt;" in text and "50 %, 2 ms" in text and text.startswith("<svg")
