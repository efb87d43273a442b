"""A grader process: one task a line in, "begun" and one outcome a line out, as JSON. Started by sandbox.py, never imported by the trainer.

`python -m sophiavl_fast.rewards.worker MEMORY_MB SECONDS`

It ends when its input ends, so that no worker outlives the trainer. In the middle of a grade nothing could tell it (one
big-integer operation holds the interpreter for hours), so the kernel does: each grade gets SECONDS of processor time, a
little more than the trainer would wait.
"""
from __future__ import annotations

import json
import os
import resource
import signal
import sys

OUT_OF_MEMORY = 99  # exit code


def main(memory_mb: int, seconds: float) -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes our input
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not look like a reply
    from sophiavl_fast.rewards.graders import grade, prepare
    from sophiavl_fast.rewards.graders.task import Task

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    sys.setrecursionlimit(2000)
    for line in sys.stdin:
        task = Task(*json.loads(line))
        prepare(task.kind)
        _allow(seconds)
        replies.write('"begun"\n')
        try:
            reply: float | str = grade(task)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"[:200]
        replies.write(json.dumps(reply) + "\n")


def _allow(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds + 2)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
