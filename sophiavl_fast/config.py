"""One typed tree for everything. Imports no torch, so that a typo costs milliseconds.

Values come from the defaults here, then a YAML file, then `a.b=value` overrides (parsed as YAML). Unknown keys are
refused with the nearest valid one; what can be checked without loading a model is checked in `load`.
The docstring under a field is its documentation: `docs/config.md` is generated from this file.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sophiavl_fast import config_errors
from sophiavl_fast.config_checks import check
from sophiavl_fast.errors import UserError, nearest


class Node(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True, protected_namespaces=())


class Run(Node):
    dir: str = "runs/run"
    """Folder of the run: config, metrics, samples, checkpoints, export, report."""
    steps: int = 100
    """Rollout steps (rl) or optimizer steps (sft)."""
    seed: int = 0
    """Every other seed derives from it and from (step, prompt id, i)."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of run.dir; never: start anew (refused when run.dir holds a run); or a checkpoint's path,
    and later ones in run.dir are set aside then as abandoned_step_N."""
    export: str | None = None
    """Folder of the final Hugging Face export; null: run.dir/hf."""


class Model(Node):
    path: str = ""
    """Hugging Face folder of the policy."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights and activations of policy and rollout engine; log-probs and losses are fp32 always."""
    min_pixels: int | None = None
    """Smallest image area after resizing; null: the processor's own. The export carries it."""
    max_pixels: int | None = None
    """Largest image area after resizing; null: the processor's own. The export carries it."""
    freeze_vision: bool = False
    """Keep the vision tower fixed; its weights are then transferred once only."""


class Data(Node):
    registry: str = ""
    """Registry file in the form of dataset_info.json; "" for the packaged one."""
    train: str | dict[str, float | dict[int, float]] = ""
    """A dataset's name (a comma-separated list mixes by size), or name -> weight; a weight may be a curriculum {step: weight, ...},
    interpolated linearly between its points, where a step is as many prompts as one step draws."""
    eval: str = ""
    """Held-out dataset; "" for none."""
    check: Literal["full", "sample"] = "full"
    """full: read every record and image before training; sample: 256 of them, the rest as they are read."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """refuse: stop at the first bad record; skip: leave it out and count it in the metrics."""
    templates: str = "sophia"
    """Prompt template: a packaged name or a YAML file."""
    max_prompt_tokens: int = 8192
    """Longest prompt, image tokens included; longer ones count as bad records, they are never cut."""
    workers: int = 2
    """Threads that read, resize and patch images ahead of the trainer."""
    shuffle: bool = True
    """A new order each epoch, derived from run.seed."""


class Rollout(Node):
    engine: Literal["server", "inline"] = "server"
    """server: vLLM in its own process group; inline: inside a single-process trainer."""
    urls: list[str] = []
    """Servers already running, of the same model in the same dtype, shared out over the replicas; empty: the trainer spawns `engines` of them."""
    engines: int = 1
    """Servers that each data-parallel replica spawns; requests go to the one with the fewest unanswered."""
    gpus: list[int] = []
    """GPUs of the spawned servers, `tensor_parallel` each, in order; empty: the trainer's own."""
    max_restarts: int = 3
    """Times that a spawned server is started again after it ended or went silent; what was asked of it is asked again. 0: the run ends."""
    n: int = 8
    """Responses a prompt."""
    prompts_per_step: int = 8
    """Prompts a rollout step, over all replicas."""
    max_new_tokens: int = 1024
    """Longest response, in tokens; one that is cut there counts in response/truncated."""
    temperature: float = 1.0
    """Enters the sampler and the ratio alike; at least 0.01, since vLLM samples no colder."""
    resample: int = 0
    """Rounds in which groups without signal (all advantages 0) are replaced by fresh prompts (DAPO); those left after the last are kept.
    Adds the metrics rollout/resampled (groups replaced in the step, over all rounds), rollout/silent (groups still without signal) and rollout/outcome (mean
    outcome reward of all that was sampled); reward/outcome, the report's "outcome reward", is then that of the chosen groups."""
    staleness: int = 0
    """Steps that rollouts may run ahead of the policy: 0 samples every step with that step's weights."""
    max_logprob_diff: float | None = None
    """Stop when trainer and engine differ by more than this in the log-prob of a sampled token; null: report only. With rollout.staleness > 0: of a token
    of the probe that follows each transfer (rollout/probe_diff_max)."""
    transfer: Literal["auto", "inproc", "gloo", "nccl", "ipc"] = "auto"
    """Weight transfer backend; auto chooses by topology."""
    transfer_host: str = ""
    """Address at which engines elsewhere reach the trainer for its weights; empty: this machine's on the way to `rollout.urls`."""
    checksum: bool = False
    """Compare a checksum of every tensor after each transfer."""
    start_timeout_s: float = 300.0
    """Deadline of an engine's start, and of the judge's that the run serves."""
    request_timeout_s: float = 600.0
    """Deadline of the answers to one prompt; an engine that misses it is lost."""
    transfer_timeout_s: float = 120.0
    """Deadline of each step of a weight transfer; an engine that misses it is lost."""
    max_num_seqs: int = 256
    """Sequences that an engine works on at once; others wait in its queue."""
    max_model_len: int | None = None
    """Longest prompt plus response that the engine holds; null: data.max_prompt_tokens + rollout.max_new_tokens, at most the model's own limit."""
    gpu_memory_utilization: float = 0.4
    """Share of its GPU that an engine takes: weights, activations, key-value cache."""
    sleep: bool = False
    """Engines on the trainer's own GPUs sleep while it updates or saves: their weights wait in host memory, their key-value cache is given up."""
    tensor_parallel: int = 1
    """Tensor-parallel size of each engine."""
    port: int = 0
    """Port of the spawned server on 127.0.0.1; 0: a free one."""


