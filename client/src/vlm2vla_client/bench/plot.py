"""The picture of a bench: what the median request spent its time on, for each number of robots and each server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm2vla_client.bench.probe import PARTS

INK, SOFT, GRID = "#1f2328", "#667080", "#e2e0d8"
COLOURS = ("#b8860b", "#9aa3ae", "#c8553d", "#4a7c7e", "#2d6a9f", "#7fb2d9", "#3b8a5a", "#d8dde3")


def write_plot(path: Path, report: Mapping[str, Any]) -> None:
    """Writes an SVG file: stacked bars of the parts' medians, a mark at the first row, a line at the floor.

    Medians of parts need not add up to the median of the whole, which stands beside the bar.
    """
    import matplotlib
    from matplotlib.figure import Figure

    bars = [
        (f"{level['robots']} robot{'s' * (level['robots'] > 1)}\n{name}", figures)
        for level in report["levels"]
        for name, figures in level["servers"].items()
        if figures["wall_ms"] is not None
    ]
    figure = Figure(figsize=(8.6, 1.4 + 0.5 * max(1, len(bars))))
    axes = figure.add_subplot()
    for place, (_, figures) in enumerate(bars):
        _bar(axes, place, figures, labelled=place == 0)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"/{report['endpoint']}: medians of the parts [ms]; beside the bar p50 (p95)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
    axes.grid(axis="x", color=GRID, zorder=0)
    if bars:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "vlm2vla", "svg.fonttype": "path"}):
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})


def _bar(axes: Any, place: int, figures: Mapping[str, Any], labelled: bool) -> None:
    left = 0.0
    for part, colour in zip(PARTS, COLOURS, strict=True):
        width = (figures["parts_ms"][part] or {"p50": 0.0})["p50"]
        axes.barh(place, width, 0.6, left=left, color=colour, label=part if labelled else None, zorder=2)
        left += width
    wall = figures["wall_ms"]
    axes.text(left, place, f"  {wall['p50']:.0f} ({wall['p95']:.0f})", va="center", fontsize=8, color=SOFT)
    if figures["first_row_ms"] is not None:
        row = figures["first_row_ms"]["p50"]
        axes.plot([row], [place], "o", color=INK, markersize=4, label="first row" if labelled else None, zorder=4)
    if "floor" in figures:
        low = figures["floor"]["cycle_ms"]
        label = "floor" if labelled else None
        axes.plot([low, low], [place - 0.38, place + 0.38], color=INK, linewidth=1.5, label=label, zorder=4)
