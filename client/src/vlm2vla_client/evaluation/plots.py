"""The pictures of a report, as SVG inside ``data:`` URLs, so that a report is one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vlm2vla_client.evaluation.statistics import Distribution, wilson
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
CLOCK_TICK_S = 1e-6  # of a recording


def success_bars(runs: Mapping[str, Mapping[str, SuiteSummary]]) -> str:
    """Success rates with Wilson whiskers, grouped by suite and one colour a run, in the style of Figs. 5 and 8.

    Args:
        runs: label of a run -> its suites by name.
    """
    return _grouped_bars(runs, lambda suite: (suite.successes, suite.trials), "success rate [%]")


def plan_bars(runs: Mapping[str, Mapping[str, SuiteSummary]]) -> str:
    """Share of plans that name what D.3 asks for, on the suites that it judges, in the style of Figs. 6 and 9."""
    judged = {
        label: {name: suite for name, suite in suites.items() if suite.plans_judged} for label, suites in runs.items()
    }
    return _grouped_bars(judged, lambda suite: (suite.plans_right, suite.plans_judged), "right plans [%]")


def _grouped_bars(
    runs: Mapping[str, Mapping[str, SuiteSummary]], counted: Callable[[SuiteSummary], tuple[int, int]], what: str
) -> str:
    names = list(dict.fromkeys(name for suites in runs.values() for name in suites))
    figure, axes = _figure(max(6.0, 1.2 + 0.55 * len(names) * max(1, len(runs))), 3.4)
    width = 0.8 / max(1, len(runs))
    for index, (label, suites) in enumerate(runs.items()):
        places = [place for place, name in enumerate(names) if name in suites]
        counts = [counted(suites[name]) for name in names if name in suites]
        centres = [place + (index - (len(runs) - 1) / 2) * width for place in places]
        rates = [100 * count / total for count, total in counts]
        down, up = _whiskers(counts)
        axes.bar(centres, rates, width * 0.9, color=SERIES[index % len(SERIES)], label=_plain(label), zorder=2)
        axes.errorbar(centres, rates, yerr=[down, up], fmt="none", ecolor=INK, elinewidth=1, capsize=3, zorder=3)
        for centre, rate, top, (count, total) in zip(centres, rates, up, counts, strict=True):
            axes.text(centre, rate + top + 2, f"{count}/{total}", ha="center", fontsize=8 if width > 0.2 else 6,
                      color=SOFT)  # fmt: skip
    axes.set_xticks(range(len(names)), [_broken(_label(runs, name)) for name in names])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(what)
    if len(runs) > 1:
        figure.legend(loc="upper center", ncols=min(3, len(runs)), frameon=False, fontsize=9)
        figure.subplots_adjust(top=0.84)
    return _svg(figure)


def _whiskers(counts: Sequence[tuple[int, int]]) -> tuple[list[float], list[float]]:
    """How far Wilson's interval reaches below and above each rate, in per cent."""
    bounds = [(100 * count / total, wilson(count, total)) for count, total in counts]
    return (
        [max(0.0, rate - 100 * interval.low) for rate, interval in bounds],
        [max(0.0, 100 * interval.high - rate) for rate, interval in bounds],
    )


def _label(runs: Mapping[str, Mapping[str, SuiteSummary]], name: str) -> str:
    return next(suites[name].label for suites in runs.values() if name in suites)


def _plain(label: str) -> str:
    """A policy's name as it stands: nothing unprintable, and no formula between dollar signs."""
    return "".join(letter if letter.isprintable() else " " for letter in label).replace("$", r"\$")


def _broken(label: str) -> str:
    return label.replace(" - ", "\n- ").replace(", ", ",\n").replace(" and P", "\nand P")


SPLIT = {
    "right_success": ("right plan, done", "#3b8a5a"), "right_failure": ("right plan, not done", "#d9a441"),
    "wrong_success": ("wrong plan, done", "#8fb8d6"), "wrong_failure": ("wrong plan, not done", "#b0452f"),
}  # fmt: skip


def split_bars(runs: Mapping[str, Mapping[str, SuiteSummary]]) -> str:
    """Planning against execution: how many trials had a right plan, how many of those ended in success."""
    lines = [
        (f"{suite.label}, {_plain(label)}", suite)
        for name in dict.fromkeys(name for suites in runs.values() for name in suites)
        for label, suites in runs.items()
        if (suite := suites.get(name)) is not None and suite.plans_judged
    ]
    figure, axes = _figure(8.6, 1.0 + 0.34 * len(lines))
    for key, (name, colour) in SPLIT.items():
        shares = [100 * suite.plan_and_success.get(key, 0) / suite.plans_judged for _, suite in lines]
        before = list(SPLIT)[: list(SPLIT).index(key)]
        lefts = [
            100 * sum(suite.plan_and_success.get(other, 0) for other in before) / suite.plans_judged
            for _, suite in lines
        ]
        axes.barh(range(len(lines)), shares, 0.62, left=lefts, color=colour, edgecolor="white", label=name, zorder=2)
        for place, (share, left, (_, suite)) in enumerate(zip(shares, lefts, lines, strict=True)):
            if share >= 6:
                axes.text(left + share / 2, place, str(suite.plan_and_success[key]), ha="center", va="center",
                          fontsize=8, color="white")  # fmt: skip
    _lying(axes, [label for label, _ in lines])
    return _svg(figure)


def latency_boxes(seconds: Mapping[str, Sequence[float]]) -> str:
    """The inference cycles of each run: median, quartiles, whiskers from minimum to maximum; logarithmic.

    Cycles shorter than the clock can tell (a policy of the twin answers within the process) are drawn at its tick.
    """
    figure, axes = _figure(7.0, 1.0 + 0.42 * len(seconds))
    cycles = [[max(value, CLOCK_TICK_S) for value in run] for run in seconds.values()]
    drawn = axes.boxplot(cycles, orientation="horizontal", whis=(0, 100), widths=0.5, patch_artist=True)
    for index, box in enumerate(drawn["boxes"]):
        box.set_facecolor(SERIES[index % len(SERIES)])
    for line in drawn["medians"]:
        line.set_color("white")
    axes.set_yticks(range(1, len(seconds) + 1), [_plain(label) for label in seconds])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("one inference cycle [s]")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, zorder=0)
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
    _lying(axes, [suite.label for suite in suites.values()])
    return _svg(figure)


def _lying(axes: Axes, labels: Sequence[str]) -> None:
    """Axes of horizontal bars in per cent, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("trials [%]")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, zorder=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=8)


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
