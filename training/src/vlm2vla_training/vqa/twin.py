"""The twin's VQA benchmark run against a server: ask, keep every answer, count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vla_schema.messages import BASE_MODEL_NAME
from vlm2vla_training.jsonio import JsonlAppender, read_jsonl
from vlm2vla_training.progress import track
from vlm2vla_training.vqa.ask import Server
from vlm2vla_training.vqa.proportions import ratio_interval, wilson
from vlm2vla_training.vqa.questions import OTHER, TRAINED, Question, constant_answer, correct, questions
from vlm2vla_training.vqa.table1 import retention

ANSWERS_FILE = "answers.jsonl"
WORDINGS = (OTHER, TRAINED)


def run_twin(server: Server, models: Sequence[str], out: Path, count: int, first_seed: int, at_once: int) -> Any:
    """Ask every model every question in both wordings; goes on behind the last whole answer in answers.jsonl.

    Args:
        models: base first. count: questions of each kind.

    Returns:
        What summary.json holds of it (see :func:`figures`).

    Raises:
        DataError: a request failed; the answers so far are kept.
    """
    asked = questions(count, first_seed)
    path = out / ANSWERS_FILE
    lines = list(read_jsonl(path)) if path.exists() else []
    done = {(line["model"], line["question"], line["wording"]) for line in lines}
    jobs = [(model, one, wording) for one in asked for wording in WORDINGS for model in models]
    jobs = [(model, one, wording) for model, one, wording in jobs if (model, one.number, wording) not in done]
    with JsonlAppender(path) as file:
        answers = server.ask_all(jobs, at_once)
        for (model, one, wording), said in track(zip(jobs, answers, strict=True), len(jobs), "vqa"):
            line = line_of(model, one, wording, said)
            file.append(line)
            lines.append(line)
    return figures(lines, models)


def line_of(model: str, one: Question, wording: str, said: str) -> dict[str, Any]:
    """One line of answers.jsonl."""
    return {
        "model": model, "question": one.number, "kind": one.kind, "seed": one.seed, "wording": wording,
        "text": one.texts[wording], "expected": one.answer, "said": said, "right": correct(said, one.answer),
    }  # fmt: skip


def figures(lines: Sequence[dict[str, Any]], models: Sequence[str]) -> dict[str, Any]:
    """Count: by wording, for each kind and for all together, accuracy and interval of each model, the accuracy of a
    constant answer, and the share that each adapter keeps of the base (with a bootstrap interval for all together).
    """
    ordered = sorted(lines, key=lambda line: int(line["question"]))
    kinds = list(dict.fromkeys(str(line["kind"]) for line in ordered))
    result: dict[str, Any] = {}
    for wording in WORDINGS:
        here = [line for line in ordered if line["wording"] == wording]
        right = {
            kind: {
                model: [bool(line["right"]) for line in here if line["model"] == model and line["kind"] == kind]
                for model in models
            }
            for kind in kinds
        }
        expected = {
            kind: [line["expected"] for line in here if line["kind"] == kind and line["model"] == models[0]]
            for kind in kinds
        }
        everything = {model: [value for kind in kinds for value in right[kind][model]] for model in models}
        result[wording] = {
            "kinds": {
                kind: {
                    "questions": len(expected[kind]),
                    "constant_answer": round(constant_answer(expected[kind]), 4),
                    "models": {model: _accuracy(right[kind][model]) for model in models},
                }
                for kind in kinds
            },
            "all": {model: _accuracy(everything[model]) for model in models},
            "retention": {
                model: _kept(right, everything, model) for model in models if model != BASE_MODEL_NAME
            },
        }  # fmt: skip
    return result


def _accuracy(right: Sequence[bool]) -> dict[str, Any]:
    low, high = wilson(sum(right), len(right))
    return {
        "right": sum(right), "n": len(right), "accuracy": round(sum(right) / len(right), 4),
        "wilson_95": [round(low, 4), round(high, 4)],
    }  # fmt: skip


def _kept(right: dict[str, dict[str, list[bool]]], everything: dict[str, list[bool]], model: str) -> dict[str, Any]:
    def means(name: str) -> dict[str, float]:
        return {kind: sum(values[name]) / len(values[name]) for kind, values in right.items()}

    kept = retention(means(BASE_MODEL_NAME), means(model))
    interval = ratio_interval(everything[BASE_MODEL_NAME], everything[model])
    whole = sum(everything[BASE_MODEL_NAME])
    return {
        "by_kind": {kind: None if value is None else round(value, 4) for kind, value in kept.shares.items()},
        "minimum": kept.minimum if kept.minimum is None else round(kept.minimum, 4),
        "mean": kept.mean if kept.mean is None else round(kept.mean, 4),
        "all": round(sum(everything[model]) / whole, 4) if whole else None,
        "all_95": None if interval is None else [round(value, 4) for value in interval],
    }
