"""The memory plan: bytes that one rank of the policy holds at its peak, item by item, from shapes alone.

A step goes through phases, and the peak is that of the largest: load, reference, update, optimizer, transfer (and save, where checkpoints are
gathered in the same memory). What lives through all phases comes first; each formula says what is allocated, in the order in which it happens.

Letters: b bytes of a weight (4 or 2), S packed tokens, T response tokens, H hidden, A query and K key width, F ffn width, D head width, V
vocabulary, N image patches, E their width, t tensor ranks. "keeps" means until the backward pass. What lives on a CPU was measured there
(tests/monitor/test_plan.py); what differs on a GPU (fused norms, flash attention, Triton's workspaces) follows the same code, and was not.
"""
from __future__ import annotations

from dataclasses import dataclass

from sophiavl_fast.config import Config
from sophiavl_fast.monitor.shapes import Sizes, layers_of

MIB = 2**20
BUCKET = 256 * MIB           # of the weight transfer
CHECKPOINT_PART = 2**31      # bytes that are gathered before a file of a checkpoint is written
CPU_LOGPROB = 44 * MIB       # the C++ log-prob's workspace of tokens, at most
# Phases without an engine (judge) on the GPU under rollout.sleep (thinking.sleep); it starts after the first. "transfer" stands for the rollouts too:
# the trainer at rest, everybody else awake.
ENGINE_SLEEPS = {"load", "update", "optimizer", "log-probs", "save"}
WORKSPACES = {"head": "log-probs", "layer": "backward pass", "embedding": "embedding's gradient", "tower": "tower's pass"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A packed row. keys: keys of all its segments together; scores: sum of queries x keys over them; count: rows of a replica's update."""

    tokens: int
    targets: int
    keys: int
    scores: int
    patches: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank: its pipeline stage (the first's is the replica's lead), the number of replicas, the kind of device, and who computes log-probs there
    (cpu | reference | triton)."""

    stage: int = 0
    replicas: int = 1
    cuda: bool = False
    logprob: str = "cpu"


def bytes_of(config: Config) -> int:
    """Bytes of a weight."""
    return 2 if config.model.dtype == "bfloat16" else 4


def fullest_row(config: Config, sizes: Sizes) -> Row:
    """The largest row that the config admits: groups whose prompts (all image but for a word) and responses are as long as they may be."""
    prompt, new, n = config.data.max_prompt_tokens, config.rollout.max_new_tokens, config.rollout.n
    many = config.recipe == "rl"
    n, pieces = (n, config.rollout.prompts_per_step) if many else (1 if config.sft.soft_score is None else 2, config.sft.batch_size)
    if not config.policy.share_prompt:
        n, pieces = 1, pieces * n
    piece = prompt + n * new
    held = min(max(1.0, config.policy.tokens_per_row / piece), pieces)          # groups in a row; part of one stands for shorter ones
    return Row(
        tokens=int(held * piece), targets=int(held * n * new), keys=int(held * (prompt + n * (prompt + new))),
        scores=int(held * (prompt**2 + n * new * (prompt + new))), patches=int(held * prompt) * sizes.vision.merge**2, count=max(1, round(pieces / held)))


def peak(config: Config, sizes: Sizes, row: Row, place: Place) -> tuple[str, dict[str, float]]:
    """(phase, bytes by item) of the largest phase of a rank; items sum to the rank's peak."""
    found = phases(config, sizes, row, place)
    return max(found.items(), key=lambda entry: sum(entry[1].values()))


def phases(config: Config, sizes: Sizes, row: Row, place: Place) -> dict[str, dict[str, float]]:
    """Bytes by item in each phase of a rank's step."""
    rank = _Rank(config, sizes, row, place)
    held, trained = rank.held(), rank.trained
    found = {
        "load": {"weights": rank.weights, "gradients": held["gradients"], "reference": held["reference"], "workspace": rank.load()},
        "update": held | rank.update(),
        "optimizer": held | {"workspace": rank.optimizer_step()},
    }
    asleep = held | ({"gradients": 0, "optimizer": held["optimizer"] * (not place.cuda)} if config.policy.offload_optimizer else {})
    if config.recipe == "rl":
        found["transfer"] = asleep | {"transfer": rank.transfer()}
    if rank.has_reference or config.algorithm.mini_batches * config.algorithm.epochs > 1:
        found["log-probs"] = asleep | rank.forward() | {"reference": rank.b * trained * rank.has_reference}
    if not place.cuda:
        found["save"] = held | {"checkpoint": rank.save()}
    return found


class _Rank:
    """The formulas, one method an item or phase."""

    def __init__(self, config: Config, sizes: Sizes, row: Row, place: Place) -> None:
        self.config, self.sizes, self.row, self.place = config, sizes, row, place
        self.b = bytes_of(config)
        self.t, self.stages = config.parallel.tensor, config.parallel.pipeline
        self.first, self.last = place.stage == 0, place.stage == self.stages - 1
        language, vision = sizes.on_stage(place.stage, config.parallel)
        self.trained = language + vision * (not config.model.freeze_vision)
        self.weights = self.b * (language + vision)
        self.has_reference = config.recipe == "rl" and config.algorithm.kl_coef > 0
        # context parallelism: this rank's part of the row; its keys are whole segments' at most, and those of segments that are cut come twice
        share = config.parallel.context
        self.shards = place.replicas * share
        self.tokens, self.targets, self.scores = row.tokens // share, row.targets // share, row.scores // share
        self.keys = row.keys if share == 1 else min(row.keys, row.keys // share + 2 * row.tokens)
        # and of those what sequence parallelism leaves on a rank: norms, residuals, layer inputs
        self.cut = self.tokens // self.t if config.parallel.sequence else self.tokens
        self.flash = place.cuda and self.b == 2
        self.layers = layers_of(sizes.language.layers, config.parallel)[place.stage]
        # 1F1B: a stage runs ahead of its backward passes by the stages behind it
        self.in_flight = min(row.count, self.stages - place.stage)

    def load(self) -> float:
        """megatron lays the trained weights side by side in a buffer of its own beside the loaded ones; then, under bf16, fp32 copies are made."""
        return max(self.b * self.trained, 4 * self.trained / self.shards if self.b == 2 else 0)

    # -- what stays

    def held(self) -> dict[str, float]:
        """Weights, fp32 gradients (4), AdamW: two fp32 moments and under bf16 an fp32 copy, over the replicas; the reference; the step's rows."""
        half = self.b == 2
        reference = self.b * self.trained * self.has_reference
        if self.place.cuda and self.config.policy.offload_reference:
            reference = 0
        return {"weights": self.weights, "gradients": 4 * self.trained, "optimizer": (12 if half else 8) * self.trained / self.shards,
                "reference": reference, "rows": self.rows()}

    def rows(self) -> float:
        """Packed rows: pixels in fp32 on the first stage, and about a dozen numbers of 8 bytes a token. A GPU holds one row at a time."""
        pixels = 4 * self.row.patches * self.sizes.vision.patch * self.first
        each = pixels + 8 * (5 * self.row.tokens + 4 * self.row.targets)
        return each * (1 if self.place.cuda else self.row.count)

    # -- the language model

    def layer(self) -> float:
        """What a layer keeps for its backward pass."""
        m, s, b = self.sizes.language, self.tokens, self.b
        a, k, f = m.query / self.t, m.key / self.t, m.ffn / self.t
        kept = 2 * self.norm() * self.cut * m.hidden
        if self.config.parallel.sequence and not self.place.cuda and b == 4:
            kept += 2 * b * (s - self.cut) * m.hidden            # the fp32 CPU linear keeps its gathered input, others gather it anew
        if m.qk_norm:
            kept += (self.norm() - b) * s * (a + k)              # rope keeps nothing of what it turns
        kept += 4 * b * s * m.width                              # rope: cosines and sines, for queries and for keys
        kept += 2 * b * self.keys * k + 4 * s * m.heads / self.t   # gathered keys and values; log-sum-exp
        kept += b * s * a * (2 if self.flash else 3)             # queries, output; where segments are padded, the output put back in order too
        return kept + 3 * b * s * f                              # fc1's output (gate and up), their product

    def norm(self) -> float:
        """Bytes that a norm keeps of a number: input and output; in bf16 on a CPU plain operations keep an fp32 input and an fp32 normalized one."""
        return 2 * self.b if self.place.cuda or self.b == 4 else 8 + self.b

    def masks(self) -> float:
        """Where segments go through SDPA: their masks, once a row (heads that share a key are stacked, so it is repeated for each), and indices."""
        m = self.sizes.language
        return 0 if self.flash else self.b * self.scores * m.heads // m.key_heads + 8 * (2 * self.tokens + self.keys)

    def language(self) -> float:
        """What one row's forward pass keeps on this stage. Under recompute, layer inputs only; `backward` adds one whole layer then."""
        m, recompute = self.sizes.language, self.config.policy.recompute
        inputs = self.b * self.cut * m.hidden
        kept = self.layers * (inputs if recompute else self.layer()) + self.masks()
        if self.last:  # final norm, the predictors' rows
            kept += self.norm() * self.cut * m.hidden + self.b * self.targets * m.hidden
        return kept + inputs * (not self.first) + inputs * (not self.last)     # what came from, and went to, another stage

    # -- the vision tower

    def tower_block(self) -> float:
        """What a block of the tower keeps."""
        v, b, n = self.sizes.vision, self.b, self.row.patches * (1 + self.sizes.vision.extra)
        norm = 4 + 2 * b if v.rms else 2 * b                     # fp32 input, normalized, output; or LayerNorm's input and output
        if v.family == "internvl":                               # query, key, value, output, and that in order; inputs of two layer scales
            attention = 7 * b + 2 * (4 + b) * v.qk_norm
        else:                                                    # rotated query and key, the fused qkv (its value), output twice
            attention = 7 * b
        return n * (v.hidden * (2 * norm + attention) + b * v.ffn * (4 if v.gated else 2))

    def tower(self) -> float:
        """What the tower keeps: its pixels in the weights' dtype, blocks (or their inputs), mergers, features. A frozen one keeps nothing."""
        v, b, n = self.sizes.vision, self.b, self.row.patches
        if not self.first or not n or self.config.model.freeze_vision:
            return 0
        block = b * n * (1 + v.extra) * v.hidden if self.config.policy.recompute else self.tower_block()
        merger = (4 + 4 * b if v.rms and v.family != "internvl" else 4 * b) * n * v.hidden + 4 * b * n * v.hidden * v.deepstack
        return b * n * v.patch * (1 + (v.family == "internvl")) * (b == 2 or v.family == "internvl") + v.depth * block + merger + self.features()

    def features(self) -> float:
        """Image features in the language model's width, for every level, as they are and as they are put in place."""
        v = self.sizes.vision
        return 2 * self.b * self.row.patches / v.merge**2 * self.sizes.language.hidden * (1 + v.deepstack)

    # -- log-probs

    def head(self) -> float:
        """Beyond hidden states: the gradient of the chosen rows, and the backend's workspace for logits that are never held whole."""
        if not self.last:
            return 0
        m, t, b, rows = self.sizes.language, self.t, self.b, self.targets
        shard = -(-m.vocab // t)
        if self.place.logprob == "triton":
            from sophiavl_fast.kernels.triton_logprob_plans import STATISTICS_BYTES, gradient_bytes

            work = max(min(STATISTICS_BYTES, 4 * rows * shard), gradient_bytes(rows, m.hidden, shard, b))
        elif self.place.logprob == "cpu":   # packed tiles of 1,024 columns, and tokens up to a fixed workspace
            work = min(CPU_LOGPROB, rows * (m.hidden * (b + 4) + 1024 * b)) + 3 * 1024 * m.hidden * b
        else:                               # a chunk of logits, their exponentials, and a product of both; a fp32 copy of a 16-bit head
            chunk = min(rows, max(self.config.policy.logprob_chunk, 2**20 // shard))
            work = 3 * 4 * chunk * shard + 4 * chunk * m.hidden + (4 * shard * m.hidden if b == 2 else 0)
        return 2 * b * rows * m.hidden + work

    # -- phases

    def update(self) -> dict[str, float]:
        """Everything that is kept, for as many rows as are in flight, and the largest of what comes and goes meanwhile."""
        text, tower = self.language() * self.in_flight, self.tower() * self.in_flight
        layer = self.layer() if self.config.policy.recompute else 0
        ends = {"head": self.head(), "layer": layer + self.backward(), "embedding": self.b * self.sizes.language.vocabulary(self.t) * self.first - text}
        if self.first and self.row.patches:  # then the first row's activations of the language model are gone
            one = self.tower_block() if self.config.policy.recompute else 0
            ends["tower"] = self.tower_pass() + one * (not self.config.model.freeze_vision) - text / self.in_flight
        if not self.last:
            ends.pop("head")
        name = max(ends, key=lambda key: ends[key])
        return {"activations": text, "vision activations": tower, WORKSPACES[name]: max(0, ends[name])}

    def backward(self) -> float:
        """At the widest point of a layer's backward pass: gradients of product, gate and up [S, F], of input and output [S, H], of a weight."""
        m = self.sizes.language
        wide, weight = self.tokens * (3 * m.ffn / self.t + 2 * m.hidden), self.sizes.language.largest(1 if self.t == 1 else self.t)
        if self.b == 2 and not self.place.cuda:
            wide += 4 * self.cut * m.hidden                      # fp32 gradients inside a norm
        return self.b * (wide + min(weight, 2 * m.hidden * m.ffn / self.t))

    def tower_pass(self) -> float:
        """What comes and goes in a block of the tower, forward or backward: rope in fp32 (queries, keys, both turned), or the wide half of its MLP."""
        v, n = self.sizes.vision, self.row.patches * (1 + self.sizes.vision.extra)
        rope = 0 if v.family == "internvl" else 6 * 4 * v.hidden
        return n * max(rope + 3 * self.b * v.hidden, self.b * (3 * v.ffn + 2 * v.hidden)) + self.b * v.largest

    def forward(self) -> dict[str, float]:
        """Without gradients: one layer's intermediates, the tower's before it, or the head's."""
        m, s = self.sizes.language, self.tokens
        layer = self.b * (s * (4 * m.ffn / self.t + m.query / self.t) + 3 * self.cut * m.hidden)
        vision = self.tower_pass() + self.features() if self.first and self.row.patches else 0
        return {"activations": self.masks() + max(layer, vision, self.head()) + self.b * self.row.tokens * m.hidden}

    def optimizer_step(self) -> float:
        """torch's AdamW: on a GPU one more fp32 number for each of the shard's parameters at once, on a CPU two for the largest of them."""
        largest = max(self.sizes.language.largest(self.t), self.sizes.vision.largest * self.first)
        return 4 * self.trained / self.shards if self.place.cuda else 2 * 4 * min(largest, self.trained / self.shards)

    def transfer(self) -> float:
        """Tensors of the whole model, one after the other, as all ranks of a replica gather them from their parts or have them from another stage.

        Only the lead, which is on the first stage, keeps them until the engine has them: a bucket under way while the next is gathered. An engine that
        reads them where they lie (ipc, on the lead's own GPU) lets go of none before the last: all are there at once, from one rank too, which cuts its
        fused matrices into the published ones.
        """
        largest = self.b * self.sizes.language.largest(1) * (1 + (self.t > 1 or self.stages > 1))
        if not self.first or self.config.debug.replay:
            return largest
        whole, rollout = self.b * self.sizes.total, self.config.rollout
        beside = rollout.engine == "server" and not rollout.urls and not rollout.gpus
        if self.place.cuda and (rollout.transfer == "ipc" or (rollout.transfer == "auto" and beside)):
            return whole
        return min(whole, 2 * BUCKET) + largest

    def save(self) -> float:
        """Whole tensors of the checkpoint that are gathered before a part is written (all of the rank's in the background), and the one being gathered.

        In megatron's format nothing is gathered, and all that the rank writes is copied first; what is frozen, the first replica writes.
        """
        bytes_ = 14 if self.b == 2 else 12
        if self.config.checkpoint.format == "torch_dist":
            return bytes_ * self.trained / self.shards + (self.weights - self.b * self.trained)
        ranks = self.shards * self.t * self.stages
        each = bytes_ * self.sizes.total
        part = each / ranks if self.config.checkpoint.background else min(each / ranks, CHECKPOINT_PART)
        return part + 8 * self.sizes.language.largest(1)

