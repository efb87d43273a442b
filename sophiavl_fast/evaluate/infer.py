"""`infer --model DIR --image FILE "question"`: one greedy answer by plain transformers."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from sophiavl_fast import model_folder
from sophiavl_fast.data.images import open_image
from sophiavl_fast.data.processor import Processor
from sophiavl_fast.data.templates import load as load_template
from sophiavl_fast.errors import UserError
from sophiavl_fast.evaluate.transformers_engine import generate, load
from sophiavl_fast.types import Prompt


def infer(model_path: str, images: Sequence[str], question: str, *, problem_type: str = "free_form", templates: str = "sophia",
          max_new_tokens: int = 2048) -> str:
    """The model's answer, thinking included. Raises UserError for an empty question, no tokens to answer in, an unreadable model folder, image or template."""
    if not question.strip():
        raise UserError("the question is empty; write it in quotes after the options: infer --model DIR --image FILE \"What is this?\"")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    model_folder.refuse_unreadable(model_path)
    processor = Processor(model_path)
    messages = load_template(templates).messages(question, problem_type=problem_type, options=[], images=len(images))
    text, token_ids, expanded, resized, pixels, grid = processor.prepare(messages, [open_image(path) for path in images])
    prompt = Prompt(id="infer", dataset="", problem_type=problem_type, question=question, gold="", text=text, token_ids=token_ids, expanded_ids=expanded,
                    images=resized, pixel_values=pixels, image_grid_thw=grid)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(model_path, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    return processor.decode(generate(model, processor, [prompt], max_new_tokens)[0])
