"""Which machine this is, and its address as a server sees it: weights travel beside the requests, from the engine's machine to the trainer's."""
from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from sophiavl_fast.errors import UserError


def this_machine() -> dict[str, str]:
    """Its name, and what no other loopback has: which start of which kernel this is, and which of its networks (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = os.readlink("/proc/self/ns/net")
    except OSError:                      # then no two differ
        boot = network = ""
    return {"name": socket.gethostname(), "loopback": f"{boot} {network}"}


def address_towards(host: str, port: int) -> str:
    """The IPv4 address of this machine on the way to that one. Raises socket.gaierror where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))   # sends nothing
        return probe.getsockname()[0]


def own_address(url: str) -> str:
    """The address of this machine on the way to the server. By IPv4: vLLM's nccl rendezvous knows no other. Raises UserError where the server has none."""
    parts = urlsplit(url)
    try:
        return address_towards(parts.hostname or "", parts.port or 80)
    except socket.gaierror:
        raise UserError(f"rollout.urls: '{url}' has no IPv4 address for weights to travel by; set rollout.transfer_host to this machine's") from None


def refuse_foreign(host: str) -> None:
    """UserError for a rollout.transfer_host that is no address of this machine: nothing can be sent from it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        raise UserError(f"rollout.transfer_host = '{host}' is no IPv4 address of this machine ({socket.gethostname()}); `hostname -I` lists them") from None
