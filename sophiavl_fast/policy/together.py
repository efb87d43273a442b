"""Work that may fail on one rank of many, where the others must not wait for what it will not bring."""
from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from sophiavl_fast.errors import EngineError, UserError

OS_ERROR = re.compile(r"\(os error (\d+)\)")   # as a library in Rust tells it


def together(work: Callable[[], Any], group: ProcessGroup) -> list[Any]:
    """Do this rank's work, then hear of everyone's: what each gave, pickled, in the order of ranks. All ranks of `group` call it.

    Where one failed, all raise alike: UserError for what a user can mend (its own, or the operating system's: a full disk), else EngineError.
    """
    given, failure = None, None
    try:
        given = work()
    except Exception as error:
        failure = error
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, (given, failure and _told(failure)), group=group)
    except RuntimeError as error:
        raise failure or EngineError(f"rank {dist.get_rank()} waited for the other ranks in vain: {str(error).splitlines()[0]}") from error
    for rank, (_, told) in enumerate(found):
        if told:
            kind, whose, text = told
            raise kind(text if whose == "everyone's" or len(found) == 1 else f"rank {rank}: {text}") from failure
    return [given for given, _ in found]


def _told(failure: Exception) -> tuple[type[Exception], str, str]:
    """Its kind, whose mistake it is, and what to say of it."""
    if isinstance(failure, UserError):
        return UserError, "everyone's", str(failure)
    if reason := system_error(failure):
        return UserError, "this rank's", reason
    return EngineError, "this rank's", f"{type(failure).__name__}: {failure}"


def system_error(failure: BaseException) -> str | None:
    """What the operating system refused at the root of a failure, such as "No space left on device"; libraries raise errors of their own on top of it."""
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return f"{seen.strerror}{f': {seen.filename}' if seen.filename else ''}"
        if match := OS_ERROR.search(str(seen)):
            return os.strerror(int(match[1]))
        seen = seen.__cause__ or seen.__context__
    return None
