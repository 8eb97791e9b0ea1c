"""The analysis commands' pictures, as PNG and SVG; the same numbers give the same SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vla_training.analysis.verify_figures import curve, figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2328", "#667080", "#e2e0d8"
SERIES = ("#2d6a9f", "#c8553d", "#3b8a5a", "#8a5aa8")


def log_probability_figure(per_token: Mapping[str, Sequence[float]], per_row: Mapping[str, Sequence[float]]) -> Figure:
    """Fig. 3: how ln p is distributed over actions, one colour a representation.

    Args:
        per_token: label of a representation -> for each action the mean ln p of its tokens, nat.
        per_row: the same, ln p of the whole action divided by its rows, nat.
    """
    figure = _figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    for axes, values, label in (
        (left, per_token, "mean log-probability of an action's tokens [nat]"),
        (right, per_row, "log-probability of an action row [nat]"),
    ):
        _style(axes)
        everything = np.concatenate([np.asarray(list(one)) for one in values.values()])
        edges = np.linspace(everything.min() - 1e-6, everything.max() + 1e-6, 61)
        for colour, (name, series) in zip(SERIES, values.items(), strict=False):
            axes.hist(series, bins=edges, density=True, color=colour, alpha=0.65, label=name)
            axes.axvline(float(np.mean(series)), color=colour, linewidth=1, linestyle="--")
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel("density over actions", fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.subplots_adjust(top=0.88, wspace=0.22)
    return figure


def length_figure(totals: Mapping[str, Sequence[int]], limit: int) -> Figure:
    """Tokens of the examples of each kind: box from quartile to quartile, whiskers over everything, and the limit."""
    figure = _figure(7.0, 0.9 + 0.42 * len(totals))
    axes = figure.subplots()
    _style(axes)
    axes.boxplot(
        list(totals.values()), orientation="horizontal", tick_labels=list(totals), whis=(0, 100), patch_artist=True,
        widths=0.5, boxprops={"facecolor": SERIES[0], "edgecolor": INK}, medianprops={"color": "white"},
    )  # fmt: skip
    axes.axvline(limit, color=SERIES[1], linewidth=1.2)
    axes.annotate(f"limit {limit}", (limit, 1), xycoords=("data", "axes fraction"), color=SERIES[1], fontsize=8,
                  xytext=(-4, -10), textcoords="offset points", ha="right")  # fmt: skip
    axes.set_xlim(0, 1.05 * max(limit, *(max(values) for values in totals.values())))
    axes.set_xlabel("tokens of an example, image tokens and end of turn included", fontsize=9)
    return figure


def loss_figure(log: Sequence[Mapping[str, float]]) -> Figure:
    """Training loss, held-out loss where there is one, and token accuracy over steps.

    Args:
        log: lines of log.jsonl.
    """
    figure = _figure(9.0, 3.2)
    left, right = figure.subplots(1, 2)
    for axes, keys, label in (
        (left, {"loss": "training", "eval_loss": "held-out episodes"}, "loss [nat a token]"),
        (right, {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held-out episodes"}, "token accuracy"),
    ):
        _style(axes)
        for colour, (key, name) in zip(SERIES, keys.items(), strict=False):
            points = [(line["step"], line[key]) for line in log if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=name, marker="." if len(points) < 30 else "")
        axes.set_xlabel("optimiser step", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    left.set_ylim(bottom=0)
    figure.subplots_adjust(wspace=0.25)
    return figure


def accuracy_figure(
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    spans: Mapping[str, Sequence[tuple[float, ...]]],
    label: str,
) -> Figure:
    """Bars by benchmark, one colour a model, with intervals where there are any.

    Args:
        names: of the benchmarks. values: model -> a value for each. spans: model -> (low, high) for each, in the same
            unit. label: of the axis, with its unit.
    """
    figure = _figure(max(6.0, 1.0 + 0.35 * len(names) * max(1, len(values))), 3.4)
    axes = figure.subplots()
    _style(axes)
    width = 0.8 / max(1, len(values))
    for index, (model, heights) in enumerate(values.items()):
        centres = np.arange(len(names)) + (index - (len(values) - 1) / 2) * width
        axes.bar(centres, list(heights), width * 0.9, color=SERIES[index % len(SERIES)], label=model, zorder=2)
        if model in spans:
            ends, middle = np.asarray(spans[model], dtype=np.float64).T, np.asarray(list(heights))
            whiskers = np.clip(np.stack([middle - ends[0], ends[1] - middle]), 0.0, None)
            axes.errorbar(centres, middle, yerr=whiskers, fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)
    axes.set_xticks(range(len(names)), list(names), rotation=25, ha="right")
    axes.set_ylabel(label, fontsize=9)
    axes.grid(axis="y", color=GRID, zorder=0)
    figure.legend(loc="upper center", ncols=max(1, len(values)), frameon=False, fontsize=9)
    figure.subplots_adjust(top=0.88)
    return figure


def verifier_figure(calibration: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: how often it is done against the probability that was said. Right: what each threshold accepts, the served
    one marked.

    Args:
        calibration: of `verify_figures.reliability`. pairs: scored pairs.
    """
    figure = _figure(9.0, 3.8)
    left, right = figure.subplots(1, 2)
    _style(left)
    _style(right)
    table = calibration["table"]
    left.plot([0, 1], [0, 1], color=GRID, linewidth=1)
    largest = max(line["pairs"] for line in table)
    sizes = [8 + 120 * line["pairs"] / largest for line in table]
    left.scatter([line["said"] for line in table], [line["done"] for line in table], s=sizes, color=SERIES[0])
    left.set_xlabel("probability of success that the model gives (area: pairs)", fontsize=9)
    left.set_ylabel("share that is done", fontsize=9)
    wrong, accepted = curve(pairs)
    right.plot(wrong, accepted, color=SERIES[0])
    served = figures(pairs, 0.0)
    right.scatter([served["false_success"] or 0], [served["accepted"] or 0], color=SERIES[1], zorder=3, label="served")
    right.axvline(0.02, color=SERIES[2], linewidth=1, linestyle="--", label="2 % false success")
    right.set_xlabel("not done, but said to be", fontsize=9)
    right.set_ylabel("done, and said to be", fontsize=9)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    figure.subplots_adjust(wspace=0.25)
    return figure


def svg_url(figure: Figure) -> str:
    """The figure as a `data:` URL, for a page that loads nothing."""
    buffer = io.BytesIO()
    _write_svg(figure, buffer)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def save(figure: Figure, out: Path, name: str) -> None:
    """Write NAME.png and NAME.svg into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    _write_svg(figure, out / f"{name}.svg")
    figure.savefig(out / f"{name}.png", bbox_inches="tight", dpi=110, metadata={"Software": None})


def _write_svg(figure: Figure, target: Path | io.BytesIO) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "vlm2vla", "svg.fonttype": "path"}):
        figure.savefig(target, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})


def _figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in))


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
