"""`vqa`: Table 1 or tasks of one's own by lmms-eval, or the twin's benchmark; base and adapter on one server."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

from vlm2vla_schema.messages import BASE_MODEL_NAME
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import same_run
from vlm2vla_training.progress import finish
from vlm2vla_training.vqa.ask import Server
from vlm2vla_training.vqa.lmms import LmmsEval, missing, say
from vlm2vla_training.vqa.questions import OTHER, QUESTIONS
from vlm2vla_training.vqa.report import lmms_lines, twin_lines, write_report
from vlm2vla_training.vqa.table1 import CHECKED_WITH, TABLE_1, Benchmark, retention
from vlm2vla_training.vqa.twin import run_twin

TWIN, TABLE = "twin", "table1"


def run_vqa(args: argparse.Namespace) -> int:
    """`vqa`: ask, tabulate, write summary.json, report.html and retention.png."""
    started = time.monotonic()
    if args.concurrent < 1 or args.questions < 1 or args.limit < 0:
        raise UsageError("--concurrent and --questions: expected at least 1; --limit: 0 or more")
    if args.check_tasks:
        return _check(args, started)
    wanted = benchmarks(args.benchmarks)
    if args.benchmarks != TWIN and args.lmms_python is None:
        raise UsageError("these benchmarks are lmms-eval's: give the python of its environment with --lmms-python")
    key = args.api_key or os.environ.get("VLM2VLA_API_KEY")
    with Server(args.server, key) as server:
        models = server.models([name for name in (args.models or "").split(",") if name])
        settings: dict[str, Any] = {"benchmarks": args.benchmarks, "models": models}
        if args.benchmarks == TWIN:
            settings |= {"questions": args.questions, "first_seed": args.seed}
        else:
            settings |= {"limit": args.limit}
        if args.dry_run:
            what = f"{args.questions} questions of {len(QUESTIONS)} kinds" if not wanted else _names(wanted)
            print(f"vqa: would ask {', '.join(models)} on {args.server}: {what}")
            return 0
        same_run(args.out, settings)
        if args.benchmarks == TWIN:
            result = run_twin(server, list(models), args.out, args.questions, args.seed, args.concurrent)
            lines = twin_lines(result, list(models))
            kept = result[OTHER]["retention"]
        else:
            result = _run_lmms(args, key, list(models), wanted)
            lines = lmms_lines(result, list(models))
            kept = result["retention"]
    print("\n".join(lines))
    summary = {**settings, **result}
    write_report(args.out, summary, list(models))
    line = "; ".join(_kept(model, one) for model, one in kept.items()) or "the base alone was asked"
    finish("vqa", args.out, summary, started, line)
    return 0


def benchmarks(text: str) -> list[Benchmark]:
    """What to run: nothing of lmms-eval for "twin", the twelve for "table1", else TASK or TASK=METRIC, by commas.

    Raises:
        UsageError: an empty name.
    """
    if text == TWIN:
        return []
    if text == TABLE:
        return list(TABLE_1)
    known = {one.task: one for one in TABLE_1}
    found = []
    for part in text.split(","):
        task, _, metric = part.strip().partition("=")
        if not task:
            raise UsageError(f"--benchmarks {text!r}: expected {TWIN}, {TABLE}, or TASK[=METRIC] by commas")
        one = known.get(task)
        found.append(one if one and metric in ("", one.metric) else Benchmark(task, task, metric, 100.0, 0.0, 0.0, 0.0))
    return found


def _names(wanted: Sequence[Benchmark]) -> str:
    return ", ".join(one.task for one in wanted)


def _lmms(args: argparse.Namespace, key: str | None) -> LmmsEval:
    return LmmsEval(args.lmms_python, args.server.rstrip("/"), key, args.concurrent, args.limit, args.include_path)


def _check(args: argparse.Namespace, started: float) -> int:
    if args.lmms_python is None:
        raise UsageError("--check-tasks asks an installed lmms-eval: give its environment's python with --lmms-python")
    version, metrics = _lmms(args, None).check([one.task for one in TABLE_1])
    lacking = missing(metrics)
    for one in TABLE_1:
        found = metrics.get(one.task)
        print(f"{one.name:12} {one.task:16} {one.metric:22} {'ok' if found and one.metric in found else 'MISSING'}")
    if lacking:
        raise DataError(f"lmms-eval {version} is not what Table 1 was mapped to ({CHECKED_WITH}): {'; '.join(lacking)}")
    facts = {"lmms_eval": version, "checked_with": CHECKED_WITH, "tasks": {one.task: one.metric for one in TABLE_1}}
    finish("vqa", args.out, facts, started, f"all {len(TABLE_1)} tasks and metrics are in lmms-eval {version}")
    return 0


def _run_lmms(args: argparse.Namespace, key: str | None, models: list[str], wanted: list[Benchmark]) -> dict[str, Any]:
    lmms = _lmms(args, key)
    version, metrics = lmms.check([one.task for one in wanted])
    unknown = [name for name, found in metrics.items() if found is None]
    if unknown:
        raise UsageError(f"lmms-eval {version} has no task {', '.join(unknown)}; --include-path adds task files")
    scores: dict[str, dict[str, float]] = {model: {} for model in models}
    tasks: dict[str, dict[str, Any]] = {}
    total = len(wanted) * len(models)
    for place, (one, model) in enumerate((one, model) for one in wanted for model in models):
        say(f"vqa: {place + 1}/{total}, {one.task} on {model}")
        folder = args.out / "lmms" / model / one.task
        metric, value, count = lmms.score(model, one.task, one.metric or None, folder)
        scores[model][one.name] = round(value * one.scale, 4)
        tasks[one.name] = {"task": one.task, "metric": metric, "questions": count}
    adapters = [model for model in models if model != BASE_MODEL_NAME]
    kept = {model: _rounded(retention(scores[BASE_MODEL_NAME], scores[model])) for model in adapters}
    return {"lmms_eval": version, "tasks": tasks, "scores": scores, "retention": kept, "judge": BASE_MODEL_NAME}


def _rounded(kept: Any) -> dict[str, Any]:
    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    shares = {name: short(value) for name, value in kept.shares.items()}
    return {"shares": shares, "minimum": short(kept.minimum), "mean": short(kept.mean)}


def _kept(model: str, one: dict[str, Any]) -> str:
    def per_cent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    return f"{model} keeps {per_cent(one['mean'])} of the base on average, {per_cent(one['minimum'])} at least"
