"""Whether a server of `rollout.urls` holds the run's own model, of which it takes the weights only: no transfer tells two models of the same shapes apart."""
from __future__ import annotations

import os
from ipaddress import ip_address
from typing import Any

from sophiavl_fast import model_folder
from sophiavl_fast.config import Config
from sophiavl_fast.errors import EngineError, EngineLost, UserError
from sophiavl_fast.rollout.arguments import max_model_len, pixel_limits
from sophiavl_fast.rollout.machine import own_address, this_machine
from sophiavl_fast.rollout.middleware import TOKEN_VARIABLE
from sophiavl_fast.rollout.transfer.http import HttpControl

METHOD = "sophia_model"


def refuse_others(config: Config, urls: list[str]) -> None:
    """UserError for one of these servers that holds another model. One that does not answer yet is compared later, once it does (`Pool.open`)."""
    for url in urls:
        control = HttpControl(url, os.environ.get(TOKEN_VARIABLE, ""), config.rollout.transfer_timeout_s, None)
        try:
            refuse_other(config, control)
        except EngineLost:
            continue
        finally:
            control.close()


def refuse_other(config: Config, control: HttpControl) -> None:
    """UserError where this server holds another model than model.path, holds it in another precision, sees images in another size, or does not say.

    Fields are compared where both name them: another machine's transformers may know others.
    """
    there, path = _told(control), config.model.path
    _refuse_tunnel(config, control.url, there.get("machine", {}))
    own, fields = model_folder.described(model_folder.open_config(path)), there["fields"]
    for key in sorted(own.keys() & fields.keys(), key=lambda key: (key != "model_type", key)):
        if own[key] != fields[key]:
            raise UserError(f"rollout.urls: '{control.url}' serves another model: {key} is {fields[key]!r} there, {own[key]!r} here; "
                            f"set model.path='{there['path']}', or start the server anew with model.path='{path}'")
    if there["dtype"] != config.model.dtype:
        raise UserError(f"rollout.urls: '{control.url}' serves the model in another precision: {there['dtype']} there, model.dtype = {config.model.dtype} "
                        f"here; set model.dtype={there['dtype']}, or start the server anew with model.dtype={config.model.dtype}")
    if there["longest"] < (needed := max_model_len(config)):
        raise UserError(f"rollout.urls: '{control.url}' holds {there['longest']} tokens of a prompt and its response, this run {needed}; set "
                        f"rollout.max_model_len={there['longest']}, or start the server anew with the run's settings")
    if there["pixels"] != (here := pixel_limits(config)):
        name = min(key for key in there["pixels"] | here if there["pixels"].get(key) != here.get(key))
        theirs, ours = ("null" if v is None else v for v in (there["pixels"].get(name), here.get(name)))
        raise UserError(f"rollout.urls: '{control.url}' serves with model.{name} = {theirs}, this run has {ours}; set model.{name}={theirs}, or start the "
                        "server anew with the run's settings")


def _refuse_tunnel(config: Config, url: str, machine: dict[str, str]) -> None:
    """UserError for a tunnel's end without the way back: the engine would look for the weights on its own machine, until the transfer's deadline."""
    here, rollout = this_machine(), config.rollout
    told = all(m.get("loopback", "").strip() for m in (machine, here))
    if rollout.transfer_host or rollout.transfer == "ipc" or not told or machine["loopback"] == here["loopback"]:    # ipc passes handles, with the requests
        return
    if ip_address(own_address(url)).is_loopback:
        raise UserError(f"rollout.urls: '{url}' is a tunnel to the engine's machine ({machine['name']}), and weights go from there to here directly; set "
                        f"rollout.transfer_host to the address at which {machine['name']} reaches this machine")


def _told(control: HttpControl) -> dict[str, Any]:
    try:
        return control.rpc(METHOD)[0]
    except EngineLost:
        raise
    except EngineError as error:
        if METHOD not in str(error):
            raise
        raise UserError(f"rollout.urls: '{control.url}' does not tell which model it serves (another version of sophiavl-fast started it); start it anew "
                        "with this version's `python -m sophiavl_fast.rollout.serve`") from None
