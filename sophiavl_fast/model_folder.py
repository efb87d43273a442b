"""A model folder as it lies there: what is wrong with its config.json and its safetensors files in one line, before anything is filled in or loaded."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sophiavl_fast.errors import UserError, nearest

AGAIN = "download the whole Hugging Face folder again (git-lfs leaves pointers in place of large files: `git lfs pull`)"
FLOATS = ("F64", "F32", "BF16", "F16")  # as safetensors spells them
# What other tools leave among the weights, and what to do about it.
STRANGERS = {".lora_": "merge the adapter into its model first", "_scale": "drop what a quantisation left, or dequantise the weights first",
             **dict.fromkeys(("v_head.", "value_head.", "score."), "drop another tool's value head")}
# Fields that say how a model is stored, sampled or begun, not what it computes here (rope kinds other than the default are refused), or are compared elsewhere.
UNFELT = frozenset((
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path", "use_cache", "initializer_range",
    "initializer_factor", "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "problem_type", "bos_token_id",
    "eos_token_id", "pad_token_id", "tie_word_embeddings", "max_position_embeddings", "use_sliding_window", "sliding_window", "max_window_layers",
    "is_encoder_decoder", "chunk_size_feed_forward", "rope_type", "type", "factor", "attn_implementation", "tokenizer_class", "processor_class",
    "torchscript", "use_bfloat16", "pruned_heads"))


def refuse_missing(path: str | Path, option: str = "model.path") -> None:
    """UserError for a folder that holds no model, with the nearest that does; option: the key that names it, "" where none does."""
    folder = Path(path)
    if os.path.isfile(folder / "config.json"):
        return
    hint = nearest(str(folder), _beside(folder)) or "; name a Hugging Face model folder"
    raise UserError(f"{f'{option} = ' * bool(option)}'{folder}' is no model folder (no config.json){hint}")


def _beside(folder: Path) -> list[str]:
    """Model folders next to this one, of those that may be looked into."""
    try:
        return [str(p) for p in folder.parent.iterdir() if os.path.isfile(p / "config.json")]
    except OSError:
        return []


def read(path: str | Path, option: str = "model.path") -> dict[str, Any]:
    """config.json as it lies there. Raises UserError where it is missing, cannot be read or is no JSON object."""
    folder = Path(path)
    refuse_missing(folder, option)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{option} = '{folder}': config.json cannot be read: {error}; download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{option} = '{folder}': config.json holds {'null' if found is None else f'a {type(found).__name__}'} instead of an object; "
                        "download it again")
    return found


def longest(path: str | Path) -> int:
    """The longest sequence that config.json allows the language model; 2^30 where it names none. Raises UserError where it cannot be read."""
    found = read(path)
    text = found.get("text_config")
    parts = (text, found) if isinstance(text, dict) else (found,)
    value = next((part["max_position_embeddings"] for part in parts if part.get("max_position_embeddings") is not None), 1 << 30)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"model.path = '{path}': config.json: max_position_embeddings = {value!r}; expected a whole number of tokens, at least 1")
    return value


def open_config(path: str | Path) -> Any:
    """transformers' config of the folder; no code of the folder is run. Raises UserError, whatever it is that transformers refuses."""
    from transformers import AutoConfig

    read(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # validators raise classes of their own
        raise UserError(f"model.path = '{path}': config.json cannot be used: {' '.join(str(error).split())[:300]}") from None


def described(config: Any) -> dict[str, Any]:
    """JSON values of a transformers config by dotted name, such as text_config.rms_norm_eps; without UNFELT, dropout and what is None."""
    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if key in UNFELT or "dropout" in key or key.startswith("_") or value is None:
                continue
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(json.loads(json.dumps(config.to_dict(), default=str)), ""))