STALE_TIS_CAP = 2.0


class Algorithm(Node):
    name: Literal["trust_grpo", "grpo"] = "trust_grpo"
    """grpo ignores the thinking reward."""
    kl_coef: float = 0.04
    """Weight of the KL term to the frozen reference; 0 holds no reference at all."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL (Schulman): with r the log-prob of policy minus reference, k1 = r, k2 = r^2 / 2, k3 = exp(-r) - 1 + r."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - this."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + this."""
    dual_clip: float | None = None
    """Bound of the loss for negative advantages, as a multiple of the advantage; above 1, null: none."""
    pre_clip: float | None = 10.0
    """Clamp of the log-ratio to +-this before exp; null: none."""
    variant: Literal["ppo", "cispo"] = "ppo"
    """ppo: the clipped ratio; cispo: the gradient of the log-prob, weighted by the clipped ratio as a constant."""
    ratio: Literal["token", "sequence"] = "token"
    """token: each token's own; sequence: the response's geometric mean for all of its tokens (GSPO)."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Denominator of the loss, always global: tokens of the step, responses (mean per response first), or responses x rollout.max_new_tokens."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus; 0: none."""
    normalize: Literal["std", "mean", "batch", "none"] = "std"
    """Advantage: (r - mean) / std of the group; r - mean; batch-wide whitening; or r."""
    sigma_filter: float | None = None
    """With normalize=batch: advantages beyond this many sigmas become 0 (StableReinforce: 3)."""
    mini_batches: int = 1
    """Optimizer updates a rollout batch, each on a share of its groups (every k-th, the same prompts in any layout)."""
    epochs: int = 1
    """Passes over a rollout batch."""
    tis_cap: float | None = None
    """Truncated importance sampling: cap of policy/rollout weights; null: off, and 2.0 with rollout.staleness > 0."""
    mismatch_cap: float | None = None
    """Leave out responses whose mean policy/rollout ratio a token (geometric) lies outside [1/this, this]; null: none."""


class Trust(Node):
    mode: Literal["paper", "repo", "variance", "off"] = "paper"
    """gamma of a response: paper: exp(min(0, mean score of the group's right - of its wrong answers)), 1 where a side is empty; repo: the public
    code's (outcomes below 0.2 count as unsound unasked, no thinking term in groups all >= 0.9 or all <= 0.1, 1 where no answer is right);
    variance: exp(-variance of the response's thinking.samples); off: 1."""
    alpha: float = 0.3
    """Weight of the thinking term before trust and annealing."""
    anneal: Literal["exp", "linear", "none"] = "exp"
    """Factor of the thinking term after s rollout steps: exp: exp(-s/T); linear: from 1 down to exp(-1) at T, where it stays; none: 1."""
    anneal_steps: float | None = None
    """T of the annealing; null: run.steps."""
    uniform_groups: Literal["score", "center", "skip"] = "score"
    """Groups whose outcomes are all equal: the paper's formula, centred only, or advantage 0."""
    threshold: float = 0.5
    """An outcome at or above it counts as correct."""


