"""Policy: pack groups, take log-probs, make one optimizer step, hand out weights. The same code in every layout."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sophiavl_fast.compat.megatron_cpu import without_cuda
from sophiavl_fast.config import Config
from sophiavl_fast.errors import EngineError, UserError
from sophiavl_fast.kernels import STATS, SUMS, linear_logprob
from sophiavl_fast.kernels.dispatch import resolve
from sophiavl_fast.policy import cpu_linear, mapping, optimizer, packing
from sophiavl_fast.policy.attention import RowPlan, plan_row, refuse_missing_flash_attn
from sophiavl_fast.policy.compare_hf import HuggingFace
from sophiavl_fast.policy.context import cut
from sophiavl_fast.policy.distributed import Layout, open_layout
from sophiavl_fast.policy.export import export
from sophiavl_fast.policy.families import Family, open_family
from sophiavl_fast.policy.model import DTYPES, VisionLanguageModel, build_model
from sophiavl_fast.policy.offload import Offload
from sophiavl_fast.types import Batch, Group

LossFn = Callable[[Batch, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Active = Callable[[Batch], Tensor | None]


@dataclass(slots=True, kw_only=True)
class UpdateResult:
    """One optimizer step: stats [K] fp32 over all micro-batches and replicas, the global gradient norm before clipping, the rate used."""

    stats: Tensor
    grad_norm: float
    lr: float


class Policy:
    """Every method but the properties is collective: all ranks of a replica (update, sum_over_replicas, weights, export: all ranks) call it."""

    def __init__(self, config: Config, layout: Layout, family: Family, model: VisionLanguageModel, heads: mapping.Heads,
                 *, banned_ids: Sequence[int], temperature: float, reference: bool, total_steps: int, trained: bool) -> None:
        self.config, self.layout, self.family, self.model, self.heads = config, layout, family, model, heads
        self.updates = 0
        self.banned_ids, self.temperature, self._total = sorted(i for i in set(banned_ids) if i < heads.vocab), temperature, total_steps
        self._ban_bias = _ban_bias(self.banned_ids, heads, layout) if layout.last_stage else None
        self._hf: HuggingFace | None = None
        self._reference = self._copy_weights() if reference else None
        self._wrapped: Any = optimizer.wrap(model) if trained else None
        self.optimizer: Any = optimizer.build_optimizer(config, self._wrapped) if trained else None
        self._offload = Offload(self.optimizer, self._wrapped, layout.device) if trained and config.policy.offload_optimizer else None

    @classmethod
    def create(cls, config: Config, *, banned_ids: Sequence[int] = (), temperature: float = 1.0, reference: bool, total_steps: int,
               trained: bool = True) -> Policy:
        """Join the process groups and load `config.model.path`.

        banned_ids never carry probability; temperature divides the logits: both as the sampler does it. reference keeps
        a frozen copy of the loaded weights; total_steps is the number of optimizer updates that the schedule spans. trained=False: there are none,
        so neither gradients nor an optimizer take memory.
        Raises UserError for a folder, a device or a layout that cannot work.
        """
        family = open_family(config.model.path)
        layout = open_layout(config)
        try:
            _check_kernels(config, layout)
            with without_cuda(layout.device):
                model, heads = build_model(config, family, layout)
                if layout.device.type == "cpu" and cpu_linear.available():
                    cpu_linear.use_onednn(model)
                return cls(config, layout, family, model, heads, banned_ids=banned_ids, temperature=temperature, reference=reference,
                           total_steps=total_steps, trained=trained)
        except BaseException:
            layout.close()
            raise

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def replica(self) -> int:
        return self.layout.replica

    @property
    def replicas(self) -> int:
        return self.layout.replicas

    @property
    def is_lead(self) -> bool:
        """Whether this rank reads data and talks to the engines for its replica."""
        return self.layout.lead

    def pack(self, groups: list[Group], advantages: Tensor | None) -> list[Batch]:
        """The lead's groups as packed rows, on every rank of its replica (whose own arguments are ignored); pixels on the first stage only.

        advantages [B] fp32 in the order of the groups' responses; None: zeros. Raises EngineError, see packing.pack.
        """
        rows = None
        if self.is_lead:
            c = self.config
            rows = packing.pack(groups, advantages, self.family, share_prompt=c.policy.share_prompt, budget=c.policy.tokens_per_row,
                                multiple=self.layout.row_multiple, check=c.debug.check_batches)
        if len(self.layout.peer_ranks) == 1:
            assert rows is not None
            return rows
        return self.layout.share_rows(rows)

    @torch.no_grad()
    def logprobs(self, batches: list[Batch], *, reference: bool = False) -> list[Tensor]:
        """[T] fp32 of each batch's targets, on every rank of the replica; of the frozen reference where asked."""
        with without_cuda(self.device), self._weights_of(reference):
            found = self._run(batches, lambda batch, hidden, plan: self._head(hidden, batch, plan, entropy=False)[0], forward_only=True)
        return [self._from_last_stage(lp, len(b.target)) for lp, b in zip(found or [None] * len(batches), batches, strict=True)]

    def compare_hf(self, batches: list[Batch], logprobs: list[Tensor]) -> float:
        """Largest difference between `logprobs` (of these batches) and plain transformers on the live weights, over all replicas."""
        self._hf = self._hf or HuggingFace(self)
        return float(self.layout.max_over_replicas(torch.tensor(self._hf.difference(batches, logprobs))))

    def update(self, batches: list[Batch], loss_fn: LossFn, *, entropy: bool = False, active: Active | None = None) -> UpdateResult:
        """One optimizer step on the sum of `loss_fn(batch, logprob [T], entropy [T] or None)` over micro-batches and replicas.

        loss_fn returns (loss, stats [K]): a scalar already divided by its global denominator, and fp32 slots named by kernels.STATS.
        active(batch), of a batch on the CPU, names the targets [A] whose log-prob can have a gradient (None: all): the others cost no backward pass
        through the vocabulary.
        Raises EngineError when a gradient is not finite (the weights are untouched then).
        """

        def loss(batch: Batch, hidden: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            logprob, spread = self._head(hidden, batch, plan, entropy=entropy)
            value, stats = loss_fn(batch, logprob, spread)
            return value, torch.zeros((), dtype=torch.int, device=self.device), {"stats": stats.detach().clone()}

        if not batches:
            raise EngineError(f"update {self.updates}: replica {self.replica} was given no batch")
        if self.optimizer is None:
            raise EngineError("an update was asked for, but Policy.create was told trained=False")
        self.wake()
        with without_cuda(self.device):
            self._wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            found = self._run(batches, loss, forward_only=False, active=active)
            norm, rate = optimizer.step(self.optimizer, self._wrapped, self.config.optim, update=self.updates, total=self._total)
        self.updates += 1
        return UpdateResult(stats=self._combine([f["stats"] for f in found]), grad_norm=norm, lr=rate)

    def weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(published name, full tensor), in a fixed order; every rank must iterate. Tensors may be views of the live weights.

        trained_only: without those of `frozen`."""
        return mapping.full_tensors(self.model, self.family, self.heads, self.layout, select=lambda p: p.requires_grad or not trained_only)

    @property
    def frozen(self) -> frozenset[str]:
        """Published names that training never changes, on the ranks of the first stage: the vision tower's with model.freeze_vision."""
        return frozenset(name for _, rule, p in mapping.parameters(self.model, self.family) if not p.requires_grad for name in rule.names)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(published name, full fp32 gradient) that the last update stepped on, after clipping; trained parameters only. None are left after `rest`."""
        if self.optimizer is None:
            raise EngineError("gradients were asked for, but Policy.create was told trained=False")
        if self._offload and self._offload.resting:
            raise EngineError("the gradients were given back: policy.offload_optimizer frees them between updates")

        def reduced(p: Any) -> Tensor:
            return optimizer.gathered(self.optimizer, self.layout, p, lambda shard: p.main_grad.view(-1)[shard.begin:shard.end])

        return mapping.full_tensors(self.model, self.family, self.heads, self.layout, reduced, dtype=torch.float32, select=lambda p: p.requires_grad)

    def export(self, out_dir: str | Path) -> Path:
        """Write a Hugging Face folder that plain transformers loads; see export.export."""
        return export(self, Path(out_dir))

    def rest(self) -> None:
        """No update is near: with policy.offload_optimizer the optimizer's state goes to the CPU and the gradients' memory is given back;
        with rollout.sleep or thinking.sleep, so is what torch only keeps for later."""
        if self._offload:
            self._offload.rest()
        if (self.config.rollout.sleep or self.config.thinking.sleep) and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Undo `rest`, before the optimizer's state is read or written; `update` does it by itself."""
        if self._offload:
            self._offload.wake()

    def sum_over_replicas(self, tensor: Tensor) -> Tensor:
        """The sum of the replicas' tensors, on every rank."""
        return self.layout.sum_over_replicas(tensor)

    def gather_replicas(self, value: Any) -> list[Any]:
        """Every replica's object, in the order of the replicas; for leads among leads."""
        return self.layout.gather_replicas(value)

    def close(self) -> None:
        """Leave the process groups."""
        self.layout.close()

    # -- inside

    def _run(self, batches: list[Batch], last: Callable[[Batch, Tensor, RowPlan], Any], *, forward_only: bool, active: Active | None = None) -> list[Any]:
        """megatron's schedule over the micro-batches; what `last` returned for each on the last stage, [] on the others."""
        rows = iter(batches)

        def forward(_: object, model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            host = next(rows)
            plan, batch = self._plan(host, active(host) if active else None), host.to(self.device)
            return model(batch, plan), lambda hidden, non_loss_data=False: last(batch, hidden, plan)

        return get_forward_backward_func()(
            forward_step_func=forward, data_iterator=None, model=self._wrapped or self.model, num_microbatches=len(batches),
            seq_length=max(len(b.tokens) for b in batches), micro_batch_size=1, forward_only=forward_only, collect_non_loss_data=forward_only,
        )

    def _plan(self, batch: Batch, active: Tensor | None) -> RowPlan:
        heads, layout = self.heads, self.layout
        part = cut(batch, dist.get_rank(layout.cp_group), layout.context, layout.cp_group) if layout.context > 1 else None
        if active is not None and part is not None:
            active = torch.isin(part.targets, active).nonzero()[:, 0]
        return plan_row(batch, device=self.device, dtype=self.model.config.params_dtype, query_heads_per_key=heads.query // heads.key,
                        part=part, active=active, flash=self.config.policy.attention)

    def _head(self, hidden: Tensor, batch: Batch, plan: RowPlan, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """hidden [T, H] at the predictor rows -> (logprob [T], entropy [T] or None) of the sampler's distribution.

        Under context parallelism hidden holds this rank's rows only, and what comes back is whole.
        """
        weight: Any = self.model.head_weight()
        part = plan.slice
        logprob, spread = linear_logprob(
            hidden, weight, batch.target if part is None else batch.target[part.targets], bias=self._ban_bias, temperature=self.temperature,
            entropy=entropy, vocab_size=self.heads.vocab, group=self.layout.tp_group if self.layout.tensor > 1 else None,
            active=plan.active, main_grad=weight.main_grad if torch.is_grad_enabled() else None,
            backend=self.config.policy.kernels, chunk=self.config.policy.logprob_chunk,
        )
        if part is None:
            return logprob, spread
        size = len(batch.target)
        return part.whole(logprob, size), None if spread is None else part.whole(spread, size)

    def _from_last_stage(self, tensor: Tensor | None, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.layout.pipeline == 1:
            assert tensor is not None
            return tensor
        held = tensor.contiguous() if tensor is not None else torch.empty(size, dtype=dtype, device=self.device)
        dist.broadcast(held, dist.get_global_rank(self.layout.pp_group, self.layout.pipeline - 1), group=self.layout.pp_group)
        return held

    def _combine(self, parts: list[Tensor]) -> Tensor:
        """Statistics of the micro-batches and replicas together, on every rank: sums, but maxima in the last slots of kernels.STATS."""
        if not self.layout.last_stage:
            return self._from_last_stage(None, int(self._from_last_stage(None, 1, torch.int64)))
        each = torch.stack(parts)
        sums = SUMS if each.shape[1] == len(STATS) else each.shape[1]
        total = torch.cat([self.sum_over_replicas(each[:, :sums].sum(0)), self.layout.max_over_replicas(each[:, sums:].amax(0))])
        self._from_last_stage(torch.tensor([total.numel()], device=self.device), 1, torch.int64)
        return self._from_last_stage(total, total.numel())

    def _copy_weights(self) -> dict[torch.nn.Parameter, Tensor]:
        place = torch.device("cpu") if self.config.policy.offload_reference else self.device
        return {p: p.detach().to(place, copy=True) for p in self.model.parameters() if p.requires_grad}

    @contextmanager
    def _weights_of(self, reference: bool) -> Iterator[None]:
        """Within the block the parameters point at the reference's storage; frozen ones are shared anyway."""
        if not reference:
            yield
            return
        if self._reference is None:
            raise EngineError("the reference's log-probs were asked for, but Policy.create was told reference=False")
        live = {p: p.data for p in self._reference}
        for parameter, frozen in self._reference.items():
            parameter.data = frozen.to(self.device)
        try:
            yield
        finally:
            for parameter, data in live.items():
                parameter.data = data


def _check_kernels(config: Config, layout: Layout) -> None:
    """policy.kernels and policy.attention name what this device has for what the policy computes."""
    try:
        resolve("linear_logprob", config.policy.kernels, layout.device, DTYPES[config.model.dtype])
    except ValueError as error:
        raise UserError(f"policy.kernels: {error}") from None
    if config.policy.attention == "flash_attn":
        refuse_missing_flash_attn(layout.device)


def _ban_bias(banned: Sequence[int], heads: mapping.Heads, layout: Layout) -> Tensor | None:
    """[padded V / tp] fp32 on the last stage: -inf at this rank's banned ids, None where nothing is banned."""
    if not banned:
        return None
    bias = torch.zeros(heads.padded_vocab)
    bias[torch.tensor(banned)] = float("-inf")
    return bias.chunk(layout.tensor)[dist.get_rank(layout.tp_group)].to(layout.device)