def open_model(path: str | Path, option: str = "model.path", **how: Any) -> Any:
    """AutoModelForImageTextToText of the folder on the CPU; no code of the folder is run.

    how: for from_pretrained. Raises UserError, whatever it is that transformers refuses, and where weights are missing or of other shapes than
    config.json says, which transformers would draw at random, or have no place in the model, which it would leave out.
    """
    from transformers import AutoModelForImageTextToText

    refuse_other_tensors(path, option)
    try:
        opened: Any = AutoModelForImageTextToText.from_pretrained(path, local_files_only=True, trust_remote_code=False, output_loading_info=True,
                                                                  ignore_mismatched_sizes=True, **how)
    except Exception as error:  # validators raise classes of their own
        raise UserError(f"{option} = '{path}': transformers cannot load it: {' '.join(str(error).split())[:300]}") from None
    model, found = opened
    odd = sorted(found["missing_keys"]) + sorted(str(name) for name, *_ in found["mismatched_keys"])
    if odd:
        raise UserError(f"{option} = '{path}': {len(odd)} weights are missing or of another shape than config.json says, such as '{odd[0]}'; {AGAIN}")
    return model


def refuse_partial(path: str | Path, option: str = "model.path") -> None:
    """UserError where config.json does not describe both the language model and the vision tower: defaults would be of another size."""
    found = read(path, option)
    text = isinstance(found.get("text_config"), dict) or "hidden_size" in found  # older folders hold the text model's fields at the top
    missing = [name for name, there in (("text_config", text), ("vision_config", isinstance(found.get("vision_config"), dict))) if not there]
    if missing:
        raise UserError(f"{option} = '{path}': config.json lacks {' and '.join(missing)}; download the whole Hugging Face folder")


def refuse_quantised(path: str | Path) -> None:
    """UserError where config.json names quantised weights: their codes would be trained as if they were the weights themselves."""
    if (name := _method(read(path))) is not None:
        raise UserError(f"model.path = '{path}': config.json names quantised weights (quantization_config, quant_method '{name}'), "
                        "which cannot be trained; dequantise them to bfloat16 first or name the folder they were made from")


def refuse_unreadable(path: str | Path, option: str = "model.path") -> None:
    """UserError where config.json lacks a part, a weight file is missing or cut short, weights are codes and config.json does not say of what, or are not
    the model's.

    Headers alone are read. What an engine can use is not refused: quantised weights that config.json describes.
    """
    folder = Path(path)
    refuse_partial(folder, option)
    described = _method(read(folder, option)) is not None
    for file in sorted(set(tensor_files(folder, option).values())):
        codes = [(name, entry["dtype"]) for name, entry in header(folder / file, option).items() if name.endswith(".weight") and entry["dtype"] not in FLOATS]
        if codes and not described:
            raise UserError(f"{option} = '{folder}': tensor '{codes[0][0]}' is {codes[0][1]} in {file} ({len(codes)} such in it), and config.json has no "
                            "quantization_config; dequantise the weights to bfloat16 first")
    refuse_other_tensors(folder, option)


