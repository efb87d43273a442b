"""Engine arguments: the KV cache of a CPU engine holds what the run can fill, and no more."""
from __future__ import annotations

import json

import pytest

from sophiavl_fast import config as tree
from sophiavl_fast.errors import UserError
from sophiavl_fast.rollout import arguments


def conf(folder, **rollout):
    return tree.build({"model": {"path": str(folder), "dtype": "float32"}, "data": {"max_prompt_tokens": 200},
                       "rollout": {"max_new_tokens": 56, "max_num_seqs": 16} | rollout}, "test")


@pytest.fixture
def folder(tmp_path):
    text = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    return tmp_path


def test_cache_holds_all_sequences_at_full_length(folder):
    a_token = 2 * 3 * 2 * 8 * 4                            # keys and values, layers, key heads, width, bytes
    assert arguments.cpu_kv_cache_bytes(conf(folder)) == (16 * 2 + 1) * 128 * a_token
    assert arguments.cpu_kv_cache_bytes(conf(folder, max_num_seqs=100_000)) == arguments.CPU_KV_CACHE_BYTES


def test_the_user_may_set_it(folder, monkeypatch):
    assert "kv_cache_memory_bytes" in arguments.engine_arguments(conf(folder), "cpu", "inproc")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert "kv_cache_memory_bytes" not in arguments.engine_arguments(conf(folder), "cpu", "inproc")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no model folder"):
        arguments.cpu_kv_cache_bytes(conf(tmp_path))
