"""The GPU suite's correctness part without a GPU: each scene catches its mistake, all mistakes are listed, the sanitizer leaves no process."""
from __future__ import annotations

import time

import psutil
import pytest
import torch
from sophiavl_fast.kernels import reference_logprob, reference_trust

from benchmarks.gpu import correct
from benchmarks.gpu.clock import Bench


def wrong_trust(right):
    calls = iter(range(10 ** 6))

    def wrong(*arguments, **options):
        """Every second time the rewards are 1e-5 too large."""
        advantage, reward, *rest = right(*arguments, **options)
        return advantage, reward * (1.00001 if next(calls) % 2 else 1), *rest

    return wrong


def test_wrong_kernels_fail_the_suite(monkeypatch):
    """A backend that is off by a little more than rounding does not pass for correct, and every scene says so, not the first alone."""
    monkeypatch.setattr(reference_trust, "forward", wrong_trust(reference_trust.forward))
    checks = correct.Checks(Bench(torch.device("cpu"), True, backend="reference"))
    correct.trust(checks.bench, checks)
    assert len(checks.failures) == 16 and checks.failures[0].startswith("trust_advantage paper std score reward: relative error")
    assert checks.worst["reward"] > 5e-6 and checks.worst["advantage"] == 0


def spoil(change):
    """reference_logprob.gradients whose call in less than fp64 has its arguments or results changed."""
    right = reference_logprob.gradients

    def gradients(hidden, weight, bias, *rest, **options):
        if hidden.dtype == torch.float64:
            return right(hidden, weight, bias, *rest, **options)
        return change(right, hidden, weight, bias, *rest, **options)

    return gradients


def no_bias(right, hidden, weight, bias, *rest, **options):
    return right(hidden, weight, None if bias is None else bias.clamp(min=-3), *rest, **options)


def no_bias_gradient(right, *arguments, **options):
    d_hidden, d_weight, d_bias = right(*arguments, **options)
    return d_hidden, d_weight, None if d_bias is None else 0.99 * d_bias


def overwritten(right, *arguments, main_grad=None, **options):
    if main_grad is not None:
        main_grad.zero_()
    return right(*arguments, main_grad=main_grad, **options)


def fixed_temperature(right, *arguments, temperature=1.0, **options):
    return right(*arguments, temperature=temperature * 1.01 if isinstance(temperature, torch.Tensor) else temperature, **options)


def no_place(right, *arguments, inplace=False, **options):
    found = right(*arguments, inplace=inplace, **options)
    if inplace:
        arguments[0].mul_(1.01)
    return found


def later_rows(right, *arguments, active=None, **options):
    return right(*arguments, active=None if active is None else active[:-1], **options)


def leaking(right, hidden, *rest, **options):
    d_hidden, *others = right(hidden, *rest, **options)
    return d_hidden if d_hidden is None or options.get("inplace") else d_hidden + 0 * hidden, *others


@pytest.mark.parametrize("change,seen", [
    (no_bias, "linear_logprob bans"), (no_bias_gradient, "linear_logprob bias"), (overwritten, "linear_logprob main_grad"),
    (fixed_temperature, "linear_logprob temperature"), (no_place, "logits_logprob in place"), (later_rows, "linear_logprob active"),
    (leaking, "linear_logprob nan"), (leaking, "logits_logprob masked")])
def test_each_scene_catches_its_mistake(monkeypatch, change, seen):
    monkeypatch.setattr(reference_logprob, "gradients", spoil(change))
    checks = correct.Checks(Bench(torch.device("cpu"), True, backend="reference"))
    with correct.poisoned():
        (correct.linear if seen.startswith("linear") else correct.logits)(checks.bench, checks, False)
    hit = {line.split(":")[0].split(" [")[0] for line in checks.failures}
    assert any(line.startswith(seen) for line in hit) and not any(line.startswith(("linear_logprob plain", "logits_logprob plain")) for line in hit), hit


def test_a_scene_that_raises_is_one_failure(monkeypatch):
    def breaks(*arguments, **options):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(reference_logprob, "gradients", breaks)
    found = correct.run(Bench(torch.device("cpu"), True, backend="reference"))
    assert "linear_logprob plain [5, 16, 37]: RuntimeError: no such tile" in found["failures"] and "wrong: linear_logprob" in found["error"]
    assert found["grpo_loss"]["loss"] < 2e-5 and found["trust_advantage"]["advantage"] == 0  # those after it ran


def test_correct_here_and_its_memory_is_poisoned():
    found = correct.run(Bench(torch.device("cpu"), True, backend="reference"))
    assert "error" not in found and not torch.are_deterministic_algorithms_enabled()
    assert {"d_bias float32", "main_grad float32", "d_hidden float16"} <= found["linear_logprob"].keys() and "d_entropy" in found["grpo_loss"]
    with correct.poisoned():
        assert torch.empty(3).isnan().all()


TOOL = """#!/usr/bin/env bash
echo "$@ caching=$PYTORCH_NO_CUDA_MEMORY_CACHING" >> calls
if [ $2 = racecheck ]; then sleep 1000 & echo $! > pid; wait; fi
echo "ERROR SUMMARY: 0 errors"
"""


def test_the_sanitizer_is_ended_with_its_children(tmp_path, monkeypatch):
    """A stand-in tool: the first kind passes, the second hangs in a child of its own."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setattr(correct, "ROOT", tmp_path)
    found = correct.sanitize(Bench(torch.device("cpu"), True, deadline=time.monotonic() + 5), str(tool), lambda: ["program"])
    assert found["memcheck"] == ["ERROR SUMMARY: 0 errors"] and found["error"].startswith("compute-sanitizer racecheck: not done after")
    assert (tmp_path / "calls").read_text().splitlines()[0] == "--tool memcheck --error-exitcode 9 program caching=1"
    child, until = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:    # killed; whoever adopted it may take a moment
        assert time.monotonic() < until
        time.sleep(0.05)
