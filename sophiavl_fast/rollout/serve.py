"""Start a rollout server by hand, for `rollout.urls` of a run elsewhere: python -m sophiavl_fast.rollout.serve CONFIG [a.b=value ...]

It listens on 127.0.0.1 at `rollout.port` and wants the token of SOPHIAVL_ROLLOUT_TOKEN, as does the run that uses it
(other machines reach it through a tunnel). It runs in the foreground until interrupted.
"""
from __future__ import annotations

import os
import sys

from sophiavl_fast.config import load
from sophiavl_fast.errors import UserError
from sophiavl_fast.rollout.client import transfer_backend
from sophiavl_fast.rollout.environment import child_environment, resolve_device
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.server import pick_port, server_command, server_variables


def main(arguments: list[str]) -> None:
    """Replace this process by the server. Raises UserError for a bad config, a taken port or a missing token."""
    if not arguments:
        raise UserError("usage: python -m sophiavl_fast.rollout.serve CONFIG [a.b=value ...]")
    config = load(arguments[0], ["rollout.engine=server", *arguments[1:], "parallel={}"], world_size=None)    # the trainer's layout is not this process's
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(f"set the environment variable {TOKEN_VARIABLE} to a secret that the run will use too")
    device = resolve_device(config.device)
    backend = transfer_backend(config.rollout, device, found=True)
    url = f"http://127.0.0.1:{pick_port(config.rollout.port)}"
    print(f"rollout.urls=[{url}]  rollout.transfer={backend}", flush=True)
    command = server_command(config, device, backend, url)
    os.execve(command[0], command, child_environment(device, os.environ, server_variables(token, backend)))


def command(arguments: list[str]) -> int:
    """`main`, bad input as one line and exit code 2."""
    try:
        main(arguments)
    except UserError as error:
        print(f"sophiavl-fast: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
