"""One Hugging Face processor for both engines: chat text, token ids, image pixels.

The image that vLLM gets is the one resized here. Resizing is idempotent, so vLLM's own processor turns it into the same
pixels that the trainer computes, and nothing larger than needed travels to the engine. Families that cut an image into
tiles (InternVL) send it as it is; their tiles become patches here, so that pixels are [N, C] in every family.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sophiavl_fast import model_folder
from sophiavl_fast.errors import UserError

Prepared = tuple[str, list[int], list[int], list[Image.Image], Tensor | None, Tensor | None]


class Processor:
    """Tokenizer and image processor of a model folder; local files only, no code from the folder is run.

    tokenizer, image_token_id, vocab_size: the model's. stop_ids: every end-of-text id, the tokenizer's first.
    banned_ids: sorted ids that are never sampled: special tokens that do not end a text, and ids without a token.
    Raises UserError for a folder that is missing or holds no vision-language processor.
    """

    def __init__(self, model_path: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        path = Path(model_path)
        model_folder.refuse_missing(path)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's threads are the parallelism
        from transformers import AutoProcessor

        config = model_folder.open_config(path)
        if not hasattr(config.get_text_config(), "vocab_size"):
            raise UserError(f"model.path: '{path}': config.json cannot be used: its text_config is not one that a model_type '{config.model_type}' has; "
                            "name the folder of a vision-language model")
        try:
            self._hf = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            self.tokenizer, self._images = self._hf.tokenizer, self._hf.image_processor
        except Exception as error:  # also classes of transformers' and tokenizers' own
            raise UserError(f"model.path: '{path}' has no usable vision-language processor: {' '.join(str(error).split())}") from None
        self.path = path
        self._chat_template = self._hf.chat_template or self.tokenizer.chat_template
        if not self._chat_template:
            raise UserError(f"model.path: '{path}' has no chat template")
        self._limit_pixels(min_pixels, max_pixels)
        self._patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
        self.vocab_size: int = config.get_text_config().vocab_size
        self.image_token_id: int = self._hf.image_token_id
        if (wanted := getattr(config, "image_token_id", self.image_token_id)) != self.image_token_id:
            raise UserError(f"model.path: '{path}': the image token is {self.image_token_id} of the tokenizer, {wanted} of config.json; "
                            f"{'tokenizer.json is not there' if not (path / 'tokenizer.json').is_file() else 'they are of different models'}: "
                            "download the whole Hugging Face folder")
        self.stop_ids = _stop_ids(self.tokenizer.eos_token_id, config, path)
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special} | set(self.tokenizer.all_special_ids)
        known = set(self.tokenizer.get_vocab().values())
        unused = set(range(self.vocab_size)) - known
        self.banned_ids = sorted((special | unused) - set(self.stop_ids))
        names = sorted((t for i in special if (t := self.tokenizer.convert_ids_to_tokens(i))), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, names)))

    def _limit_pixels(self, low: int | None, high: int | None) -> None:
        if low is None and high is None:
            return
        kept = self._images.size
        if dict(kept).get("shortest_edge") is None:
            raise UserError(f"model.min_pixels/max_pixels: {type(self._images).__name__} of '{self.path}' has no pixel limits; "
                            "where it cuts tiles, set min_patches and max_patches in preprocessor_config.json")
        low, high = low or kept["shortest_edge"], high or kept["longest_edge"]
        if low > high:
            raise UserError(f"model.min_pixels = {low} is greater than model.max_pixels = {high}")
        self._images.size = type(kept)(shortest_edge=low, longest_edge=high)

    def prepare(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> Prepared:
        """Chat messages and their RGB images -> (text, token_ids, expanded_ids, resized images, pixel_values, grid).

        text and token_ids hold one placeholder an image, expanded_ids one image token a feature; pixel_values is [N, C] fp32 and
        grid [I, 3] int64: patches in time, height, width, or (tiles, patches down, patches across) of each image; both None without
        images. Raises UserError: special tokens in the text, an image no processor takes.
        """
        text, token_ids = self.tokenize(messages, len(images))
        if not images:
            return text, token_ids, list(token_ids), [], None, None
        resized = [self._resized(image) for image in images]
        whole = self._hf(text=[text], images=resized, add_special_tokens=False, return_tensors="pt")
        pixels, grid = whole["pixel_values"], whole.get("image_grid_thw")
        if grid is None:
            pixels, grid = self._patches(pixels, [(image.height, image.width) for image in resized])
        return text, token_ids, whole["input_ids"][0].tolist(), resized, pixels, grid

    def tokenize(self, messages: Sequence[dict[str, Any]], images: int) -> tuple[str, list[int]]:
        """The chat text and its ids, one placeholder an image. Raises UserError where user text smuggles in a special token."""
        for message in messages:
            for part in message["content"]:
                if part.get("type") == "video":
                    raise UserError(f"the {message['role']} message holds a video; only text and images are supported")
                if found := self._special_text.search(part.get("text", "")):
                    raise UserError(f"the {message['role']} text holds the special token '{found[0]}'")
        text = self.tokenizer.apply_chat_template(list(messages), chat_template=self._chat_template, tokenize=False, add_generation_prompt=True)
        ids = self._ids(text)
        if ids.count(self.image_token_id) != images:
            raise UserError(f"the chat template made {ids.count(self.image_token_id)} placeholders of {images} images")
        return text, ids

    def expanded_length(self, token_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
        """Length of expanded_ids from image sizes (height, width) alone, before any pixel is decoded. Raises UserError."""
        if not sizes:
            return len(token_ids)
        return len(token_ids) - len(sizes) + sum(self._counts(sizes, "num_image_tokens"))

    def _counts(self, sizes: Sequence[tuple[int, int]], what: str) -> list[int]:
        """num_image_tokens or num_image_patches (tiles, in families that cut them) of each image (height, width)."""
        try:
            return self._hf._get_num_multimodal_tokens(image_sizes=[list(s) for s in sizes])[what]
        except ValueError as error:
            raise UserError(f"image sizes {list(sizes)}: {error}") from None

    def _patches(self, tiles: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """tiles [M, C, H, W] of images of these sizes -> (pixels [N, C * h * w], grid [I, 3])."""
        counts = self._counts(sizes, "num_image_patches")
        if sum(counts) != len(tiles):
            raise UserError(f"'{self.path}': the image processor made {len(tiles)} tiles of {len(sizes)} images where it announced {counts}")
        height, width = self._patch if isinstance(self._patch, (list, tuple)) else (self._patch, self._patch)
        m, channels, down, across = len(tiles), tiles.shape[1], tiles.shape[2] // height, tiles.shape[3] // width
        pixels = tiles.view(m, channels, down, height, across, width).permute(0, 2, 4, 1, 3, 5).reshape(m * down * across, -1)
        return pixels, torch.tensor([[n, down, across] for n in counts])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, special tokens dropped, nothing tidied."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _resized(self, image: Image.Image) -> Image.Image:
        """As the image processor itself would resize it. Families that tile instead of resizing get the image as it is."""
        patches = getattr(self._images, "get_number_of_image_patches", None)
        if patches is None or dict(self._images.size).get("shortest_edge") is None:
            return image
        try:
            wanted = patches(image.height, image.width)
            out = self._to_size(image)
        except ValueError as error:
            raise UserError(f"an image of {image.width} x {image.height} pixels cannot be resized: {error}") from None
        if patches(out.height, out.width) != wanted:
            raise UserError(f"an image of {image.width} x {image.height} pixels fits no size between model.min_pixels and model.max_pixels")
        return out

    def _to_size(self, image: Image.Image) -> Image.Image:
        pixels = self._images.process_image(image)
        factor = self._images.patch_size * self._images.merge_size
        out = self._images.resize(pixels, size=self._images.size, resample=self._images.resample, factor=factor)
        return Image.fromarray(out.permute(1, 2, 0).contiguous().numpy())


def _stop_ids(eos: int, config: Any, path: Path) -> list[int]:
    """The tokenizer's end-of-text id first, then those of generation_config.json and config.json."""
    found: list[Any] = [eos, config.eos_token_id if hasattr(config, "eos_token_id") else None, config.get_text_config().eos_token_id]
    if (file := path / "generation_config.json").is_file():
        try:
            found.append(json.loads(file.read_text()).get("eos_token_id"))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"model.path: '{path}': generation_config.json cannot be read: {error}; download it again") from None
    flat = [i for item in found for i in (item if isinstance(item, list) else [item]) if i is not None]
    return list(dict.fromkeys(flat))
