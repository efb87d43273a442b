"""One policy in many layouts, measured against Hugging Face: jobs, the torchrun that does them, and their numbers."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import layout_worker
import torch
import zoo
from safetensors.torch import load_file

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}), "TP2": (2, {"tensor": 2}), "TP2+SP": (2, {"tensor": 2, "sequence": True}), "PP2": (2, {"pipeline": 2}),
    "PP2 uneven": (2, {"pipeline": 2, "stages": [3, 1]}), "DP2": (2, {}),
    "CP2": (2, {"context": 2}), "CP2xTP2+SP": (4, {"context": 2, "tensor": 2, "sequence": True}), "CP2xPP2": (4, {"context": 2, "pipeline": 2}),
    "DP2xCP2": (4, {"context": 2}), "TP2xPP2+SP": (4, {"tensor": 2, "pipeline": 2, "sequence": True}), "DP2xTP2": (4, {"tensor": 2}),
}


@dataclass(frozen=True)
class Job:
    """broken: a reduction taken out on purpose, see layout_worker.BREAKS."""

    kind: str
    layout: str
    tied: bool = False
    share: bool = True
    broken: str = ""

    @property
    def name(self) -> str:
        parts = [self.kind, self.layout.replace(" ", "_"), "tied" if self.tied else "untied", "" if self.share else "plain", self.broken]
        return "-".join(p for p in parts if p)

    def sections(self) -> dict[str, Any]:
        return {"parallel": LAYOUTS[self.layout][1], "policy": {"tokens_per_row": 60, "share_prompt": self.share},
                "optim": {"lr": 1e-3, "clip_grad": 0.0, "weight_decay": 0.1}}


FULL = [
    *(Job(kind, layout) for kind in zoo.FAMILIES for layout in LAYOUTS if layout != "TP1"),
    *(Job(kind, layout, tied=True) for kind in zoo.FAMILIES for layout in ("TP2+SP", "PP2", "PP2 uneven", "CP2")),
    *(Job(kind, layout, share=False) for kind in zoo.FAMILIES for layout in ("TP2+SP", "PP2", "DP2", "CP2")),
    *(Job(kind, "TP2xPP2+SP", tied=True) for kind in zoo.FAMILIES),
    *(Job(kind, layout) for kind in ("internvl2_5", "internvl3_5") for layout in ("TP2+SP", "PP2")),
]


@dataclass(frozen=True)
class Measured:
    """logprob: largest absolute difference; gradient: worst relative difference of a parameter's gradient; export: bitwise the
    folder it came from; update: new minus old weights, relative to the single process (NaN there)."""

    logprob: float
    gradient: float
    export: bool
    update: float


@cache
def folder(root: Path, kind: str, tied: bool) -> Path:
    return zoo.build(kind, root / f"{kind}-{tied}", tied=tied)


def run(jobs: list[Job], root: Path) -> None:
    """All jobs of one number of processes, one after the other, in one torchrun (in this process where it is one)."""
    [processes] = {LAYOUTS[j.layout][0] for j in jobs}
    todo = [{"folder": str(folder(root, j.kind, j.tied)), "out": str(root / j.name), "sections": j.sections(), "broken": j.broken} for j in jobs]
    if processes == 1:
        for job in todo:
            layout_worker.do(**job)
        return
    (root / f"jobs-{processes}.json").write_text(json.dumps(todo))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", layout_worker.__file__,
               str(root / f"jobs-{processes}.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@cache
def expected(path: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs [T] and gradients by published name, by Hugging Face, one row a response."""
    model, groups = zoo.hf(path), zoo.groups(zoo.kind_of(path))
    scores = [s for g in groups for s in zoo.hf_scores(model, g, temperature=layout_worker.TEMPERATURE, banned=layout_worker.BANNED)]
    logprob, entropy = (torch.cat(x) for x in zip(*scores))
    weight = layout_worker.advantages(groups).repeat_interleave(torch.tensor([len(lp) for lp, _ in scores]))
    layout_worker.objective(weight, logprob, entropy, torch.tensor(float(len(logprob)))).backward()
    named = {zoo.published(n, model.config.model_type): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logprob.detach(), named


def measure(job: Job, root: Path) -> Measured:
    """What `run` left, compared."""
    out, path = root / job.name, folder(root, job.kind, job.tied)
    logprob, gradients = expected(path)
    sizes = [sum(len(r.token_ids) for r in g.responses) for g in zoo.groups(job.kind)]
    replicas = len(list(out.glob("replica-*.safetensors")))
    worst = 0.0
    for key in ("logprobs", "one_row"):
        parts = [load_file(out / f"replica-{i}.safetensors")[key].split(sizes[i::replicas]) for i in range(replicas)]
        found = torch.cat([parts[g % replicas][g // replicas] for g in range(len(sizes))])
        worst = max(worst, (found - logprob).abs().max().item())
    found = load_file(out / "gradients.safetensors")
    assert set(found) == set(gradients), set(found) ^ set(gradients)
    floor = 1e-6 * torch.stack([g.norm() for g in gradients.values()]).norm()  # a key bias without rope has no gradient but rounding
    gradient = max(((found[n] - g).norm() / g.norm().clamp_min(floor)).item() for n, g in gradients.items())
    source, exported = load_file(path / "model.safetensors"), load_file(out / "before/model.safetensors")
    bitwise = set(source) == set(exported) and all(torch.equal(t, exported[n]) for n, t in source.items())
    return Measured(worst, gradient, bitwise, _update(job, root, source) if job.layout != "TP1" else float("nan"))


def _update(job: Job, root: Path, old: dict[str, torch.Tensor]) -> float:
    """Adam turns rounding noise in vanishing gradients into full steps (a key bias has none): such parameters are left out."""
    alone = load_file(root / Job(job.kind, "TP1", job.tied).name / "after/model.safetensors")
    here = load_file(root / job.name / "after/model.safetensors")
    names = [n for n in old if not n.endswith("k_proj.bias")]
    change = lambda new: torch.cat([(new[n] - old[n]).flatten() for n in names])
    return ((change(here) - change(alone)).norm() / change(alone).norm()).item()
