"""vLLM's engine arguments from the config, the same for the inline engine and the server."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sophiavl_fast import model_folder
from sophiavl_fast.config import Config
from sophiavl_fast.rollout.environment import engine_variables
from sophiavl_fast.types import MAX_IMAGES

CPU_KV_CACHE_BYTES = 1 << 30     # at most, on a CPU; VLLM_CPU_KVCACHE_SPACE (GiB) overrides it
PIXEL_LIMITS = ("min_pixels", "max_pixels")
CPU_BLOCK = 128                  # tokens of a cache block of the CPU engine


def text_config(path: str) -> dict[str, Any]:
    """The language model's part of a model folder's config.json; UserError where it cannot be read."""
    tree = model_folder.read(path)
    return tree | tree.get("text_config", {})


def model_limit(path: str) -> int:
    """The longest sequence the model folder allows; UserError where it has no readable config.json."""
    return model_folder.longest(path)


def cpu_kv_cache_bytes(config: Config) -> int:
    """As much as max_num_seqs sequences of full length can fill, up to CPU_KV_CACHE_BYTES.

    The engine hands out its blocks in turn, so that in time every page of a larger cache would be touched for nothing.
    """
    text = text_config(config.model.path)
    heads = text.get("num_attention_heads", 1)
    width = text.get("head_dim") or text.get("hidden_size", 1) // heads
    per_token = 2 * text.get("num_hidden_layers", 1) * text.get("num_key_value_heads", heads) * width * (4 if config.model.dtype == "float32" else 2)
    blocks = 1 + config.rollout.max_num_seqs * -(-max_model_len(config) // CPU_BLOCK)
    return min(CPU_KV_CACHE_BYTES, blocks * CPU_BLOCK * per_token)


def normalisation_is_named(path: str) -> bool:
    """Whether the model folder itself says image_mean and image_std. Where it does not, transformers (and so the trainer) takes its class's own,
    but vLLM, normalising on the device, takes none."""
    file = Path(path) / "preprocessor_config.json"
    return file.is_file() and {"image_mean", "image_std"} <= json.loads(file.read_text()).keys()


def max_model_len(config: Config) -> int:
    """Prompt plus response that the engine holds."""
    if config.rollout.max_model_len is not None:
        return config.rollout.max_model_len
    return min(config.data.max_prompt_tokens + config.rollout.max_new_tokens, model_limit(config.model.path))


def pixel_limits(config: Config) -> dict[str, int]:
    """Those of model.min_pixels and model.max_pixels that are set."""
    return {key: value for key in PIXEL_LIMITS if (value := getattr(config.model, key)) is not None}


def engine_arguments(config: Config, device: str, backend: str) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs. backend: name of the weight transfer backend.

    Sampling must be exactly the distribution that the trainer differentiates: processed log-probs (after bans and
    temperature), and never the model folder's generation_config.
    """
    length, pixels = max_model_len(config), pixel_limits(config)
    runner = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", engine_variables(device)["VLLM_USE_V2_MODEL_RUNNER"])
    arguments: dict[str, Any] = {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "seed": config.run.seed,
        "max_model_len": length,
        "max_num_seqs": config.rollout.max_num_seqs,
        "max_num_batched_tokens": max(8192, length),
        "tensor_parallel_size": config.rollout.tensor_parallel,
        "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0},
        "mm_processor_cache_gb": 0,      # training images seldom come twice, and it would grow to gigabytes of pixels
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "logits_processors": [f"sophiavl_fast.rollout.bans:{'BansV1' if runner == '0' else 'BansV2'}"],
        "worker_extension_cls": "sophiavl_fast.rollout.worker.EngineExtension",
        "weight_transfer_config": {"backend": backend},
    }
    if pixels:
        arguments["mm_processor_kwargs"] = pixels
    if not normalisation_is_named(config.model.path):
        arguments["mm_device_do_normalize"] = False
    if device == "cpu":
        arguments |= {"enforce_eager": True}
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(config)
    else:
        arguments |= {"gpu_memory_utilization": config.rollout.gpu_memory_utilization, "enable_sleep_mode": config.rollout.sleep}
    return arguments


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """The same as command-line flags of vLLM's server."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is False:
            flags.append(f"--no-{flag[2:]}")
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
