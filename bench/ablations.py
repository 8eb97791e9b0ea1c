"""The twin's ablations side by side: success of each model by suite, what it keeps of the base, one figure.

    python bench/ablations.py --results bench/results/ablations

Reads RESULTS/MODEL/trials.jsonl of `vlm2vla-client eval` (main, at, nr, full) and RESULTS/vqa*/answers.jsonl of
`vlm2vla-train vqa`, one run or several on the same questions; where the base was asked twice, the first run in
alphabetical order counts. The full fine-tune is the base of a server of its own, so the base of RESULTS/vqa_full is
that. Prints the tables of models/twin/README.md, writes RESULTS/ablations.json and RESULTS/ablations.svg. Suites and
models that were not measured are left out, and so are trials beyond the first seed that a broken-off run lacks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from vlm2vla_client.evaluation.comparison import differences
from vlm2vla_client.evaluation.statistics import Interval, paired_difference, wilson
from vlm2vla_client.evaluation.trials import TRIALS, Trial, read_trials
from vlm2vla_schema.messages import BASE_MODEL_NAME
from vlm2vla_training.jsonio import read_jsonl, write_json
from vlm2vla_training.vqa.questions import TRAINED
from vlm2vla_training.vqa.twin import ANSWERS_FILE, figures
from vlm2vla_twin.tasks import SUITES

MODELS = {"main": "main (LoRA, text)", "at": "-AT (tokens)", "nr": "-NR (no reasoning)", "full": "full fine-tune"}
COLOURS = ("#2d6a9f", "#c8553d", "#3b8a5a", "#8a5aa8")
INK, SOFT, GRID = "#1f2328", "#667080", "#e2e0d8"
FULL = "full"


def trials_of(results: Path) -> dict[str, list[Trial]]:
    """The trials of every model that has some, in the order of MODELS; of each suite those before the first gap."""
    found = {name: read_trials(results / name) for name in MODELS if (results / name / TRIALS).exists()}
    return {name: [trial for suite in SUITES for trial in unbroken(every, suite)] for name, every in found.items()}


def unbroken(trials: Sequence[Trial], suite: str) -> list[Trial]:
    """A suite's trials by seed without a gap: where a parallel run was broken off, quick trials, which are successes
    more often, are done beyond slower ones.
    """
    ordered = sorted((trial for trial in trials if trial.suite == suite), key=lambda trial: trial.seed)
    return [trial for place, trial in enumerate(ordered) if trial.seed == ordered[0].seed + place]


def answers_of(results: Path) -> list[dict[str, Any]]:
    """All answers, each model's once; those of the full fine-tune's own server under its name."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    texts: dict[tuple[int, str], str] = {}
    for path in sorted(results.glob(f"vqa*/{ANSWERS_FILE}")):
        for line in read_jsonl(path):
            asked = (int(line["question"]), str(line["wording"]))
            if texts.setdefault(asked, line["text"]) != line["text"]:
                raise SystemExit(f"{path}: different questions; give every run the same --questions and --seed")
            model = FULL if path.parent.name == f"vqa_{FULL}" else str(line["model"])
            found.setdefault((model, *asked), {**line, "model": model})
    return list(found.values())


