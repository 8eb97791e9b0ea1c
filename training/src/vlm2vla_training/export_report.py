"""The report beside an exported model: loss curves, and predicted paths drawn on held-out pictures. One HTML file that
loads nothing from anywhere.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.analysis.comparison import aggregate
from vlm2vla_training.analysis.figures import loss_figure, svg_url
from vlm2vla_training.analysis.model import LoadedModel
from vlm2vla_training.analysis.predict import held_out_keys, predictions, tasks_of
from vlm2vla_training.annotation.files import read_annotated
from vlm2vla_training.curation.decisions import choose
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_jsonl
from vlm2vla_training.path_on_image import paths_svg, projection_for, read_projection
from vlm2vla_training.progress import track

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Prediction:
    """A line of `predict` and its picture with the paths."""

    line: dict[str, Any]
    drawing: str


def predicted(args: argparse.Namespace, base: Path, adapter: Path | None, card: ModelCard) -> list[Prediction]:
    """Ask the stored model about `--predict-episodes` episodes that were held out, and draw every step.

    Raises:
        DataError: an annotated episode is not in the dataset.
    """
    dataset = EpisodeDataset(args.episodes)
    annotated = choose(read_annotated(args.annotated), {}).kept
    chosen = held_out_keys(list(annotated), args.held_out)[: args.predict_episodes]
    missing = sorted(set(chosen) - set(dataset.keys()))
    if missing:
        raise DataError(f"{args.episodes} lacks {len(missing)} annotated episodes, for example {missing[0]}")
    given = read_projection(args.camera) if args.camera else None
    model = LoadedModel(base, adapter, card.image_size, args.device)
    found = []
    skip = frozenset(dataset.keys()) - frozenset(chosen)
    for episode in track(dataset.episodes(skip), len(chosen), "export: predictions"):
        projection = projection_for(episode.source, given)
        one = annotated[episode.key]
        for line, task in zip(predictions(model, card, episode, one, "own"), tasks_of(one), strict=True):
            place = task.step.first - episode.first_step
            paths = {"logged": line["logged"], **({"predicted": line["rows"]} if line["rows"] else {})}
            drawing = paths_svg(
                episode.images[place], episode.states[place, :3].tolist(), paths, task.gripper_before, projection
            )
            found.append(Prediction(line, drawing))
    return found


def measured(found: Sequence[Prediction]) -> dict[str, Any]:
    """The figures of `predict`, for the card."""
    return aggregate([one.line for one in found])


def write_report(
    folder: Path, card: ModelCard, run: Path, summary: dict[str, Any], found: Sequence[Prediction]
) -> None:
    """Write report.html into `folder`, from the run's log and what was predicted."""
    log = list(read_jsonl(run / "log.jsonl")) if (run / "log.jsonl").exists() else []
    template = resources.files("vlm2vla_training").joinpath("export_report.html").read_text(encoding="utf-8")
    parts = {
        "<!--TITLE-->": html.escape(card.name),
        "<!--FACTS-->": _table(_facts(card, summary)),
        "<!--LOSS-->": f'<img alt="loss over steps" src="{svg_url(loss_figure(log))}">' if log else "<p>no log</p>",
        "<!--MEASURED-->": _table(_readable(measured(found))) if found else "",
        "<!--STEPS-->": "\n".join(_article(one) for one in found) or "<p>Nothing was predicted: see --episodes.</p>",
    }
    for mark, text in parts.items():
        template = template.replace(mark, text)
    (folder / REPORT_FILE).write_text(template, encoding="utf-8")


def _facts(card: ModelCard, summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "base": card.base_model,
        "adapted": f"{card.adapter_scope}, {card.adapted_modules} modules",
        "representation": card.representation,
        "examples": f"{summary['examples']} ({json.dumps(summary['kinds'])})",
        "steps": summary["steps"],
        "loss, mean of the run": summary["loss"],
        "held-out loss": summary.get("held_out_loss"),
        "preset": json.dumps(summary["preset"]),
        "data hash": card.data_hash,
        "licence": card.licence,
    }


def _readable(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace("_", " "): json.dumps(value) if isinstance(value, dict) else value
        for name, value in figures.items()
    }


def _table(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<table>{rows}</table>"


def _article(one: Prediction) -> str:
    line, compared = one.line, one.line["comparison"]
    if compared is None:
        verdict = f"did not parse: <code>{html.escape(str(line['text'] or line['plan']))[:400]}</code>"
    else:
        verdict = (
            f"end point off {compared['end_error_mm']:.1f} mm, {compared['axes_agree']} of 3 axes agree, gripper "
            f"{compared['gripper']}"
        )
    plan = html.escape(str(line["plan"])) if line["plan"] else ""
    return (
        f"<article>{one.drawing}<h3>{html.escape(line['subtask'])}</h3><p>{plan}</p><p>{verdict}</p>"
        f'<p class="key">{html.escape(line["episode_key"])}, row {line["first"]}</p></article>'
    )
