"""What the figures should be, and whether they are."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Results = dict[str, Any]
FIRST = "linear/qwen7b"
PEERS = {  # ours -> where the peers' figures lie, and which of theirs is the same work
    **{f"linear/{shape}": (f"peers/{shape}", ("forward", "both")) for shape in ("qwen7b", "llama", "qwen3b")}}
HERE = {"logits": ("forward", "both", "forward_entropy", "both_entropy", "grpo"), "grpo_loss": ("both",), "trust_advantage": ("std", "batch")}


def judge(parts: Results) -> dict[str, dict[str, Any]]:
    """name -> value, aim, met; a figure that was not taken has value and met None."""
    aims = {}

    def aim(name: str, value: float | None, bound: float, *, at_most: bool, **more: Any) -> None:
        value = None if value is None or value != value else value
        met = None if value is None else bool(value <= bound if at_most else value >= bound)
        aims[name] = {"value": value, "aim": f"{'<=' if at_most else '>='} {bound:g}", "met": met, **more}

    get = lambda *path: _get(parts, *path)
    aim("forward, share of the product rate", get(FIRST, "forward", "of_floor"), 0.85, at_most=False)
    aim("forward and backward, share of the product rate", get(FIRST, "both", "of_floor"), 0.75, at_most=False)
    aim("peak extra memory, MB", get(FIRST, "both", "peak_extra_mb"), 600, at_most=True)
    for shape in PEERS:
        aim(f"{shape}: backward with half the rows inactive over all", _ratio(get(shape, "backward_inactive_50"), get(shape, "backward")), 0.6, at_most=True)
    for part, figures in (("grpo_loss", ("forward_graph", "both_graph", "both_sequence_graph")), ("trust_advantage", ("ours_std_graph", "ours_batch_graph"))):
        for figure in figures:
            share = get(part, figure, "of_floor")
            aim(f"{part}/{figure} over its floor", None if not share else 1 / share, 1.5, at_most=True)
    for name, ours, theirs in _contests(parts):
        peer, best = min(theirs.items(), key=lambda x: x[1], default=("none ran", None))
        aim(f"{name}: best peer's time over ours", None if best is None or not ours else best / ours, 1.0, at_most=False, peer=peer)
    return aims


def _contests(parts: Results) -> Iterator[tuple[str, float | None, dict[str, float]]]:
    """(what, our ms, {peer: its ms}) of every figure that peers have too."""
    for ours, (others, figures) in PEERS.items():
        for figure in figures:
            times = {peer: _get(found, figure, "median_ms") for peer, found in (parts.get(others) or {}).items() if isinstance(found, dict)}
            yield f"{ours}/{figure}", _get(parts, ours, figure, "median_ms"), _known(times)
    for part, figures in HERE.items():
        found = parts.get(part) or {}
        for figure in figures:
            own = f"ours_{figure}" if f"ours_{figure}" in found else figure
            times = {key.removesuffix(f"_{figure}"): _get(found, key, "median_ms") for key in found if key.endswith(f"_{figure}") and key != own}
            yield f"{part}/{figure}", _get(found, own, "median_ms"), _known(times)
    for name, found in (parts.get("attention") or {}).items():
        for figure in ("forward", "both"):
            if isinstance(found, dict) and "tokens" in found:
                times = {path: _get(found, path, figure, "median_ms") for path in ("padded_sdpa", "flex")}
                yield f"attention/{name}/{figure}", _get(found, "varlen", figure, "median_ms"), _known(times)


def _known(times: dict[str, float | None]) -> dict[str, float]:
    return {name: ms for name, ms in times.items() if ms is not None and ms == ms}


def _get(node: Any, *path: str) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _ratio(a: Any, b: Any) -> float | None:
    top, bottom = _get(a, "median_ms"), _get(b, "median_ms")
    return None if top is None or not bottom else top / bottom
