"""``eval sheet``, ``eval overlay`` and ``eval sheet-report``: trials on a real bench, scored by a person."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm2vla_client.clock import SystemClock
from vlm2vla_client.config import load_config
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.evaluation.comparison import Run, write_comparison
from vlm2vla_client.evaluation.options import PAPER_TRIALS, suites_of, trials_of
from vlm2vla_client.evaluation.overlay import OVERLAY, photograph, reference_of, show, start_file
from vlm2vla_client.evaluation.report import REPORT
from vlm2vla_client.evaluation.sheet import KEY, PAGE, SHEET, Planned, plan_sheet, read_plan, write_plan
from vlm2vla_client.evaluation.sheet_page import write_sheet_page
from vlm2vla_client.evaluation.sheet_read import Filled, SheetError, read_sheet
from vlm2vla_client.evaluation.starts import as_url, start_picture
from vlm2vla_client.evaluation.summary import SUMMARY, overridden, summarise
from vlm2vla_client.progress import printable
from vlm2vla_client.recorder import write_json_atomic
from vlm2vla_twin.tasks import SUITES

DRAWN = (320, 240)
SHOWN_PROBLEMS = 50


def sheet(argv: Sequence[str]) -> int:
    """Writes a new trial sheet with its key and the pictures of its starts."""
    parser = argparse.ArgumentParser(
        prog="vlm2vla-client eval sheet",
        description="A blind, blocked trial sheet for a real bench: a CSV to fill, a page to print, a key to put away.",
    )
    parser.add_argument("--suites", required=True, metavar="NAMES", help="as eval --suite")
    parser.add_argument("--policies", required=True, metavar="A,B,...", help="names that the report will use")
    parser.add_argument("--reactive", default="", metavar="A,...", help="policies that write no plan (D.1)")
    parser.add_argument(
        "--trials", type=trials_of, default=PAPER_TRIALS, metavar="N", help="of each policy and task, or 'paper' (30)"
    )
    parser.add_argument("--seed", type=int, default=1_000_000, metavar="S", help="of starts and order")
    parser.add_argument("--mode", choices=("varied", "paper"), default="paper", help="paper: what D.1 varies (default)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(argv)
    reactive = [name.strip() for name in given.reactive.split(",") if name.strip()]
    policies = [name.strip() for name in given.policies.split(",")]
    suites = suites_of(given.suites)
    plan = plan_sheet(suites, policies, given.trials, given.seed, mode=given.mode, reactive=reactive)
    write_plan(given.out, plan)
    starts = list(dict.fromkeys((line.suite, line.start) for line in plan.lines))
    for number, (suite, start) in enumerate(starts, start=1):
        path = start_file(given.out, suite, start)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(start_picture(suite, start, plan.mode))
        if number % 50 == 0:
            print(f"{number}/{len(starts)} starts drawn", file=sys.stderr, flush=True)
    write_sheet_page(given.out, plan.lines, lambda suite, start: start_picture(suite, start, plan.mode, DRAWN))
    print(f"{len(plan.lines)} trials, {len(starts)} starts: fill {given.out / SHEET}, print {given.out / PAGE}")
    print(f"who is who stands in {given.out / KEY}: keep it from whoever scores")
    return 0


def overlay(argv: Sequence[str]) -> int:
    """Shows how the bench must look before a trial, over how it looks now."""
    from vlm2vla_client.cameras.choose import open_camera
    from vlm2vla_client.cli import add_camera
    from vlm2vla_client.commands import camera_options

    parser = argparse.ArgumentParser(
        prog="vlm2vla-client eval overlay",
        description="Writes overlay.png: the start of a trial over the live picture, half and half.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trial", type=int, required=True, metavar="N")
    parser.add_argument("--watch", action="store_true", help="write it twice a second until Ctrl-C")
    parser.add_argument(
        "--photograph", action="store_true", help="keep the live picture as this start's reference for later trials"
    )
    parser.add_argument("--share", type=float, default=0.5, metavar="F", help="of the reference, 0 to 1 (default 0.5)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="client.toml (default: the user's config folder)")
    add_camera(parser)
    given = parser.parse_args(argv)
    line = _line(given.folder, given.trial)
    name = given.camera or load_config(given.config).camera
    options = camera_options(given, name)
    if options is None:
        raise ConfigurationError("a bench needs a camera of its own, not the twin's: see --camera")
    camera = open_camera(options, SystemClock())
    photo = start_file(given.folder, line.suite, line.start, photo=True)
    if given.photograph:
        photograph(camera, photo)
        print(f"kept {photo}")
        return 0
    reference, is_photo = reference_of(given.folder, line.suite, line.start)
    path = given.folder / OVERLAY
    print(f"trial {line.trial}: {printable(line.task)}; start {line.start}, policy {line.policy}", flush=True)
    print(f"see {path}", flush=True)
    if not is_photo:
        print("the reference is the twin's drawing: put the objects down, then --photograph the start")
    found = show(camera, reference, path, watch=given.watch, share=given.share)
    print(f"difference {100 * found:.1f} %")
    return 0


def sheet_report(argv: Sequence[str]) -> int:
    """Reads a filled sheet and writes its report and summary."""
    parser = argparse.ArgumentParser(
        prog="vlm2vla-client eval sheet-report", description="The report of a filled trial sheet, strictly read."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="the filled CSV (default DIR/sheet.csv)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="who is who (default DIR/key.json)")
    parser.add_argument("--partial", action="store_true", help="leave out lines that nobody filled")
    parser.add_argument("--out", type=Path, metavar="FILE", help="an HTML file (default DIR/report.html)")
    parser.add_argument("--sequential", action="store_true", help="with a p-value that may be looked at at any time")
    given = parser.parse_args(argv)
    try:
        filled = read_sheet(given.folder, key=given.key, sheet=given.sheet, partial=given.partial)
    except SheetError as error:
        for problem in error.problems[:SHOWN_PROBLEMS]:
            print(printable(problem), file=sys.stderr)
        if len(error.problems) > SHOWN_PROBLEMS:
            print(f"and {len(error.problems) - SHOWN_PROBLEMS} more", file=sys.stderr)
        raise
    runs = [_run(policy) for policy in filled if policy.trials]
    if not runs:
        raise ConfigurationError("no line of the sheet is filled")
    path, starts = given.out or given.folder / REPORT, _starts(given.folder, runs)
    write_comparison(path, runs, starts, "a person", any_time=given.sequential)
    write_json_atomic(path.with_name(SUMMARY), {run.label: run.summary for run in runs})
    for policy, run in zip([policy for policy in filled if policy.trials], runs, strict=True):
        done = sum(trial.success for trial in run.trials)
        left = f", {policy.left_out} not filled" if policy.left_out else ""
        print(f"{printable(run.label)}: {done}/{len(run.trials)} full scores{left}")
    print(f"report: {path}")
    return 0


def _line(folder: Path, trial: int) -> Planned:
    lines, _ = read_plan(folder)
    found = next((line for line in lines if line.trial == trial), None)
    if found is None:
        raise ConfigurationError(f"--trial must be 1 to {len(lines)}, received {trial}")
    return found


def _run(filled: Filled) -> Run:
    trials = overridden(filled.trials, filled.overrides)
    return Run(filled.policy, summarise(trials, {}, len(filled.overrides), filled.trials), trials)


def _starts(folder: Path, runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """The picture of one start of each task, as the sheet has it."""
    first = {trial.suite: trial for run in reversed(runs) for trial in reversed(run.trials)}
    found = {}
    for name in (name for name in SUITES if name in first):
        trial = first[name]
        path = start_file(folder, name, trial.seed)
        if path.is_file():
            caption = f"{SUITES[name].label}: {trial.task} (start {trial.seed})"
            found[name] = (as_url(path.read_bytes()), caption)
    return found
