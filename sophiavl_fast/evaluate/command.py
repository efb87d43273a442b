"""`evaluate --model DIR --data NAME --out FILE`: greedy answers of a Hugging Face folder, judged one by one."""
from __future__ import annotations

import json
import math
import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from sophiavl_fast import config as tree
from sophiavl_fast import config_ranges, model_folder
from sophiavl_fast.data import open_eval
from sophiavl_fast.data.limits import Limits
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.errors import UserError
from sophiavl_fast.evaluate import accuracy, transformers_engine
from sophiavl_fast.evaluate.out import refuse_unwritable
from sophiavl_fast.evaluate.records import refuse_unusable
from sophiavl_fast.monitor import Progress, summary
from sophiavl_fast.rollout import open_rollout
from sophiavl_fast.types import MAX_IMAGES, Group, Prompt


def evaluate(model: str, data: str, registry: str, out: Path, *, engine: str = "vllm", templates: str = "sophia",
             max_new_tokens: int = 1024, dtype: str = "bfloat16", limit: int | None = None) -> int:
    """Answer `data` greedily with `model`, write metrics and every answer to `out` as JSON; returns the exit code.

    Raises UserError: a number out of range, an unreadable model or dataset, nothing to answer, no place to write.
    """
    refuse_unwritable(out)
    config = tree.build({"model": {"path": model, "dtype": dtype}, "data": {"registry": registry, "eval": data, "templates": templates},
                         "rollout": {"engine": "inline", "max_new_tokens": max_new_tokens}, "eval": {"limit": limit}}, "evaluate")
    config_ranges.check(config.model_dump())
    model_folder.refuse_unreadable(model)
    processor = Processor(model)
    with Progress(config, "evaluate", steps=0) as progress:
        with progress.phase("data"):
            prompts = open_eval(config, processor, limits=_limits(config, engine))
        if not prompts:
            raise UserError(f"dataset '{data}' holds no record to answer; `data check {data}` tells what is in it")
        with progress.phase(engine):
            answer = transformers_engine.answer if engine == "transformers" else _vllm
            groups = answer(config, processor, prompts)
        judged = accuracy.judge(groups, config.rewards)
    found = accuracy.metrics(judged)
    written = {key: None if math.isnan(value) else value for key, value in found.items()}
    _write(out, {"model": model, "data": data, "engine": engine, **written, "answers": [asdict(j) for j in judged]})
    summary.print_eval(found)
    return 0


def _limits(config: tree.Config, engine: str) -> Limits:
    """What is asked of a record before the model loads; only the engine has a limit of images."""
    return Limits(images=MAX_IMAGES if engine == "vllm" else None, sequence=model_folder.longest(config.model.path),
                  new_tokens=config.rollout.max_new_tokens, advice="the model itself (max_position_embeddings); lower --max-new-tokens",
                  check=refuse_unusable)


def _vllm(config: tree.Config, processor: Processor, prompts: list[Prompt]) -> list[Group]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rollout = open_rollout(config, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids, vocab_size=processor.vocab_size,
                               decode=processor.decode, device=device, run_dir=folder)
        stack.callback(rollout.close)
        return rollout.generate(prompts, n=1, step=0, seed=0, temperature=0.0, max_new_tokens=config.rollout.max_new_tokens)


def _write(path: Path, content: dict) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False))
    os.replace(partial, path)