class Thinking(Node):
    backend: Literal["off", "local", "endpoint"] = "off"
    """off: no thinking reward; local: the judge of thinking.path in the trainer's process; endpoint: by HTTP, at thinking.url or served by the run."""
    path: str = ""
    """Folder of the thinking reward model (backend local, or endpoint with serve)."""
    url: str = ""
    """OpenAI-compatible base URL or full chat/completions URL (backend endpoint), several replicas separated by commas; OPENAI_API_URL where empty."""
    serve: bool = False
    """With backend endpoint: the run serves thinking.path itself, by vLLM on loopback, from its start to its end; thinking.url stays empty."""
    gpus: list[int] = []
    """GPUs of the judge that the run serves, one tensor-parallel rank each; [] for the first rank's own."""
    gpu_memory: float = 0.3
    """Share of its GPU that the judge takes which the run serves."""
    sleep: bool = False
    """With serve: the judge sleeps from the end of a step's scoring to the next rollouts, for a GPU that it shares with the trainer."""
    model: str = ""
    """Served model name; REWARD_MODEL where empty, `thinking-reward-model` with serve."""
    template: str = "thinking_reward"
    """Judge prompt: a packaged name or a YAML file."""
    on_error: Literal["fail", "drop"] = "drop"
    """fail: an unreachable endpoint stops the run, or refuses its start; drop: it is told of at the start, and its scores are NaN, counted in
    reward/unscored."""
    quorum: float = 1.0
    """Share of a group that must be scored for its thinking term to count."""
    score: Literal["expected", "parse"] = "expected"
    """expected: mean over the score tokens' distribution where the backend gives it; parse: the number in the reply."""
    samples: int = 1
    """Scores a response; trust.mode variance wants 3."""
    concurrency: int = 32
    """Calls under way at once."""
    timeout_s: float = 60.0
    """Deadline of one call."""
    batch_timeout_s: float = 300.0
    """Deadline of one step's scoring."""
    retries: int = 3
    """Times that a call is made again after an error that may pass."""
    cache: str = ""
    """File that keeps scores by content over restarts and runs (backend endpoint); "" for none."""
    include_answer: bool = False
    """Show the judge the answer too; the reasoning alone otherwise."""


class Rewards(Node):
    ocr: Literal["exp_wer", "neg_wer"] = "exp_wer"
    """neg_wer is the paper's wording; it can never reach trust.threshold 0.5."""
    format_gate: bool = True
    """A response that breaks the format earns outcome 0."""
    numeric_tolerance: float = 1e-6
    """Relative tolerance of numerical answers."""
    overlong_cache: int = 0
    """Soft overlong penalty (DAPO): over the last this many tokens before overlong_max it falls from 0 to -1; 0: none. A group whose penalties differ has
    signal for rollout.resample and trust.uniform_groups, even where its outcomes are all equal."""
    overlong_max: int | None = None
    """Longest response that is not penalised in full; null: rollout.max_new_tokens."""
    workers: int = 2
    """Grader processes."""
    timeout_s: float = 10.0
    """A grader is killed after this long for one answer; the answer then counts as unreadable (0, counted in reward/grader_killed and eval/grader_killed)."""
    memory_mb: int = 2048
    """Address space of a grader process, in MB; one that wants more is ended, as after timeout_s."""


class Optim(Node):
    lr: float = 5e-7
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.01
    """Decoupled, of matrices only; biases and norms have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global norm of the gradient; 0: none."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, or down to min_lr at the last update along a cosine or a line."""
    warmup_steps: int = 0
    """Optimizer updates of a linear warm-up; an rl run makes run.steps x algorithm.mini_batches x algorithm.epochs in all."""
    min_lr: float = 0.0
    """Where cosine and linear end."""


class Parallel(Node):
    tensor: int = 1
    """Ranks that share each layer's matrices; divides the attention and key-value heads."""
    pipeline: int = 1
    """Stages that the layers are cut into."""
    stages: list[int] | None = None
    """Layers of each pipeline stage; null: equal shares. The first stage also holds the vision tower, and DeepStack's layers (Qwen3-VL)."""
    data: int | None = None
    """Replicas; null: what is left of the world size."""
    sequence: bool = False
    """Sequence parallelism inside the tensor group."""
    context: int = 1
    """Ranks that share each packed row (context parallelism, for long responses): keys and values are gathered over them in every layer."""


