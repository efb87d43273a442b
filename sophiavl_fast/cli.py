"""The command line. Bad input is one line on stderr and exit code 2, under torchrun from the first rank only."""
from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sophiavl_fast import __version__, config, config_checks, reward_commands
from sophiavl_fast import argument_types as take
from sophiavl_fast.compat.quiet import quiet
from sophiavl_fast.errors import EngineError, UserError

TYPES = ("numerical", "multiple_choice", "ocr", "free_form", "text")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 an engine failed, 2 bad input or a file that cannot be used, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    quiet()
    try:
        return arguments.command(arguments) or 0
    except UserError as error:
        _say(error)
        return 2
    except EngineError as error:
        _say(error)
        return 1
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise   # no file's: a lost connection or a timeout is ours to look into
        _say(f"{type(error).__name__}: {error}", every_rank=True)   # a full disk, a folder without permission
        return 2
    except KeyboardInterrupt:
        _say("interrupted; `train` with run.resume=auto goes on from the newest checkpoint")
        return 130


def _say(error: Exception | str, *, every_rank: bool = False) -> None:
    speaks = config_checks.speaks(os.environ)
    if speaks or every_rank:
        rank = "" if speaks else f"rank {os.environ['RANK']}: "
        print(f"sophiavl-fast: {rank}{' '.join(str(error).split())}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SystemExit(_usage(self.prog, message))


def _usage(prog: str, message: str) -> int:
    if config_checks.speaks(os.environ):
        print(f"{prog}: {message}; see {prog} --help", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    top = _Parser(prog="sophiavl-fast", description=__doc__.splitlines()[0])
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run, help: str, parent=None) -> argparse.ArgumentParser:
        sub = (parent or commands).add_parser(name, help=help, description=help)
        sub.set_defaults(command=run)
        return sub

    train = command("train", _train, "run a recipe: train CONFIG [a.b=value ...]")
    train.add_argument("config", help="YAML file, such as configs/demo.yaml")
    train.add_argument("overrides", nargs="*", metavar="a.b=value")

    evaluate = command("evaluate", _evaluate, "greedy accuracy and sound reasoning on a dataset")
    evaluate.add_argument("--model", required=True, help="Hugging Face folder")
    evaluate.add_argument("--data", required=True, help="dataset name in the registry")
    evaluate.add_argument("--registry", default="", help="registry file (dataset_info.json's form)")
    evaluate.add_argument("--out", required=True, help="JSON file to write")
    evaluate.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="which engine answers")
    evaluate.add_argument("--templates", default="sophia", help="prompt template, packaged name or YAML file")
    evaluate.add_argument("--max-new-tokens", type=take.positive, default=1024)
    evaluate.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    evaluate.add_argument("--limit", type=take.positive, default=None, help="so many records only, evenly spaced")

    infer = command("infer", _infer, "answer one question about one image")
    infer.add_argument("--model", required=True)
    infer.add_argument("--image", action="append", default=[], help="image file; repeat for several")
    infer.add_argument("--type", choices=TYPES, default="free_form", help="problem type: chooses the prompt's suffix")
    infer.add_argument("--templates", default="sophia")
    infer.add_argument("--max-new-tokens", type=take.positive, default=2048)
    infer.add_argument("question")

    export = command("export", _export, "write a checkpoint as a Hugging Face folder (safetensors)")
    export.add_argument("checkpoint", help="such as runs/demo/checkpoints/step_40")
    export.add_argument("out")

    report = command("report", _report, "write report.html of a run")
    report.add_argument("run_dir")

    doctor = command("doctor", _doctor, "what this machine can run, and what to do about what it cannot")
    doctor.add_argument("config", nargs="?")
    doctor.add_argument("overrides", nargs="*", metavar="a.b=value")

    reward_commands.add(commands, command, _Parser)

    data = commands.add_parser("data", help="datasets").add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    check = command("check", _data_check, "read every record and image of a dataset; list what is bad", data)
    check.add_argument("name")
    check.add_argument("--registry", default="")
    check.add_argument("--model", default="", help="Hugging Face folder whose processor counts the tokens")
    check.add_argument("--templates", default="sophia")
    check.add_argument("--min-pixels", type=take.positive, default=None, help="smallest image area, the run's model.min_pixels; needs --model")
    check.add_argument("--max-pixels", type=take.positive, default=None, help="largest image area, the run's model.max_pixels; needs --model")
    check.add_argument("--max-prompt-tokens", type=take.positive, default=None, help="the run's data.max_prompt_tokens; needs --model")
    check.add_argument("--max-new-tokens", type=take.positive, default=None, help="the run's rollout.max_new_tokens; needs --model")
    return top


def _train(a) -> int:
    from sophiavl_fast.monitor import budget
    from sophiavl_fast.recipes import muster

    world = config_checks.launched(os.environ)
    muster.before_it()
    tree = config.load_unchecked(a.config, a.overrides)
    if config_checks.world_size(os.environ) is None:
        config_checks.refuse_alone(tree, shlex.join(["train", a.config, *a.overrides]))
    config.check(tree, world)
    with muster.refusals(tree.run.dir):
        config_checks.check_start(tree, os.environ)
        budget.require(tree, world)
    if tree.recipe == "sft":
        from sophiavl_fast.recipes.sft import train
    else:
        from sophiavl_fast.recipes.rl import train
    return train(tree)


def _evaluate(a) -> int:
    from sophiavl_fast.evaluate.command import evaluate

    return evaluate(a.model, a.data, a.registry, Path(a.out), engine=a.engine, templates=a.templates,
                    max_new_tokens=a.max_new_tokens, dtype=a.dtype, limit=a.limit)


def _infer(a) -> int:
    from sophiavl_fast.evaluate.infer import infer

    print(infer(a.model, a.image, a.question, problem_type=a.type, templates=a.templates, max_new_tokens=a.max_new_tokens))
    return 0


def _export(a) -> int:
    from sophiavl_fast.recipes.export import export

    return export(Path(a.checkpoint), Path(a.out))


def _report(a) -> int:
    from sophiavl_fast.monitor.report import write_report

    print(write_report(Path(a.run_dir)))
    return 0


def _doctor(a) -> int:
    from sophiavl_fast.monitor.doctor import doctor

    if not a.config:
        return doctor(None)
    tree = config.load(a.config, a.overrides, world_size=None)
    try:
        from sophiavl_fast.recipes.preflight import judge_rows
    except ImportError:                 # of torch and the like: a row of the machine
        return doctor(tree)
    return doctor(tree, also=judge_rows)


def _data_check(a) -> int:
    from sophiavl_fast.data.check import command
    from sophiavl_fast.evaluate.records import refuse_unusable

    return command(a.name, registry=a.registry, model=a.model, templates=a.templates, min_pixels=a.min_pixels, max_pixels=a.max_pixels,
                   max_prompt_tokens=a.max_prompt_tokens, max_new_tokens=a.max_new_tokens, check=refuse_unusable)
