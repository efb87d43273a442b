"""`reward annotate | balance | average | serve | evaluate`: the thinking reward model from raw traces to a served judge."""
from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sophiavl_fast import argument_types as take
from sophiavl_fast.errors import UserError

Command = Callable[..., argparse.ArgumentParser]


def add(commands: Any, command: Command, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add `reward` and its commands to the top parser; `command(name, run, help, parent)` makes one."""
    reward = commands.add_parser("reward", help="the thinking reward model: score traces, balance, average, serve, evaluate")
    group = reward.add_subparsers(required=True, metavar="COMMAND", parser_class=parser_class)
    _annotate_options(command("annotate", _annotate, "score traces with one or several judges; kill it and run it again at will", group))
    _balance_options(command("balance", _balance, "filter scored traces and sample them evenly over ten score intervals, ready for `train`", group))
    average = command("average", _average, "one model with the mean weights of several (WARM)", group)
    average.add_argument("out", help="folder to write")
    average.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face folders of one architecture")
    serve = command("serve", _serve, "serve a thinking reward model by vLLM, behind a token, until interrupted", group)
    serve.add_argument("model", help="Hugging Face folder")
    serve.add_argument("--port", type=take.port, default=8000, help="0: a free one")
    serve.add_argument("--host", default="127.0.0.1", help="other than loopback only where you mean it")
    serve.add_argument("--name", default="thinking-reward-model", help="served model name")
    serve.add_argument("--template", default="thinking_reward", help="judge template, for the printed lines")
    serve.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    serve.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    serve.add_argument("--tensor-parallel", type=take.positive, default=1)
    serve.add_argument("--max-model-len", type=take.positive, default=None)
    serve.add_argument("--max-num-seqs", type=take.positive, default=64)
    serve.add_argument("--gpu-memory", type=take.share, default=0.9, help="share of the GPU's memory")
    serve.add_argument("--log", default="", help="file for the server's log; a temporary one otherwise")
    serve.add_argument("--timeout", type=take.seconds, default=600.0, help="seconds until it must answer")
    _evaluate_options(command("evaluate", _evaluate, "does a judge deserve trust: agreement with held-out labels, or pair accuracy", group))


def _asking_options(parser: argparse.ArgumentParser, *, score: str) -> None:
    """How a judge is asked, the same for annotate and evaluate."""
    parser.add_argument("--input", required=True, help="JSONL of {id, question, images: [path], response}")
    parser.add_argument("--url", action="append", required=True, help="OpenAI-compatible base URL; commas separate replicas of one judge; repeat for judges")
    parser.add_argument("--model", action="append", required=True, help="served name; as many as --url")
    parser.add_argument("--key-variable", action="append", default=[], metavar="NAME",
                        help="environment variable that holds a judge's key (default OPENAI_API_KEY); once for all, or one a judge")
    parser.add_argument("--images", default="", help="base folder of image paths, which they may not leave (default: the input's folder)")
    parser.add_argument("--template", default="thinking_reward", help="judge prompt: a packaged name or a YAML file")
    parser.add_argument("--score", choices=("parse", "expected"), default=score, help="the number in the reply, or the mean over its log-probs")
    parser.add_argument("--include-answer", action="store_true", help="show the judge the answer too")
    parser.add_argument("--concurrency", type=take.positive, default=32)
    parser.add_argument("--timeout", type=take.seconds, default=60.0, help="seconds of one call")
    parser.add_argument("--retries", type=take.count, default=4, help="further tries of a call that failed")
    parser.add_argument("--samples", type=take.positive, default=1, help="scores a trace and judge; their spread is kept")
    parser.add_argument("--cache", default="", help="file that keeps scores by content over runs")
    parser.add_argument("--max-calls", type=take.positive, default=None, help="stop before more calls than this")
    parser.add_argument("--max-tokens", type=take.positive, default=None, help="stop after this many tokens, as the servers count them")


def _annotate_options(parser: argparse.ArgumentParser) -> None:
    _asking_options(parser, score="parse")
    parser.add_argument("--out", required=True, help="JSONL to write, or to go on with: each trace with its score and error")
    parser.add_argument("--give-up", type=take.seconds, default=120.0, help="seconds without any score after which the server counts as gone")
    parser.add_argument("--retry-errors", action="store_true", help="ask again about traces that an earlier run left without a score")
    parser.add_argument("--keep-replies", action="store_true", help="keep what the judges wrote (rationales)")


def _balance_options(parser: argparse.ArgumentParser) -> None:
    from sophiavl_fast.rewards.model.filters import RULES

    parser.add_argument("--input", required=True, help="scored JSONL, from `reward annotate`")
    parser.add_argument("--out", required=True, help="folder to write: records, registry, histogram, data card")
    parser.add_argument("--images", default="", help="base folder of image paths (default: the input's folder)")
    parser.add_argument("--template", default="thinking_reward", help="judge prompt that the model is trained and served with")
    parser.add_argument("--minimum", type=take.count, default=0, help="refuse where an interval holds fewer")
    parser.add_argument("--maximum", type=take.positive, default=None, help="at most this many an interval (default: three times the smallest, see docs)")
    parser.add_argument("--held-out", type=take.share_kept_apart, default=0.1, help="share of the traces kept apart, by picture")
    parser.add_argument("--skip-rule", action="append", default=[], choices=sorted(RULES), metavar="RULE", help=f"rule not to apply: {', '.join(RULES)}")
    parser.add_argument("--max-spread", type=take.share, default=0.25, help="largest spread between judges or samples")
    parser.add_argument("--max-chars", type=take.positive, default=16000, help="longest reasoning")
    parser.add_argument("--include-answer", action="store_true", help="the judge sees the answer too")
    parser.add_argument("--rationale", action="store_true", help="train on the judge's kept reply (annotate --keep-replies) before its score")
    parser.add_argument("--seed", type=int, default=0)


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _asking_options(parser, score="expected")
    parser.add_argument("--out", required=True, help="JSON result; a calibration picture is written beside it")
    parser.add_argument("--layout", choices=("scores", "vl-rewardbench"), default="scores",
                        help="scores: lines with a label `score`; vl-rewardbench: pairs of responses, asked in both orders")
    parser.add_argument("--threshold", type=take.share, default=0.8, help="labels below it are flawed, the others sound")
    parser.add_argument("--pairs", choices=("auto", "compare", "score"), default="auto",
                        help="compare: both responses in one prompt; score: each alone; auto: compare where the judge can")


def _annotate(a: argparse.Namespace) -> int:
    from sophiavl_fast.rewards.model.annotate import annotate

    counts = _in_command_words(lambda: annotate(Path(a.input), Path(a.out), _judges(a), _asking(a), open_image=_open_image, images=a.images,
                                                give_up_s=a.give_up, keep_replies=a.keep_replies, retry_errors=a.retry_errors))
    rate = counts["asked"] / counts["seconds"] if counts["seconds"] else 0.0
    print(f"{counts['traces']:,} traces in {a.out}: {counts['scored']:,} scored, {counts['unscored']:,} without a score"
          + (f", {counts['left']:,} left when the budget was spent" if counts["left"] else "")
          + f"; now {counts['asked']:,} with {counts['calls']:,} calls in {counts['seconds']:.1f} s ({rate:,.1f}/s)")
    for cause, count in counts["causes"].items():
        print(f"  {count:,} x {cause}", file=sys.stderr)
    if counts["traces"] and not counts["scored"] and not counts["budget_spent"]:
        raise UserError(f"no trace could be scored: {next(iter(counts['causes']))}")
    return 0


def _balance(a: argparse.Namespace) -> int:
    from sophiavl_fast.rewards.model.balance import Plan, balance

    plan = Plan(template=a.template, minimum=a.minimum, maximum=a.maximum, held_out=a.held_out, skip_rules=tuple(a.skip_rule), max_spread=a.max_spread,
                max_chars=a.max_chars, include_answer=a.include_answer, rationale=a.rationale, seed=a.seed, images=a.images)
    print(_in_command_words(lambda: balance(Path(a.input), Path(a.out), plan)))
    return 0


def _average(a: argparse.Namespace) -> int:
    from sophiavl_fast.rewards.model.average import average

    print(json.dumps(average(Path(a.out), [Path(model) for model in a.models])))
    return 0


def _serve(a: argparse.Namespace) -> int:
    from sophiavl_fast.recipes.judge_server import Serving
    from sophiavl_fast.recipes.serve_judge import serve

    how = Serving(port=a.port, host=a.host, name=a.name, dtype=a.dtype, tensor_parallel=a.tensor_parallel, max_model_len=a.max_model_len,
                  max_num_seqs=a.max_num_seqs, gpu_memory=a.gpu_memory)
    return int(_in_command_words(lambda: serve(Path(a.model), how, template=a.template, device=a.device, log=a.log, timeout_s=a.timeout)))


def _evaluate(a: argparse.Namespace) -> int:
    from sophiavl_fast.evaluate.judge.command import evaluate

    if len(a.url) > 1:
        raise UserError("--url: `reward evaluate` judges one judge; several replicas of it are one --url, separated by commas")
    result = _in_command_words(lambda: evaluate(Path(a.input), Path(a.out), _judges(a), _asking(a), layout=a.layout, open_image=_open_image,
                                                images=a.images, threshold=a.threshold, mode=a.pairs))
    print(result)
    return 0


def _judges(a: argparse.Namespace) -> list[Any]:
    from sophiavl_fast.rewards.model.panel import JudgeSpec

    if len(a.url) != len(a.model):
        raise UserError(f"{len(a.url)} --url and {len(a.model)} --model: name as many of each (replicas of one judge are one --url, separated by commas)")
    keys = a.key_variable or ["OPENAI_API_KEY"]
    if len(keys) not in (1, len(a.url)):
        raise UserError(f"--key-variable: {len(keys)} for {len(a.url)} judges; name one for all, or one a judge")
    return [JudgeSpec(url, model, key) for url, model, key in zip(a.url, a.model, keys * (len(a.url) if len(keys) == 1 else 1), strict=True)]


def _asking(a: argparse.Namespace) -> Any:
    from sophiavl_fast.rewards.model.panel import Asking
    from sophiavl_fast.rewards.thinking.caller import Budget

    budget = Budget(a.max_calls or math.inf, a.max_tokens or math.inf)
    return Asking(concurrency=a.concurrency, timeout_s=a.timeout, retries=a.retries, samples=a.samples, score=a.score, template=a.template,
                  include_answer=a.include_answer, cache=a.cache, budget=budget)


def _open_image(path: str) -> Any:
    from sophiavl_fast.data.images import open_image

    return open_image(path)


def _in_command_words(run: Callable[[], Any]) -> Any:
    """The judge's client speaks of config keys; here they are options."""
    from sophiavl_fast.rewards.model.panel import command_words

    try:
        return run()
    except UserError as error:
        raise UserError(command_words(str(error))) from None
