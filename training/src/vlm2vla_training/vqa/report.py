"""The retention table as text and as one HTML page with its figure; the paper's figures stand beside Table 1's."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm2vla_schema.messages import BASE_MODEL_NAME
from vlm2vla_training.analysis.figures import accuracy_figure, save, svg_url
from vlm2vla_training.vqa.questions import OTHER, TRAINED
from vlm2vla_training.vqa.table1 import TABLE_1, paper_retention

REPORT_FILE = "report.html"
FIGURE = "retention"
_PAPER = {one.name: one for one in TABLE_1}
_TITLES = {OTHER: "In words never seen in training", TRAINED: "In the words of the training"}
_STYLE = """body { font: 14px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 12px 20px; color: #222; }
h1 { font-size: 20px; } h2 { font-size: 16px; margin-top: 26px; } table { border-collapse: collapse; }
th, td { border: 1px solid #ddd; padding: 3px 9px; text-align: right; font-weight: normal; }
th { color: #555; } td:first-child, th:first-child { text-align: left; } img { max-width: 100%; }"""


def per_cent(value: float | None) -> str:
    """A share as the tables show it."""
    return "-" if value is None else f"{100 * value:.1f} %"


# --- Table 1 and other tasks of lmms-eval -----------------------------------------------------------------------------


def lmms_rows(result: Mapping[str, Any], models: Sequence[str]) -> list[list[str]]:
    """Head, a row a benchmark, then minimum and mean of the shares. The paper's columns are those of Gemma-3-12B-IT."""
    adapters = [model for model in models if model != BASE_MODEL_NAME]
    scores, kept = result["scores"], result["retention"]
    paper = any(name in _PAPER for name in result["tasks"])
    head = ["benchmark", "questions", *models, *(f"{model} keeps" for model in adapters)]
    rows = [[*head, "paper: base", "VLM2VLA", "keeps", "-AT keeps"] if paper else head]
    ours, at = paper_retention("main"), paper_retention("at")
    for name, task in result["tasks"].items():
        row = [name, str(task["questions"]), *(f"{scores[model][name]:.1f}" for model in models)]
        row += [per_cent(kept[model]["shares"][name]) for model in adapters]
        if paper and name in _PAPER:
            one = _PAPER[name]
            row += [str(one.paper_base), str(one.paper_ours), per_cent(ours.shares[name]), per_cent(at.shares[name])]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    for label, ours_all, at_all in (("minimum", ours.minimum, at.minimum), ("mean", ours.mean, at.mean)):
        row = [label, "", *("" for _ in models), *(per_cent(kept[model][label]) for model in adapters)]
        rows.append([*row, "", "", per_cent(ours_all), per_cent(at_all)] if paper else row)
    return rows


def lmms_lines(result: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """The table as text."""
    return _aligned(lmms_rows(result, models))


# --- the twin ---------------------------------------------------------------------------------------------------------


def twin_rows(part: Mapping[str, Any], models: Sequence[str]) -> list[list[str]]:
    """Head, a row a kind, all together, then minimum and mean of the shares."""
    adapters = [model for model in models if model != BASE_MODEL_NAME]
    rows = [["question", "n", "constant", *models, *(f"{model} keeps" for model in adapters)]]
    for kind, one in part["kinds"].items():
        kept = [per_cent(part["retention"][model]["by_kind"][kind]) for model in adapters]
        constant = per_cent(one["constant_answer"])
        rows.append([kind, str(one["questions"]), constant, *(_accuracy(one["models"][m]) for m in models), *kept])
    whole = [_whole(part["retention"][model]) for model in adapters]
    count = str(part["all"][models[0]]["n"])
    rows.append(["all", count, "", *(_accuracy(part["all"][model]) for model in models), *whole])
    for label in ("minimum", "mean"):
        kept = [per_cent(part["retention"][model][label]) for model in adapters]
        rows.append([label, "", "", *("" for _ in models), *kept])
    return rows


def twin_lines(result: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Both tables as text."""
    return [line for name in _TITLES for line in (_TITLES[name], *_aligned(twin_rows(result[name], models)), "")]


def _accuracy(one: Mapping[str, Any]) -> str:
    low, high = one["wilson_95"]
    return f"{per_cent(one['accuracy'])} ({100 * low:.0f} to {100 * high:.0f})"


def _scaled(span: Sequence[float]) -> tuple[float, ...]:
    return tuple(100 * value for value in span)


def _whole(kept: Mapping[str, Any]) -> str:
    span = kept["all_95"]
    return per_cent(kept["all"]) + ("" if span is None else f" ({100 * span[0]:.0f} to {100 * span[1]:.0f})")


# --- page -------------------------------------------------------------------------------------------------------------


def write_report(out: Path, summary: Mapping[str, Any], models: Sequence[str]) -> None:
    """Write report.html, retention.png and retention.svg."""
    if "scores" in summary:
        values = {model: list(summary["scores"][model].values()) for model in models}
        figure = accuracy_figure(list(summary["tasks"]), values, {}, "score, unit of Table 1")
        tables = [("Scores and what is kept", lmms_rows(summary, models))]
        facts = f"lmms-eval {summary['lmms_eval']}; no request failed. Judge of MMBench: {summary['judge']}."
    else:
        part = summary[OTHER]
        values = {m: [100 * one["models"][m]["accuracy"] for one in part["kinds"].values()] for m in models}
        spans = {m: [_scaled(one["models"][m]["wilson_95"]) for one in part["kinds"].values()] for m in models}
        figure = accuracy_figure(list(part["kinds"]), values, spans, "right answers [%]")
        tables = [(title, twin_rows(summary[name], models)) for name, title in _TITLES.items()]
        facts = (
            f"Pictures from seed {summary['first_seed']} on. Intervals: Wilson, 95 %; of what is kept over all: "
            "bootstrap. Constant: whoever always gives the most frequent answer. Figure: words never seen in training."
        )
    save(figure, out, FIGURE)
    hashes = ", ".join(f"{name} {digest[:12]}" for name, digest in summary["models"].items())
    parts = [
        "<h1>Visual question answering, before and after fine-tuning</h1>",
        f"<p>{_text(facts)} Weights: {_text(hashes)}.</p>",
        f'<img alt="accuracy of base and adapters" src="{svg_url(figure)}">',
        *(f"<h2>{_text(title)}</h2>{_table(rows)}" for title, rows in tables),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>VQA retention</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    (out / REPORT_FILE).write_text(page, encoding="utf-8")


def _table(rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{cells(rows[0], 'th')}{''.join(cells(row, 'td') for row in rows[1:])}</table>"


def _text(value: str) -> str:
    return html.escape(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