def success(trials: Mapping[str, Sequence[Trial]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Suite -> model -> successes, trials, Wilson's interval, mean score."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for suite in SUITES:
        for name, every in trials.items():
            here = [trial for trial in every if trial.suite == suite]
            if here:
                won = sum(trial.success for trial in here)
                mean = sum(trial.score for trial in here) / len(here)
                found.setdefault(suite, {})[name] = {
                    "successes": won, "trials": len(here), "wilson_95": span(wilson(won, len(here))),
                    "mean_non_planning_score": round(sum(t.non_planning_score for t in here) / len(here), 3),
                    "mean_score": round(mean, 3), "max_score": here[0].max_score,
                }  # fmt: skip
    return found


def against_main(trials: Mapping[str, Sequence[Trial]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> suite -> its success minus main's on the seeds that both ran (Newcombe, McNemar), and its score."""
    found = {}
    scores = {name: {(one.suite, one.seed): one.score for one in every} for name, every in trials.items()}
    for name, every in trials.items():
        if name != "main" and "main" in trials:
            found[name] = {
                suite: {
                    "seeds": one.n, "only_main": one.only_second, "only_this": one.only_first,
                    "difference": round(one.difference, 4), "newcombe_95": span(one.interval),
                    "mcnemar_p": float(f"{one.p_value:.4g}"), **score_difference(scores[name], scores["main"], suite),
                }
                for suite, one in differences(trials["main"], every).items()
            }  # fmt: skip
    return found


def score_difference(
    scores: Mapping[tuple[str, int], int], main: Mapping[tuple[str, int], int], suite: str
) -> dict[str, Any]:
    """Mean difference of the score on the seeds of a suite that both ran, and its bootstrap interval over seeds."""
    apart = [scores[key] - main[key] for key in sorted(scores.keys() & main.keys()) if key[0] == suite]
    if len(set(apart)) == 1:
        low = high = float(apart[0])
    else:
        low, high = bootstrap((apart,), np.mean, method="percentile", rng=0).confidence_interval
    return {"score_difference": round(float(np.mean(apart)), 3), "bootstrap_95": [round(low, 3), round(high, 3)]}


def kept(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Retention of each model, in both wordings, and main's right answers beside the others', question by question."""
    models = [BASE_MODEL_NAME, *(name for name in MODELS if any(line["model"] == name for line in lines))]
    result: dict[str, Any] = figures(lines, models)
    right = {
        name: {line["question"]: bool(line["right"]) for line in lines
               if line["model"] == name and line["wording"] == TRAINED}
        for name in models
    }  # fmt: skip
    pairs = {}
    for name in models[1:]:
        if name != "main" and "main" in right:
            shared = sorted(right[name].keys() & right["main"].keys())
            one = paired_difference([right[name][key] for key in shared], [right["main"][key] for key in shared])
            pairs[name] = {"questions": one.n, "difference": round(one.difference, 4),
                           "newcombe_95": span(one.interval), "mcnemar_p": float(f"{one.p_value:.4g}")}  # fmt: skip
    result["right_answers_minus_main_trained"] = pairs
    return result


def span(interval: Interval) -> list[float]:
    return [round(interval.low, 4), round(interval.high, 4)]


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> str:
    """Success by suite, differences from main, and retention, as Markdown."""
    names = [name for name in MODELS if any(name in row for row in found["success"].values())]
    lines = ["| suite | " + " | ".join(MODELS[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for suite, row in found["success"].items():
        lines.append(f"| {suite} | " + " | ".join(success_cell(row.get(name)) for name in names) + " |")
    lines += ["", "| minus main | " + " | ".join(MODELS[name] for name in names if name != "main") + " |"]
    lines.append("|---" * len(names) + "|")
    for suite in found["success"]:
        cells = [difference_cell(found["minus_main"].get(name, {}).get(suite)) for name in names if name != "main"]
        lines.append(f"| {suite} | " + " | ".join(cells) + " |")
    if found["retention"]:
        lines += ["", "| keeps of the base's right answers | trained words | other words |", "|---|---|---|"]
        parts = [found["retention"][wording]["retention"] for wording in ("trained", "other")]
        lines += [f"| {MODELS[name]} | " + " | ".join(kept_cell(part[name]) for part in parts) + " |"
                  for name in parts[0]]  # fmt: skip
    return "\n".join(lines)


def success_cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "-"
    low, high = (100 * value for value in one["wilson_95"])
    score = f"score {one['mean_score']:.2f} of {one['max_score']}"
    return f"{one['successes']} of {one['trials']} ({low:.1f} to {high:.1f} %), {score}"


def difference_cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "-"
    low, high = (100 * value for value in one["newcombe_95"])
    least, most = one["bootstrap_95"]
    points = f"{100 * one['difference']:+.0f} points ({low:+.0f} to {high:+.0f}), p {one['mcnemar_p']:.2g}"
    return f"{points}; score {one['score_difference']:+.2f} ({least:+.2f} to {most:+.2f})"


def kept_cell(one: Mapping[str, Any]) -> str:
    if one["all"] is None or one["all_95"] is None:
        return "-"
    low, high = (100 * value for value in one["all_95"])
    return f"{100 * one['all']:.1f} % ({low:.0f} to {high:.0f})"


# --- figure -----------------------------------------------------------------------------------------------------------


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Left: success by suite with Wilson's interval; right: what is kept of the base, with the bootstrap interval."""
    figure = Figure(figsize=(11.0, 3.6))
    left, right = figure.subplots(1, 2, width_ratios=(3.4, 1.0))
    bars(left, {suite: {name: (one["successes"] / one["trials"], one["wilson_95"]) for name, one in row.items()}
                for suite, row in found["success"].items()}, "full score [%]")  # fmt: skip
    if found["retention"]:
        part = found["retention"][TRAINED]["retention"]
        bars(right, {"twin VQA": {name: (one["all"], one["all_95"]) for name, one in part.items()
                                  if one["all_95"] is not None}}, "kept of the base's right answers [%]")  # fmt: skip
    for name, colour in zip(MODELS, COLOURS, strict=True):
        left.bar([0], [0], color=colour, label=MODELS[name])
    figure.legend(loc="upper center", ncols=len(MODELS), frameon=False, fontsize=9)
    figure.subplots_adjust(top=0.88, wspace=0.16)
    with rc_context({"svg.hashsalt": "vlm2vla", "svg.fonttype": "path"}):
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})


def bars(axes: Axes, groups: Mapping[str, Mapping[str, tuple[float, Sequence[float]]]], label: str) -> None:
    """Groups of bars, one colour a model, in per cent, with their intervals."""
    width = 0.8 / len(MODELS)
    for place, (name, colour) in enumerate(zip(MODELS, COLOURS, strict=True)):
        for group, row in enumerate(groups.values()):
            if name in row:
                value, (low, high) = 100 * row[name][0], (100 * end for end in row[name][1])
                centre = group + (place - (len(MODELS) - 1) / 2) * width
                axes.bar(centre, value, width * 0.9, color=colour, zorder=2)
                whiskers = np.clip([[value - low], [high - value]], 0.0, None)
                axes.errorbar(centre, value, yerr=whiskers, fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3)
    axes.set_xticks(range(len(groups)), [name.replace("_", "_\n", 1) for name in groups], fontsize=8)
    axes.set_ylim(0, 105)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(axis="y", color=GRID, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    results: Path = parser.parse_args(argv).results
    trials, lines = trials_of(results), answers_of(results)
    if not trials:
        parser.error(f"{results} holds no {TRIALS} of {', '.join(MODELS)}")
    found = {
        "success": success(trials), "minus_main": against_main(trials), "retention": kept(lines) if lines else None,
        "commits": sorted({str(trial.commit) for every in trials.values() for trial in every}),
    }  # fmt: skip
    write_json(results / "ablations.json", found)
    draw(found, results / "ablations.svg")
    print(tables(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