def refuse_other_tensors(path: str | Path, option: str = "model.path") -> None:
    """UserError for tensors that the model of config.json has no place for (they would be trained past and dropped at the export) or lacks (vLLM leaves
    at random what is missing of a matrix that it fuses).

    Names alone are compared, as transformers compares them when it loads, with all that it means to leave out (buffers of older versions). A folder that it
    cannot build, or whose weights are quantised (scales and the like), is left to what loads it.
    """
    from transformers import AutoModelForImageTextToText

    folder = Path(path)
    if not ((folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()) or _method(read(folder, option)) is not None:
        return
    names = tensor_files(folder, option)
    try:
        with _on_meta():
            model = AutoModelForImageTextToText.from_config(open_config(folder), trust_remote_code=False)
    except Exception:  # validators raise classes of their own
        return
    unused, missing = map(sorted, _unexpected_and_missing(model, names))
    if unused:
        hint = next((hint for sign, hint in STRANGERS.items() if sign in unused[0]), "weights and config.json are of different models")
        raise UserError(f"{option} = '{folder}': tensor '{unused[0]}' has no place in the model of config.json ({len(unused)} such); {hint}")
    if missing:
        raise UserError(f"{option} = '{folder}': tensor '{missing[0]}' of the model of config.json is in no weight file ({len(missing)} such); {AGAIN}")


@contextmanager
def _on_meta() -> Iterator[None]:
    """Whatever transformers builds in here has shapes and no memory."""
    import torch
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        yield


def _unexpected_and_missing(model: Any, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Those of the stored names that transformers would call unexpected, by its own renaming of published names and its own exceptions, and no buffer that
    it computes anew, of which it excepts the language model's alone; and the model's tensors that none of them fills, nor a tensor that they are tied to."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, unexpected, filled = get_model_conversion_mapping(model), {}, set()
    renamings, converters = [m for m in mapping if isinstance(m, WeightRenaming)], [m for m in mapping if isinstance(m, WeightConverter)]
    wanted = model.state_dict()
    places = wanted | dict(model.named_buffers())
    for name in sorted(names):         # as transformers goes through them
        found = [p for p in (rename_source_key(name, *how, model.base_model_prefix, places)[0] for how in ((renamings, converters), ([], []))) if p in places]
        filled.update(found[:1])
        if not found:
            unexpected[name] = rename_source_key(name, renamings, converters, model.base_model_prefix, places)[0]
    copies = model.all_tied_weights_keys
    filled |= {source for copy, source in copies.items() if copy in filled} | copies.keys()
    info: Any = SimpleNamespace(missing_keys=set(wanted) - filled, unexpected_keys=set(unexpected.values()))   # all of LoadStateDictInfo that it looks at
    model._adjust_missing_and_unexpected_keys(info)
    return {name for name, place in unexpected.items() if place in info.unexpected_keys}, info.missing_keys


def tensor_files(folder: Path, option: str = "model.path") -> dict[str, str]:
    """Tensor name -> safetensors file. Raises UserError for an index that cannot be read or names a file that is not there, and for a folder of no weights."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{option} = '{folder}': no model.safetensors there; convert the weights to safetensors first")
        return dict.fromkeys(header(folder / "model.safetensors", option), "model.safetensors")
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(files.values()))
        absent = [name for name in names if not (folder / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{option} = '{folder}': {index.name} cannot be used ({type(error).__name__}: {error}); {AGAIN}") from None
    if absent:
        raise UserError(f"{option} = '{folder}': {index.name} names '{absent[0]}', which is not there ({len(absent)} of {len(names)} files are "
                        f"missing); {AGAIN}")
    return files


def header(file: Path, option: str = "model.path") -> dict[str, dict[str, Any]]:
    """Tensors of a safetensors file: dtype, shape and data_offsets, held against its length. Raises UserError where it is none or cut short."""
    try:
        size = file.stat().st_size
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if not 2 <= length <= size - 8:  # a text file, such as git-lfs leaves in a large file's place, begins with some number beyond its end
                raise ValueError(f"{size} bytes without a header")
            found = {name: entry for name, entry in json.loads(raw.read(length)).items() if name != "__metadata__"}
        if bare := [name for name, entry in found.items() if not {"dtype", "shape"} <= entry.keys()]:
            raise ValueError(f"its header tells no dtype or shape of '{bare[0]}'")
        end = 8 + length + max((entry["data_offsets"][1] for entry in found.values()), default=0)
        if end != size:
            raise ValueError(f"{size} bytes, and its header tells of {end}")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{option} = '{file.parent}': '{file.name}' is cut short or no safetensors file ({error}); {AGAIN}") from None


def _method(found: dict[str, Any]) -> str | None:
    """How config.json says that the weights are quantised."""
    for part in (found, found.get("text_config")):
        if isinstance(part, dict) and (method := part.get("quantization_config")):
            return str(method.get("quant_method")) if isinstance(method, dict) else str(method)
    return None
