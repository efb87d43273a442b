"""A bar a figure, ours against the peers: matplotlib where it is installed, else SVG by hand."""
from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

Figure = dict[str, Any]


def figures(results: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(path, figure) of every timing in the results, in order."""
    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Figure]]:
        if isinstance(node, dict):
            if "median_ms" in node:
                yield prefix, node
            for key, value in node.items():
                yield from walk(f"{prefix}/{key}" if prefix else key, value)

    yield from walk("", results["parts"])


def draw(results: dict[str, Any], out: Path) -> Path:
    """Share of the floor of every figure that has one; written beside `out`."""
    bars = [(name, f["of_floor"], f["median_ms"]) for name, f in figures(results) if (f.get("of_floor") or math.nan) == f.get("of_floor")]
    gpu = results["machine"].get("gpu") or "a CPU: the figures mean nothing"
    title = f"Share of the measured floor on {gpu}"
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        path = out.with_suffix(".svg")
        path.write_text(svg(bars, title))
        return path
    from matplotlib import pyplot

    path = out.with_suffix(".png")
    picture, axes = pyplot.subplots(figsize=(10, 1 + 0.22 * max(len(bars), 1)))
    axes.barh([name for name, _, _ in bars], [100 * share for _, share, _ in bars], color=[_colour(name) for name, _, _ in bars])
    for i, (_, share, ms) in enumerate(bars):
        axes.text(100 * share, i, f" {ms:.3g} ms", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="percent", title=title, xlim=(0, 115))
    axes.tick_params(axis="y", labelsize=7)
    picture.tight_layout()
    picture.savefig(path, dpi=130)
    pyplot.close(picture)
    return path


def svg(bars: list[tuple[str, float, float]], title: str) -> str:
    """The same picture as text."""
    height, lines = 30 + 16 * len(bars), []
    for i, (name, share, ms) in enumerate(bars):
        y, width = 30 + 16 * i, 400 * min(max(share, 0.0), 1.15)
        lines.append(f'<text x="330" y="{y + 10}" text-anchor="end">{escape(name)}</text><rect x="336" y="{y}" width="{width:.1f}" height="12" '
                     f'fill="{_colour(name)}"/><text x="{340 + width:.1f}" y="{y + 10}">{100 * share:.0f} %, {ms:.3g} ms</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" font-family="sans-serif" font-size="10">'
            f'<text x="8" y="16" font-size="13">{escape(title)}</text>{"".join(lines)}</svg>\n')


def _colour(name: str) -> str:
    return "#9aa5b1" if any(peer in name for peer in ("naive", "torch.compile", "liger", "trl", "verl", "padded", "flex", "plain")) else "#2f6f4f"
