"""A real Qwen2.5-VL processor of bytes (no weights needed), and datasets written on the spot."""
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from sophiavl_fast import config as tree

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
VOCABULARY = 320


def build_model_folder(folder: Path, image_processor: dict | None = None) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIAL)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 64} | (image_processor or {})))
    at = tokenizer.convert_tokens_to_ids
    Qwen2_5_VLConfig(text_config={"vocab_size": VOCABULARY, "eos_token_id": at("<|im_end|>")}, image_token_id=at("<|image_pad|>")).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [at("<|im_end|>"), at("<|endoftext|>")], "repetition_penalty": 1.5}))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return build_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def processor(model_folder):
    from sophiavl_fast.data.processor import Processor

    return Processor(model_folder)


def picture(seed: int = 0, height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def record(number: int, **changes) -> dict:
    return {"problem_id": number, "problem": f"What is {number}?", "data_type": "text", "problem_type": "numerical", "options": [], "process": "",
            "solution": f"<answer>{number}</answer>", "path": "", "data_source": "test"} | changes


class Store:
    """A folder with a registry; `add` writes a dataset and registers it."""

    def __init__(self, folder: Path):
        self.folder, self.entries = folder, {}
        self.registry = folder / "dataset_info.json"

    def add(self, name: str, rows: list, kind: str = "jsonl", **entry) -> str:
        path = self.folder / f"{name}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
        elif kind == "json":
            path.write_text(json.dumps(rows))
        elif kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
        self.entries[name] = {"file_path": path.name, "image_base_path": "."} | entry
        self.registry.write_text(json.dumps(self.entries))
        return name

    def image(self, name: str, image: Image.Image | None = None) -> str:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (image or picture()).save(self.folder / name)
        return name

    def config(self, train, **data) -> tree.Config:
        return tree.build({"run": {"seed": 7}, "data": {"registry": str(self.registry), "train": train, "templates": "plain", **data}})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)
