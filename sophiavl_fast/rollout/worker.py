"""Our half inside the engine's worker: whose engine it is, which weights it wants, what it got.

vLLM mixes this class into its worker (`worker_extension_cls`); the trainer calls it by collective RPC. Importing the
module also registers our weight transfer backends in the worker's process, and lets a CPU engine read seeded prompts in parts.
"""
from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from sophiavl_fast import model_folder
from sophiavl_fast.rollout import rewind
from sophiavl_fast.rollout.arguments import PIXEL_LIMITS
from sophiavl_fast.rollout.bans import set_banned
from sophiavl_fast.rollout.machine import this_machine
from sophiavl_fast.rollout.transfer.checksum import checksum
from sophiavl_fast.rollout.transfer.receivers import register
from sophiavl_fast.rollout.transfer.source import checkpoint_names

register()
rewind.install()


class EngineExtension:
    """Methods of every worker; `self.model_runner` and `self.model_config` are the worker's own."""

    model_runner: Any
    model_config: Any

    def sophia_claim(self, nonce: str, banned_ids: list[int]) -> None:
        """Serve the run with this nonce from now on, and never sample these ids."""
        if nonce != getattr(self, "_sophia_nonce", None):
            self._sophia_had: set[str] = set()
        self._sophia_nonce = nonce
        set_banned(banned_ids)

    def sophia_model(self) -> dict[str, object]:
        """What the engine was started from, for a run to compare with its own model before it claims it (rollout.identity)."""
        held = self.model_config
        processing = (held.multimodal_config and held.multimodal_config.mm_processor_kwargs) or {}
        return {"machine": this_machine(), "path": held.model, "dtype": str(held.dtype).removeprefix("torch."),
                "fields": model_folder.described(model_folder.open_config(held.model)),
                "longest": held.max_model_len, "pixels": {key: processing[key] for key in PIXEL_LIMITS if processing.get(key) is not None}}

    def sophia_unknown(self, names: list[str]) -> list[str]:
        """Those of the names that the engine's own checkpoint does not hold."""
        wanted = self._sophia_wanted()
        return [n for n in names if self._sophia_canonical(n) not in wanted]

    def sophia_begin(self, nonce: str, with_checksums: bool, kept: list[str]) -> None:
        """Start recording every tensor that reaches the model; refused when the engine serves another run.

        kept: names that do not come, since they never change; refused unless all of them came in an earlier transfer.
        """
        if getattr(self, "_sophia_nonce", None) != nonce:
            raise PermissionError("this engine serves another run now (its nonce differs)")
        self._sophia_kept = {self._sophia_canonical(n) for n in kept}
        if strange := self._sophia_kept - getattr(self, "_sophia_had", set()):
            raise PermissionError(f"{len(strange)} weights were to be kept that this run never sent, such as {min(strange)}")
        model = self.model_runner.get_model()
        self._sophia_seen: dict[str, str] = {}
        self._sophia_unfilled = {name for name, _ in model.named_parameters()}
        self._sophia_load_s = 0.0
        model.__dict__.pop("load_weights", None)     # of an update that broke off
        load = model.load_weights

        def recording(weights: Iterable[tuple[str, Tensor]], *args, **kwargs):
            began = time.perf_counter()
            loaded = load(self._sophia_record(weights, with_checksums), *args, **kwargs)
            self._sophia_load_s += time.perf_counter() - began
            self._sophia_unfilled -= set(loaded or ())
            return loaded

        model.__dict__["load_weights"] = recording

    def sophia_end(self) -> dict[str, object]:
        """Stop recording. missing: checkpoint names that never came; unfilled: parameters that nothing was written to, those
        of wholly kept modules aside; checksums: by name as sent; load_s: seconds, without those of waiting for the next tensor."""
        self.model_runner.get_model().__dict__.pop("load_weights", None)
        got = {self._sophia_canonical(n) for n in self._sophia_seen}
        missing = [name for key, name in self._sophia_wanted().items() if key not in got | self._sophia_kept]
        whole = _modules(self._sophia_kept) - _modules(got)
        unfilled = sorted(n for n in self._sophia_unfilled if not _modules({n}) <= whole)
        if not missing and not unfilled:
            self._sophia_had = got | self._sophia_kept
        return {"missing": sorted(missing), "unfilled": unfilled, "checksums": self._sophia_seen, "load_s": self._sophia_load_s}

    def _sophia_record(self, weights: Iterable[tuple[str, Tensor]], with_checksums: bool) -> Iterator[tuple[str, Tensor]]:
        began = time.perf_counter()
        for name, tensor in weights:
            self._sophia_seen[name] = checksum(tensor) if with_checksums else ""
            self._sophia_load_s -= time.perf_counter() - began
            yield name, tensor
            began = time.perf_counter()

    def _sophia_canonical(self, name: str) -> str:
        """One spelling for the old and the new way in which transformers writes the same name.

        Only prefixes are mapped: the mapper's fused names would make q, k and v of a layer one.
        """
        mapper = getattr(self.model_runner.get_model(), "hf_to_vllm_mapper", None)
        for prefix, new in (mapper.orig_to_new_prefix.items() if mapper else ()):
            if name.startswith(prefix):
                return f"{new}{name[len(prefix):]}"
        return name

    def _sophia_wanted(self) -> dict[str, str]:
        """canonical name -> name in the checkpoint folder that the engine was started from."""
        if not hasattr(self, "_sophia_names"):
            names = checkpoint_names(self.model_config.model)
            if getattr(self.model_config.hf_config, "tie_word_embeddings", False):
                names = [n for n in names if not n.endswith("lm_head.weight")]
            self._sophia_names = {self._sophia_canonical(n): n for n in names}
        return self._sophia_names


def _modules(names: set[str]) -> set[str]:
    """The model's direct children that hold these parameters."""
    return {name.partition(".")[0] for name in names}
