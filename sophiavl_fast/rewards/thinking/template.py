"""Judge prompts: a YAML file that turns a question and its reasoning into a chat and says how the score is replied.

    system: ...   # "" for none
    user: ...     # jinja, sandboxed and strict; sees question, reasoning, answer ("" unless thinking.include_answer)
    reply: ...    # the whole reply, with {score} where the number stands: '<answer>{score}</answer>'

What the policy wrote goes into the prompt as data: whatever looks like a chat token of its own (`<|im_end|>`) is broken up,
or a response could close the user's turn and write the judge's reply itself.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sophiavl_fast.errors import UserError, nearest

PACKAGED = Path(__file__).parents[1] / "templates"
_KEYS = ("system", "user", "reply")
_VARIABLES = {"question", "reasoning", "answer"}
_CHAT_TOKEN = re.compile(r"<(?=\|[^|<>\s]{1,64}\|>)|<(?=image>)")


@dataclass(frozen=True)
class JudgeTemplate:
    """A loaded template; `shows_answer`: its text has a place for the answer."""

    name: str
    system: str
    user_text: Any
    reply: str
    shows_answer: bool

    def user(self, question: str, reasoning: str, answer: str = "") -> str:
        """The user's message for one response; marks for images are dropped, since all images go before the text. Raises UserError."""
        if "<image>" in question:
            question = question.replace("<image>", "").strip()
        try:
            return self.user_text.render(question=harmless(question), reasoning=harmless(reasoning), answer=harmless(answer))
        except Exception as error:  # an expression of the template may raise anything: 1/0, question + 1
            raise UserError(f"thinking.template '{self.name}': {' '.join(str(error).split()) or type(error).__name__}") from None

    @property
    def before(self) -> str:
        """What the reply says before the number."""
        return self.reply.partition("{score}")[0]

    @property
    def after(self) -> str:
        """What the reply says after the number."""
        return self.reply.partition("{score}")[2]


def harmless(text: str) -> str:
    """The text with every look-alike of a chat or image token broken by a space."""
    return _CHAT_TOKEN.sub("< ", text)


@cache
def load(name: str) -> JudgeTemplate:
    """A packaged template by name, or a YAML file by path. Raises UserError: no such template, or one that is malformed."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PACKAGED / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"thinking.template '{name}' does not exist{nearest(name, (p.stem for p in PACKAGED.glob('*.yaml')))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"thinking.template '{path}' cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), str) for key in ("user", "reply")):
        raise UserError(f"thinking.template '{path}': the texts 'user' and 'reply' are needed")
    for key in tree:
        if key not in _KEYS:
            raise UserError(f"thinking.template '{path}': unknown key '{key}'{nearest(str(key), _KEYS)}")
    if not isinstance(tree.get("system"), str | None):
        raise UserError(f"thinking.template '{path}': 'system' must be text, not {tree['system']!r}")
    if tree["reply"].count("{score}") != 1:
        raise UserError(f"thinking.template '{path}': 'reply' must hold {{score}} once, as in '<answer>{{score}}</answer>'")
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    try:
        used = meta.find_undeclared_variables(environment.parse(tree["user"]))
        compiled = environment.from_string(tree["user"])
    except TemplateError as error:
        raise UserError(f"thinking.template '{path}': {error}") from None
    for variable in sorted(used - _VARIABLES):
        raise UserError(f"thinking.template '{path}': unknown variable '{variable}'{nearest(variable, _VARIABLES)}")
    return JudgeTemplate(name, tree.get("system") or "", compiled, tree["reply"].strip(), "answer" in used)
