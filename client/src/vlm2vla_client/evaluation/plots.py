"""The pictures of a report, as SVG inside ``data:`` URLs, so that a report is one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vlm2vla_client.evaluation.statistics import Distribution
from vlm2vla_client.evaluation.summary import SuiteSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2328", "#667080", "#e2e0d8"
SERIES = ("#2d6a9f", "#c8553d", "#3b8a5a", "#8a5aa8", "#b8860b", "#4a7c7e")
GOOD = "#3b8a5a"
# From "never got there" (dark) to "nearly done" (light); faults, which end a trial from outside, in grey.
FAILURES = {
    "no_contact": "#7f2a1d", "not_grasped": "#b0452f", "not_placed": "#d9795f", "not_toward_fish": "#e6a08b",
    "no_contact_fish": "#efc0ad", "not_lifted": "#f6dfd4",
}  # fmt: skip
FAULT = "#9aa3ae"


def success_bars(runs: Mapping[str, Mapping[str, SuiteSummary]]) -> str:
    """Success rates with Wilson whiskers, grouped by suite and one colour a run, in the style of Fig. 5.

    Args:
        runs: label of a run -> its suites by name.
    """
    names = list(dict.fromkeys(name for suites in runs.values() for name in suites))
    figure, axes = _figure(max(6.0, 1.2 + 0.55 * len(names) * max(1, len(runs))), 3.4)
    width = 0.8 / max(1, len(runs))
    for index, (label, suites) in enumerate(runs.items()):
        present = [(place, suites[name]) for place, name in enumerate(names) if name in suites]
        centres = [place + (index - (len(runs) - 1) / 2) * width for place, _ in present]
        rates = [100 * suite.success_rate for _, suite in present]
        down = [rate - 100 * suite.wilson_95.low for rate, (_, suite) in zip(rates, present, strict=True)]
        up = [100 * suite.wilson_95.high - rate for rate, (_, suite) in zip(rates, present, strict=True)]
        axes.bar(centres, rates, width * 0.9, color=SERIES[index % len(SERIES)], label=label, zorder=2)
        whiskers = [[max(0.0, value) for value in down], [max(0.0, value) for value in up]]
        axes.errorbar(centres, rates, yerr=whiskers, fmt="none", ecolor=INK, elinewidth=1, capsize=3, zorder=3)
        for centre, (_, suite), top in zip(centres, present, up, strict=True):
            height = 100 * suite.success_rate + top + 2
            axes.text(centre, height, f"{suite.successes}/{suite.trials}", ha="center", fontsize=8, color=SOFT)
    labels = [next(suites[name].label for suites in runs.values() if name in suites) for name in names]
    axes.set_xticks(
        range(len(names)),
        [label.replace(" - ", "\n- ").replace(", ", ",\n").replace(" and P", "\nand P") for label in labels],
    )
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("success rate [%]")
    if len(runs) > 1:
        figure.legend(loc="upper center", ncols=min(3, len(runs)), frameon=False, fontsize=9)
        figure.subplots_adjust(top=0.84)
    return _svg(figure)


def outcome_bars(suites: Mapping[str, SuiteSummary]) -> str:
    """Where trials ended: successes, and failures by the first stage that was missing, in per cent of each suite."""
    figure, axes = _figure(8.6, 1.5 + 0.42 * len(suites))
    failed = {name: _merged(suite.failures) for name, suite in suites.items()}
    order = list(dict.fromkeys([*FAILURES, *(kind for counts in failed.values() for kind in counts)]))
    labelled: set[str] = set()

    def part(place: int, left: float, count: int, total: int, colour: str, label: str) -> float:
        share = 100 * count / total
        axes.barh(
            place, share, 0.62, left=left, color=colour, edgecolor="white", linewidth=1.5,
            label=None if label in labelled else label.replace("_", " "), zorder=2,
        )  # fmt: skip
        labelled.add(label)
        if share >= 6:
            light = colour in ("#f6dfd4", "#efc0ad", "#e6a08b")
            axes.text(left + share / 2, place, str(count), ha="center", va="center", fontsize=8,
                      color=INK if light else "white")  # fmt: skip
        return left + share

    for place, (suite_name, suite) in enumerate(suites.items()):
        left = part(place, 0.0, suite.successes, suite.trials, GOOD, "success") if suite.successes else 0.0
        for name in order:
            if name in failed[suite_name]:
                left = part(place, left, failed[suite_name][name], suite.trials, FAILURES.get(name, FAULT), name)
    axes.set_yticks(range(len(suites)), [suite.label for suite in suites.values()])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("trials [%]")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, zorder=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8)
    return _svg(figure)


def _merged(failures: Mapping[str, int]) -> dict[str, int]:
    """Failures by kind: which first object was missed is plain from the suite."""
    counts: dict[str, int] = {}
    for name, count in failures.items():
        for ending in ("_carrot", "_eggplant") if name != "not_lifted_fish" else ("_fish",):
            name = name.removesuffix(ending)
        counts[name] = counts.get(name, 0) + count
    return counts


def latency_histogram(seconds: Sequence[float], statistics: Distribution) -> str:
    """Wall time of the inference cycles, with median and interquartile range as in Table 3."""
    figure, axes = _figure(6.0, 2.8)
    axes.axvspan(statistics.q1, statistics.q3, color="#2d6a9f22", label="interquartile range", zorder=1)
    axes.hist(list(seconds), bins=min(40, max(5, len(seconds) // 4)), color=SERIES[0], zorder=2)
    axes.axvline(statistics.median, color=SERIES[1], linewidth=1.5, label=f"median {statistics.median:.2f} s", zorder=3)
    axes.set_xlim(left=0)
    axes.set_xlabel("one inference cycle [s]")
    axes.set_ylabel("cycles")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
    axes.grid(axis="y", color=GRID, zorder=0)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as a ``data:`` URL; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "vlm2vla", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
