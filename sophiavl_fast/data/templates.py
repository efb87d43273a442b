"""Prompt templates: a YAML file that turns a question into chat messages.

    system: ...            # "" for none
    question: ...          # jinja: how options join the problem; sees problem, options, problem_type
    user: ...              # jinja: the user's message; sees question, suffix, problem, options, problem_type
    suffix: {numerical: ..., multiple_choice: ..., ocr: ..., free_form: ..., text: ...}

Templates run sandboxed and strict: an unknown variable is an error. `options | lettered` gives `A. first`, `B. second`, ...
"""
from __future__ import annotations

import os
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sophiavl_fast.errors import UserError, nearest

TYPES = ("numerical", "multiple_choice", "ocr", "free_form", "text")
IMAGE = "<image>"
MOST_OPTIONS = len(string.ascii_uppercase)
PACKAGED = Path(__file__).with_name("templates")
_KEYS = ("system", "question", "user", "suffix")
_LETTERED = re.compile(r"\s*\(?([A-Z])[.):]\s*\S")


@dataclass(frozen=True)
class Template:
    """A loaded template; `name` is what the config called it."""

    name: str
    system: str
    question_text: Any
    user_text: Any
    suffix: dict[str, str]

    def question(self, problem: str, *, problem_type: str, options: Sequence[str] = ()) -> str:
        """The user's question, options included. Raises UserError."""
        return self._render(self.question_text, problem=problem, options=list(options), problem_type=problem_type)

    def messages(self, problem: str, *, problem_type: str, options: Sequence[str] = (), images: int = 0) -> list[dict[str, Any]]:
        """Chat messages with `images` content parts, at the problem's `<image>` marks where it has them, else before the text.

        Raises UserError: as many marks as images, or none at all, are expected.
        """
        values = {"problem": problem, "options": list(options), "problem_type": problem_type, "suffix": self.suffix.get(problem_type, "")}
        text = self._render(self.user_text, question=self._render(self.question_text, **values), **values)
        marks = text.count(IMAGE)
        if marks not in (0, images) or (marks and not images):
            raise UserError(f"the question has {marks} {IMAGE} placeholders for {images} images")
        pieces = text.split(IMAGE) if marks else [*[""] * images, text]
        content: list[dict[str, str]] = []
        for i, piece in enumerate(pieces):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": piece}] if piece else []
        user = [{"role": "user", "content": content}]
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *user] if self.system else user

    def _render(self, template: Any, **values: Any) -> str:
        try:
            return template.render(**values)
        except UserError:
            raise
        except Exception as error:  # an expression of the template may raise anything: 1/0, options + problem
            raise UserError(f"template '{self.name}': {' '.join(str(error).split()) or type(error).__name__}") from None


@cache
def load(name: str) -> Template:
    """A packaged template by name, or a YAML file by path. Raises UserError: no such template, or one that is malformed."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PACKAGED / f"{name}.yaml"
    if not os.path.isfile(path):
        raise UserError(f"template '{name}' does not exist{nearest(name, (p.stem for p in PACKAGED.glob('*.yaml')))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"template '{path}' cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("user"), str):
        raise UserError(f"template '{path}': expected the keys {', '.join(_KEYS)}; 'user' is needed")
    for key in tree:
        if key not in _KEYS:
            raise UserError(f"template '{path}': unknown key '{key}'{nearest(str(key), _KEYS)}")
    suffix = {} if tree.get("suffix") is None else tree["suffix"]
    if not isinstance(suffix, dict):
        raise UserError(f"template '{path}': 'suffix' must map problem types to texts, not {suffix!r}")
    for kind in suffix:
        if kind not in TYPES:
            raise UserError(f"template '{path}': suffix for unknown problem_type '{kind}'{nearest(str(kind), TYPES)}")
    question, system = _text(path, "question", tree.get("question")) or "{{ problem }}", _text(path, "system", tree.get("system"))
    endings = {kind: _text(path, f"suffix.{kind}", text).strip() for kind, text in suffix.items()}
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["lettered"] = lettered
    try:
        return Template(name, system, environment.from_string(question), environment.from_string(tree["user"]), endings)
    except TemplateError as error:
        raise UserError(f"template '{path}': {error}") from None


def _text(path: Path, key: str, value: Any) -> str:
    """A value of the file, "" for null."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"template '{path}': '{key}' must be text, not {value!r}")
    return value or ""


def lettered(options: Sequence[str]) -> list[str]:
    """`A. first`, `B. second`, ...; options that carry their letters already, each its own place's, stay as they are. Raises UserError beyond Z."""
    if len(options) > MOST_OPTIONS:
        raise UserError(f"{len(options)} options; letters name at most {MOST_OPTIONS}")
    found = [_LETTERED.match(option) for option in options]
    if all(match and match[1] == letter for match, letter in zip(found, string.ascii_uppercase, strict=False)):
        return list(options)
    return [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
