"""Wrong arguments: a ValueError that names the argument, its value and what was expected."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from sophiavl_fast.kernels import grpo_loss, linear_logprob, logits_logprob, trust_advantage

HIDDEN, WEIGHT, TARGET = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, -100, 2])
LOGPROB, BOUNDS = torch.zeros(5), torch.tensor([0, 2, 5])
OUTCOME, GROUPS = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 3])

LINEAR = [
    ({"hidden": torch.randn(4)}, r"hidden = a tensor of shape \[4\]: expected shape \[T, H\]"),
    ({"hidden": torch.zeros(4, 3, dtype=torch.int64)}, "hidden = torch.int64"),
    ({"hidden": torch.randn(4, 0), "weight": torch.randn(7, 0)}, r"hidden = a tensor of shape \[4, 0\]: expected H of at least 1"),
    ({"weight": torch.randn(7, 2)}, r"weight = a tensor of shape \[7, 2\]: expected shape \[V/tp, 3\]"),
    ({"weight": WEIGHT.bfloat16()}, "weight = torch.bfloat16: expected torch.float32"),
    ({"target": torch.zeros(4)}, "target = torch.float32"),
    ({"target": torch.zeros(3, dtype=torch.int64)}, r"target = a tensor of shape \[3\]: expected shape \[4\]"),
    ({"target": torch.tensor([0, 7, 0, 0])}, r"target = \[7\]: expected ids in \[0, 7\), or -100"),
    ({"target": torch.tensor([0, -1, 0, 0])}, r"target = \[-1\]"),
    ({"target": torch.tensor([0, 5, 0, 0]), "vocab_size": 5}, r"target = \[5\]"),
    ({"vocab_size": 8}, r"vocab_size = 8: expected 1 to 7"),
    ({"bias": torch.zeros(6)}, "bias = a tensor of shape"),
    ({"main_grad": torch.zeros(7, 3, dtype=torch.bfloat16)}, "main_grad = torch.bfloat16"),
    ({"active": torch.tensor([4])}, r"active = \[4\]: expected rows in \[0, 4\)"),
    ({"active": torch.tensor([1, 2, 1])}, r"active = \[1, 2, 1\]: expected rows in \[0, 4\), each once"),
    ({"vocab_size": 4.0}, "vocab_size = 4.0: expected an int, or None"),
    ({"temperature": 0.0}, "temperature = 0.0: expected a finite value of at least 1e-30 and at most 1e\\+30"),
    ({"temperature": 1e31}, "temperature = 1e\\+31: expected a finite value of at least 1e-30 and at most 1e\\+30"),
    ({"temperature": 1e-31}, "temperature = 1e-31: expected a finite value of at least 1e-30"),
    ({"temperature": float("inf")}, "temperature = inf"),
    ({"temperature": None}, "temperature = None: expected a float or a 0-d tensor"),
    ({"temperature": torch.ones(2)}, "temperature = a tensor of shape"),
    ({"chunk": 0}, "chunk = 0"),
    ({"target": TARGET.to("meta")}, "target = a tensor on meta: expected device cpu"),
    ({"hidden": None}, "hidden = NoneType: expected a tensor"),
    ({"weight": None}, "weight = NoneType: expected a tensor"),
    ({"target": [0, 6, -100, 2]}, "target = list: expected a tensor"),
    ({"hidden": HIDDEN.to_sparse()}, "hidden = a tensor of layout torch.sparse_coo: expected a dense one"),
    ({"temperature": 10 ** 400}, "temperature = 1000.*: expected a finite value of at least 1e-30"),
    ({"group": "x"}, "group = 'x': expected a ProcessGroup, or None"),
    ({"chunk": 2.5}, "chunk = 2.5: expected a whole number of at least 1"),
    ({"chunk": True}, "chunk = True"),
    ({"entropy": "no"}, "entropy = 'no': expected True or False"),
    ({"debug": 1}, "debug = 1: expected True or False"),
    ({"vocab_size": True}, "vocab_size = True: expected an int, or None"),
    ({"vocab_size": np.int64(5)}, r"vocab_size = np.int64\(5\): expected an int, or None"),
    ({"temperature": True}, "temperature = True: expected a float or a 0-d tensor"),
    ({"temperature": 1j}, "temperature = 1j: expected a float or a 0-d tensor"),
    ({"temperature": torch.tensor(1j)}, "temperature = torch.complex64: expected torch.float32 or"),
    ({"temperature": torch.tensor(True)}, "temperature = torch.bool: expected torch.float32 or"),
    ({"temperature": torch.tensor(-1.0)}, "temperature = -1.0: expected a finite value of at least 1e-30"),
    ({"backend": None}, r"backend = None: expected auto \| triton \| cpu \| reference"),
]
GRPO = [
    ({"logprob": LOGPROB.bfloat16()}, "logprob = torch.bfloat16"),
    ({"advantage": torch.zeros(4)}, r"advantage = a tensor of shape \[4\]: expected shape \[2\], one a response, or \[5\]"),
    ({"cu_seqlens": torch.tensor([0, 2, 4])}, r"cu_seqlens\[-1\] = 4: expected 5"),
    ({"cu_seqlens": torch.tensor([0, 6, 5])}, r"cu_seqlens = \[0, 6, 5\]: expected boundaries that never fall"),
    ({"cu_seqlens": torch.tensor([1, 2, 5])}, r"cu_seqlens\[0\] = 1"),
    ({"mask": torch.ones(5)}, "mask = torch.float32: expected torch.bool"),
    ({"old_logprob": torch.zeros(4)}, "old_logprob = a tensor of shape"),
    ({"mismatch_mask": torch.ones(3, dtype=torch.bool)}, "mismatch_mask = a tensor of shape"),
    ({"variant": "reinforce"}, r"variant = 'reinforce': expected ppo \| cispo"),
    ({"ratio": "word"}, "ratio = 'word'"),
    ({"aggregate": "mean"}, "aggregate = 'mean'"),
    ({"kl": "k4"}, "kl = 'k4'"),
    ({"aggregate": "constant"}, "max_length = None: expected a length with aggregate='constant'"),
    ({"max_length": 5.0}, "max_length = 5.0"),
    ({"dual_clip": 0.5}, "dual_clip = 0.5: expected None or a value above 1"),
    ({"dual_clip": 2.0, "variant": "cispo"}, "dual_clip = 2.0: expected None with variant='cispo'"),
    ({"kl_coef": 0.1}, "ref_logprob = None"),
    ({"entropy_coef": 0.1}, "entropy = None"),
    ({"tis_cap": 2.0}, "rollout_logprob = None"),
    ({"denominator": 0}, "denominator = 0"),
    ({"clip_low": -0.1}, "clip_low = -0.1"),
    ({"clip_low": None}, "clip_low = None: expected a float or a 0-d tensor"),
    ({"kl_coef": "0.1"}, "kl_coef = '0.1'"),
    ({"denominator": "x"}, "denominator = 'x': expected a float or a 0-d tensor, or None"),
    ({"denominator": torch.ones(2)}, "denominator = a tensor of shape"),
    ({"logprob": None}, "logprob = NoneType: expected a tensor"),
    ({"advantage": 1.0}, "advantage = float: expected a tensor"),
    ({"old_logprob": LOGPROB.bfloat16()}, "old_logprob = torch.bfloat16: expected torch.float32$"),
    ({"ref_logprob": LOGPROB.half(), "logprob": LOGPROB.double()}, "ref_logprob = torch.float16: expected torch.float32 or torch.float64$"),
    ({"variant": None}, r"variant = None: expected ppo \| cispo"),
    ({"ratio": ["token"]}, r"ratio = \['token'\]: expected token \| sequence"),
    ({"debug": "no"}, "debug = 'no': expected True or False"),
    ({"backend": 3}, r"backend = 3: expected auto \| triton"),
    ({"kl_coef": True}, "kl_coef = True: expected a float or a 0-d tensor"),
    ({"kl_coef": torch.tensor(True)}, "kl_coef = torch.bool"),
    ({"clip_low": torch.tensor(-0.1)}, "clip_low = -0.1.*: expected a value of at least 0"),
    ({"clip_high": torch.tensor(torch.nan)}, "clip_high = nan: expected a value of at least 0"),
    ({"dual_clip": torch.tensor(1.0)}, "dual_clip = 1.0: expected None or a value above 1"),
    ({"pre_clip": torch.tensor(0)}, "pre_clip = 0: expected None or a value above 0"),
    ({"kl_coef": torch.tensor(torch.inf), "ref_logprob": LOGPROB}, "kl_coef = inf: expected a finite value of at least 0"),
    ({"entropy_coef": float("inf"), "entropy": LOGPROB}, "entropy_coef = inf: expected a finite value of at least 0"),
    ({"tis_cap": torch.tensor(-2.0), "rollout_logprob": LOGPROB}, "tis_cap = -2.0: expected None or a value above 0"),
    ({"denominator": torch.tensor(0)}, "denominator = 0: expected None or a finite value above 0"),
    ({"denominator": float("inf")}, "denominator = inf: expected None or a finite value above 0"),
    ({"denominator": torch.tensor(torch.inf)}, "denominator = inf"),
    ({"max_length": float("inf"), "aggregate": "constant"}, "max_length = inf: expected None or a finite value above 0"),
]
TRUST = [
    ({"outcome": torch.tensor([1, 0, 1])}, "outcome = torch.int64"),
    ({"outcome": torch.tensor([1.0, torch.nan, 0.0])}, r"outcome = .*: expected finite values"),
    ({"thinking": torch.zeros(2)}, r"thinking = a tensor of shape \[2\]"),
    ({"cu_groups": torch.tensor([0, 2])}, r"cu_groups\[-1\] = 2: expected 3"),
    ({"mode": "trust"}, r"mode = 'trust': expected paper \| repo \| variance \| off"),
    ({"mode": "variance"}, r"thinking = 1 score\(s\) a response"),
    ({"thinking": torch.zeros(3, 0)}, r"thinking = 0 score\(s\) a response"),
    ({"uniform": "drop"}, "uniform = 'drop'"),
    ({"normalize": "max"}, "normalize = 'max'"),
    ({"quorum": 0.0}, "quorum = 0.0"),
    ({"sigma_filter": 3.0}, "sigma_filter = 3.0: expected None with normalize='std'"),
    ({"eps": -1.0}, "eps = -1.0"),
    ({"thinking": None}, "thinking = NoneType: expected a tensor"),
    ({"thinking": torch.tensor([0.0, torch.inf, 1.0])}, r"thinking = .*: expected scores in \[0, 1\], or NaN"),
    ({"alpha": torch.ones(3)}, r"alpha = a tensor of shape \[3\]: expected shape \[\]"),
    ({"anneal": torch.tensor(True)}, "anneal = torch.bool"),
    ({"alpha": float("nan")}, "alpha = nan: expected a finite value"),
    ({"threshold": torch.tensor(torch.inf)}, "threshold = inf: expected a finite value"),
    ({"normalize": "batch", "sigma_filter": -1.0}, "sigma_filter = -1.0: expected None or a value above 0"),
    ({"normalize": "batch", "sigma_filter": "3"}, "sigma_filter = '3': expected a float or a 0-d tensor, or None"),
    ({"outcome": None}, "outcome = NoneType: expected a tensor"),
    ({"outcome": torch.zeros(())}, r"outcome = a tensor of shape \[\]: expected shape \[B\]"),
    ({"thinking": torch.tensor([0.0, 1.5, torch.nan])}, r"thinking = \[1.5\]: expected scores in \[0, 1\], or NaN"),
    ({"thinking": torch.tensor([[0.0, 1.0], [0.5, -0.25], [1.0, 1.0]])}, r"thinking = \[-0.25\]: expected scores in \[0, 1\]"),
    ({"quorum": "1"}, "quorum = '1': expected a float$"),
    ({"quorum": True}, "quorum = True: expected a float$"),
    ({"quorum": 1.5}, r"quorum = 1.5: expected a share in \(0, 1\]"),
    ({"quorum": torch.tensor(0.5)}, r"quorum = tensor\(0.5000\): expected a float$"),
    ({"eps": "small"}, "eps = 'small': expected a float$"),
    ({"eps": float("inf")}, "eps = inf: expected a finite value of at least 0"),
    ({"alpha": "0.3"}, "alpha = '0.3': expected a float or a 0-d tensor$"),
    ({"anneal": None}, "anneal = None: expected a float or a 0-d tensor$"),
    ({"mode": 1}, r"mode = 1: expected paper \| repo"),
    ({"debug": None}, "debug = None: expected True or False"),
]


def ids(cases):
    return [message[:30] for _, message in cases]


@pytest.mark.parametrize(("change", "message"), LINEAR, ids=ids(LINEAR))
def test_linear_logprob(change, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


def test_logits_logprob():
    with pytest.raises(ValueError, match=r"logits = a tensor of shape \[3\]: expected shape \[T, V/tp\]"):
        logits_logprob(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target = \[3\]"):
        logits_logprob(torch.zeros(1, 3), torch.tensor([3]))
    for change, message in ({"logits": None}, "logits = NoneType: expected a tensor"), ({"inplace": "yes"}, "inplace = 'yes': expected True or False"):
        with pytest.raises(ValueError, match=message):
            logits_logprob(**{"logits": torch.zeros(1, 3), "target": torch.tensor([0])} | change)


@pytest.mark.parametrize(("change", "message"), GRPO, ids=ids(GRPO))
def test_grpo_loss(change, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**({"logprob": LOGPROB, "advantage": torch.zeros(2), "cu_seqlens": BOUNDS} | change))


@pytest.mark.parametrize(("change", "message"), TRUST, ids=ids(TRUST))
def test_trust_advantage(change, message):
    with pytest.raises(ValueError, match=message):
        trust_advantage(**({"outcome": OUTCOME, "thinking": torch.zeros(3), "cu_groups": GROUPS} | change))


def test_what_is_legal_passes():
    """Infinite clips and caps never act; a score may lie outside by a rounding; numbers may be integers; nothing is known of an empty batch."""
    inf = float("inf")
    loss, _ = grpo_loss(LOGPROB, torch.ones(2), BOUNDS, clip_low=inf, clip_high=torch.tensor(inf), dual_clip=inf, pre_clip=inf, denominator=5,
                        rollout_logprob=LOGPROB, tis_cap=inf, kl_coef=torch.tensor(0.5, dtype=torch.bfloat16), ref_logprob=LOGPROB)
    assert loss == -1
    scored = trust_advantage(OUTCOME, torch.tensor([1 + 1e-7, 0.0, torch.nan]), GROUPS, alpha=1, quorum=1)
    assert not scored.used.any()
    linear_logprob(HIDDEN, WEIGHT, TARGET, temperature=torch.tensor(2), vocab_size=7, chunk=1)


def test_wrong_backends_are_errors(monkeypatch):
    run = lambda **kw: logits_logprob(torch.zeros(1, 3), torch.tensor([0]), **kw)
    with pytest.raises(ValueError, match="backend = 'cuda'"):
        run(backend="cuda")
    monkeypatch.setenv("SOPHIAVL_KERNELS", "fastest")
    with pytest.raises(ValueError, match=r"SOPHIAVL_KERNELS = 'fastest': expected auto \| triton \| cpu \| reference"):
        run()
    assert run(backend="reference")[0].shape == (1,)  # the argument goes before the environment


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_an_absent_backend_is_no_fallback(backend, monkeypatch):
    from sophiavl_fast.kernels import dispatch

    monkeypatch.setitem(dispatch.MODULES, "logits_logprob", {"reference": "reference_logprob"})
    with pytest.raises(ValueError, match=f"backend = '{backend}': logits_logprob has no such backend in this build; available: reference"):
        logits_logprob(torch.zeros(1, 3), torch.tensor([0]), backend=backend)


def test_the_folder_kernels_is_no_package():
    """transformers probes for a top-level package of that name and would import ours."""
    import importlib.util
    from pathlib import Path

    import sophiavl_fast.kernels as ours

    assert Path(ours.__file__).parent.name == "ops"
    assert not (Path(ours.__file__).parents[1] / "__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or "ops" not in str(found.origin)