class PolicyConf(Node):
    share_prompt: bool = True
    """Compute a group's prompt and images once; false packs every response with its own copy (the oracle)."""
    tokens_per_row: int = 16384
    """Token budget of a packed row (micro-batch); a group that is longer gets a row of its own."""
    recompute: bool = False
    """Recompute layers in the backward pass."""
    offload_reference: bool = False
    """Keep the reference on the CPU between uses."""
    offload_optimizer: bool = False
    """Between updates, while engines sample, the reference answers and weights travel, keep AdamW's state on the CPU and give back the gradients' memory."""
    attention: Literal["varlen", "flash_attn"] = "varlen"
    """On a GPU in bf16, where segments need no padding: torch's variable-length attention, or that of the package flash-attn. Elsewhere it is padded SDPA."""
    kernels: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Backend of the log-probs and the loss: auto takes the fastest that this device has (the environment variable SOPHIAVL_KERNELS may say
    otherwise); a named one must be there. cpu is the C++ kernel of the log-probs, beside the reference loss."""
    logprob_chunk: int = 1024
    """Rows of logits held at once by the reference log-prob."""
    control_timeout_s: float = 1800.0
    """Deadline of waits on the control group."""


class Memory(Node):
    check: Literal["refuse", "warn", "off"] = "refuse"
    """Before start, where the predicted peak (`doctor CONFIG` lists it) does not fit the device: refuse, say so and go on, or do not look."""
    fraction: float = 0.9
    """Share of a GPU's memory, or of the host's free memory on a CPU, that the plan may fill; the rest is for contexts, buffers of the collectives, gaps."""


class Sft(Node):
    batch_size: int = 64
    """Records an optimizer step, over all replicas."""
    target: Literal["process", "solution", "answer"] = "process"
    """process: the record's trace followed by its solution; solution: the solution alone; answer: the solution inside <answer>..</answer>."""
    soft_score: str | None = None
    """For a judge: the record's field with the exact score in [0, 1] (`reward balance` writes `score`). The solution is then learnt as a distribution over
    the two nearest tenths whose mean is that score; null: the solution as it stands."""


class Eval(Node):
    every: int = 0
    """Evaluate before the first step, every this many steps, and after the last; 0: never."""
    limit: int | None = None
    """Records of data.eval used during training; null: all."""
    max_new_tokens: int | None = None
    """null: rollout.max_new_tokens."""
    temperature: float = 0.0
    """0: greedy decoding; else at least 0.01."""


