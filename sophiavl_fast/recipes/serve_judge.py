"""`reward serve MODEL`: a thinking reward model behind vLLM's OpenAI-compatible server, until interrupted (judge_server.py)."""
from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sophiavl_fast import model_folder
from sophiavl_fast.errors import UserError
from sophiavl_fast.recipes.judge_server import KEY_VARIABLE, JudgeServer, Serving
from sophiavl_fast.rewards.thinking import template as templates
from sophiavl_fast.rollout.environment import resolve_device


def serve(model: Path, how: Serving, *, template: str = "thinking_reward", device: str = "auto", log: str = "", timeout_s: float = 600.0) -> int:
    """Serve until SIGINT or SIGTERM (exit code 0). Raises UserError (no such model, port taken), EngineError (the server did not start, or ended)."""
    _check(model, template, how)
    kind = resolve_device(device)
    log_path = Path(log) if log else Path(tempfile.mkdtemp(prefix="reward-serve-")) / "server.log"
    with _until_told(), JudgeServer(model, how, device=kind, log=log_path, key=os.environ.get(KEY_VARIABLE, "")) as server:
        print(f"starting {how.name} from {model} on {kind}; log: {log_path}", flush=True)
        try:
            server.wait_ready(timeout_s)
            print(lines_to_paste(server.address, how.name, template, None if os.environ.get(KEY_VARIABLE) else server.key), flush=True)
            server.wait()
        except KeyboardInterrupt:
            print("ending the server", flush=True)
            return 0
        server.refuse_dead("serving")
    return 1


def lines_to_paste(url: str, name: str, template: str, key: str | None) -> str:
    """What the trainer's config and environment need; the key only where it was made here."""
    lines = [f"ready at {url}/v1", "", "# in the trainer's config:", "thinking:", "  backend: endpoint", f"  url: {url}/v1", f"  model: {name}",
             f"  template: {template}", ""]
    lines += ["# in the trainer's environment:", f"export {KEY_VARIABLE}={key}"] if key else [f"# the trainer needs the same {KEY_VARIABLE} as this server has"]
    return "\n".join(lines)


def _check(model: Path, template: str, how: Serving) -> None:
    model_folder.refuse_missing(model, "")
    if not 0 <= how.port <= 65535:
        raise UserError(f"--port {how.port}: must lie in 0..65535")
    templates.load(template)
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise UserError("reward serve needs vLLM, which is not installed; run `make install` (extra `cpu` or `gpu`)")
    if how.host not in ("127.0.0.1", "localhost"):
        print(f"note: --host {how.host} is reachable from other machines; whoever has the key can use it, and nothing is encrypted", flush=True)


@contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as SIGINT does."""
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