class Checkpoint(Node):
    every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept."""
    format: Literal["safetensors", "torch_dist"] = "safetensors"
    """safetensors: whole tensors, gathered and written in turns, for any reader; torch_dist: each rank writes its own part at once, by megatron-core's
    distributed checkpointing. Either is recognised and loads in any layout."""
    background: bool = False
    """Write while training goes on: a save then costs a copy to host memory (this rank's share of weights and optimizer), not the disk's time."""


class Monitor(Node):
    tensorboard: bool = True
    """Write TensorBoard's events into the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases, which must be installed and know a key."""
    trackio: bool = False
    """Log to Trackio, which must be installed."""
    progress: bool = True
    """Draw the live view in a terminal; elsewhere each step is a line."""
    samples: bool = True
    """Write samples.jsonl."""


class Debug(Node):
    compare_hf: bool = False
    """Recompute log-probs with Hugging Face: debug/hf_logprob_diff_max."""
    compare_every: int = 1
    """In steps whose number this divides."""
    check_batches: bool = True
    """Check contents of packed rows (boundaries, image tokens against features)."""
    record: str | None = None
    """Folder that keeps every step's sampled responses, for debug.replay. Refused where it would overwrite another run's."""
    replay: str | None = None
    """Train from such a folder: no engine starts; the responses of each step are the recorded ones, in any layout. It must hold every step up to run.steps.
    Weights must follow the recording run's (model, run.seed, optim.lr, losses), or rollout.max_logprob_diff be null."""
    rollout_only: bool = False
    """Sample and score, but leave the weights as they are."""


class Config(Node):
    """The whole tree. `recipe` names the loop in sophiavl_fast/recipes that runs it."""

    recipe: Literal["rl", "sft"] = "rl"
    """rl: Trust-GRPO and its relatives; sft: fine-tuning on traces, or on scores for a judge."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where torch sees one, else the CPU."""
    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    rollout: Rollout = Rollout()
    algorithm: Algorithm = Algorithm()
    trust: Trust = Trust()
    thinking: Thinking = Thinking()
    rewards: Rewards = Rewards()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    policy: PolicyConf = PolicyConf()
    memory: Memory = Memory()
    sft: Sft = Sft()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    monitor: Monitor = Monitor()
    debug: Debug = Debug()


def load(path: str | Path, overrides: Iterable[str] = (), *, environ: Mapping[str, str] | None = None, world_size: int | None = 1) -> Config:
    """Read a YAML file, apply `a.b=value` overrides and the three environment variables, check, and return the tree.

    A file may name a `base:` file (relative to itself) whose values it changes. world_size: processes of the run; None for as many as
    `parallel` asks for at least. Raises UserError, one line, for an unreadable file, an unknown key, a value of the wrong kind or a
    combination that cannot run.
    """
    config = load_unchecked(path, overrides, environ=environ)
    check(config, world_size)
    return config


def load_unchecked(path: str | Path, overrides: Iterable[str] = (), *, environ: Mapping[str, str] | None = None) -> Config:
    """As `load`, without the question whether values are in their ranges and can run together."""
    tree = _read(Path(path))
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq:
            raise UserError(f"override '{item}': expected key=value, such as run.steps=10")
        try:
            value = yaml.safe_load(text) if text.strip() else ""  # a shell's unset variable: YAML would read null
        except yaml.YAMLError:
            value = text
        _set(tree, key.strip(), value, item)
    config = build(tree, str(path))
    _from_environment(config, os.environ if environ is None else environ)
    return config


def build(tree: dict[str, Any], where: str = "config") -> Config:
    """Validate a nested dict against the tree; unknown keys name their nearest valid neighbour."""
    _refuse_unknown(tree, Config, "", where)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {config_errors.told(error, tree)}") from None
    if config.rollout.staleness and config.algorithm.tis_cap is None:
        config.algorithm.tis_cap = STALE_TIS_CAP
    return config


def dump(config: Config) -> str:
    """The resolved tree as YAML (no secrets: keys live in the environment only)."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"config file '{path}' does not exist{nearest(str(path), [str(p) for p in path.parent.glob('*.yaml')])}") from None
    except (OSError, ValueError) as error:  # a name with a null byte, text that is not UTF-8
        raise UserError(f"config file '{path}' cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file '{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree or {}, dict):
        raise UserError(f"config file '{path}' must hold a mapping, not {type(tree).__name__}")
    tree = tree or {}
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str) or "\0" in base:
        raise UserError(f"config file '{path}': base = {base!r}, expected the name of a file beside it")
    found = (path.parent / base).resolve()
    if found in (above := (*above, path.resolve())):
        raise UserError(f"config file '{path}': base = '{base}' leads back to itself")
    return _merge(_read(path.parent / base, above), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        whole = key == "train" or not isinstance(value, dict) or not isinstance(out.get(key), dict)
        out[key] = value if whole else _merge(out[key], value)
    return out


def _set(tree: dict[str, Any], key: str, value: Any, item: str) -> None:
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"override '{item}': '{part}' is a value, not a section")
    node[last] = value


def _refuse_unknown(tree: dict[str, Any], node: type[BaseModel], prefix: str, where: str) -> None:
    for key, value in tree.items():
        if key not in node.model_fields:
            raise UserError(f"{where}: unknown key '{prefix}{key}'{nearest(f'{prefix}{key}', _neighbours(node, prefix, key))}")
        inner = node.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if not isinstance(value, dict):
                raise UserError(f"{where}: '{prefix}{key}' is a section; set one of {', '.join(inner.model_fields)}")
            _refuse_unknown(value, inner, f"{prefix}{key}.", where)
        elif isinstance(value, bool) and {int, float} & {inner, *get_args(inner)} and bool not in (inner, *get_args(inner)):
            raise UserError(f"{where}: {prefix}{key} = {str(value).lower()}: expected a number")
        elif isinstance(value, dict | list) and ("int" in str(inner) or "float" in str(inner)):
            config_errors.refuse_booleans(value, f"{prefix}{key}", where)
        elif value is False and "off" in get_args(inner):
            tree[key] = "off"  # YAML reads an unquoted off as false


def _neighbours(node: type[BaseModel], prefix: str, key: str) -> list[str]:
    """Siblings first; the whole tree's keys where the same name exists elsewhere."""
    elsewhere = [f"{s}.{k}" for s, f in Config.model_fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)
                 for k in f.annotation.model_fields if k == key]
    return elsewhere or [f"{prefix}{k}" for k in node.model_fields]


def _from_environment(config: Config, environ: Mapping[str, str]) -> None:
    """SophiaVL-R1's variables, where the config is silent. OPENAI_API_KEY is read by the client and never stored."""
    if config.thinking.backend == "endpoint":
        if config.thinking.serve:
            config.thinking.model = config.thinking.model or "thinking-reward-model"
            return
        config.thinking.url = config.thinking.url or environ.get("OPENAI_API_URL", "")
        config.thinking.model = config.thinking.model or environ.get("REWARD_MODEL", "")
