"""``vlm2vla-client eval``: run an evaluation, compare several, or correct a plan's verdict by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm2vla_client.config import check_server_url, load_config
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.evaluation.comparison import Run, write_comparison
from vlm2vla_client.evaluation.options import (
    GROUPS,
    PAPER_TRIALS,
    POLICIES,
    VERIFIERS,
    EvalOptions,
    suites_of,
    trials_of,
)
from vlm2vla_client.evaluation.run import read_evaluation, rebuild, run_suite
from vlm2vla_client.evaluation.sheet_cli import overlay, sheet, sheet_report
from vlm2vla_client.evaluation.starts import starts_of
from vlm2vla_client.evaluation.summary import Summary
from vlm2vla_client.evaluation.trials import Override, Trial, add_override
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.progress import printable
from vlm2vla_twin.tasks import SUITES

COMMANDS = ("run", "compare", "override", "report", "sheet", "overlay", "sheet-report")
READY_WAIT_S = 120.0
SHEET_COMMANDS = {"sheet": sheet, "overlay": overlay, "sheet-report": sheet_report}


def build_parser() -> argparse.ArgumentParser:
    """The options of ``eval``; ``run`` is what it does when no other word is given."""
    parser = argparse.ArgumentParser(
        prog="vlm2vla-client eval",
        description="Measures a policy on suites of the twin. Continues where it stopped.",
        epilog="also: eval compare DIR DIR ... --out FILE | eval override DIR --suite NAME --seed S "
        "--plan-credit yes|no --by NAME --why TEXT | eval report DIR | eval sheet, eval overlay, eval sheet-report: "
        "trials on a real bench",
    )
    parser.add_argument(
        "--suite", required=True, metavar="NAME", help=f"{', '.join([*SUITES, *GROUPS])}, or several with commas"
    )
    parser.add_argument(
        "--trials", type=trials_of, default=PAPER_TRIALS, metavar="N",
        help="trials of each task, or 'paper' for its counts: 30, so 90 for the three languages (default 30)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1_000_000, metavar="S", help="first seed (default 1000000)")
    parser.add_argument("--sim", action="store_true", help="the twin's robot and camera; the only ones so far")
    parser.add_argument("--policy", choices=POLICIES, default="server")
    parser.add_argument("--verifier", default="server", metavar="NAMES", help=f"{', '.join(VERIFIERS)} or a chain")
    parser.add_argument("--mode", choices=("varied", "paper"), default="varied", help="what varies between trials")
    parser.add_argument("--server", metavar="URL", help="where vlm2vla-server answers (default http://127.0.0.1:8000)")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token (or set VLM2VLA_API_KEY)")
    parser.add_argument("--model", metavar="NAME", help="adapter to ask, or 'base' (default: the server's first)")
    parser.add_argument("--policy-server", metavar="URL", help="where a baseline's own server answers")
    parser.add_argument("--unnorm-key", metavar="NAME", help="openvla, ecot: statistics of the actions (bridge_orig)")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N",
        help="trials at once, for a server that answers several at once (default 1; 8 to 14 suit the vllm engine)",
    )  # fmt: skip
    parser.add_argument("--record", action="store_true", help="keep a recording of every trial under DIR/episodes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="trials, summary and report")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs one evaluation command and returns its exit code: 0 when every trial is written, whatever the scores.

    Raises:
        ClientError: wrong usage, or the server failed; the command line turns it into one line and its exit code.
    """
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("run", argv)
    if command == "compare":
        return _compare(rest)
    if command == "override":
        return _override(rest)
    if command == "report":
        return _report(rest)
    if command in SHEET_COMMANDS:
        return SHEET_COMMANDS[command](rest)
    return _run(build_parser().parse_args(rest))


def _run(arguments: argparse.Namespace) -> int:
    config = load_config(None)
    verifiers = tuple(name.strip() for name in arguments.verifier.split(","))
    for name in verifiers:
        if name not in VERIFIERS:
            raise ConfigurationError(f"--verifier must be of {', '.join(VERIFIERS)}, received {name!r}")
    if arguments.trials < 1 or not 0 <= arguments.seed < 2**31 - arguments.trials:
        raise ConfigurationError("--trials must be at least 1 and every seed between 0 and 2147483647")
    options = EvalOptions(
        suites=suites_of(arguments.suite),
        trials=arguments.trials,
        seed=arguments.seed,
        out=arguments.out,
        policy=arguments.policy,
        verifiers=verifiers,
        model=arguments.model or config.model,
        policy_server=arguments.policy_server,
        unnorm_key=arguments.unnorm_key,
        mode=arguments.mode,
        record=arguments.record,
        parallel=arguments.parallel,
    )
    connection = None
    if options.needs_server:
        url = check_server_url(arguments.server or config.server)
        connection = ServerConnection(url, api_key=arguments.api_key or config.api_key)
    try:
        if connection is not None:
            connection.wait_ready(READY_WAIT_S)
        _say(run_suite(options, connection, told=_tell))
    finally:
        if connection is not None:
            connection.close()
    print(f"report: {options.out / 'report.html'}")
    return 0


def _report(argv: Sequence[str]) -> int:
    if "--out" in argv:
        return _compare(argv)
    parser = argparse.ArgumentParser(
        prog="vlm2vla-client eval report",
        description="Writes the summary and report of one folder again; with --out FILE, one page about several "
        "folders, as eval compare.",
    )
    parser.add_argument("folder", type=Path)
    _say(rebuild(parser.parse_args(argv).folder)[0])
    return 0


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlm2vla-client eval compare", description="One page about several policies on several suites."
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="the first is what others are compared to")
    parser.add_argument("--labels", metavar="A,B,...", help="names of the runs (default: the folders')")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="an HTML file")
    parser.add_argument("--sequential", action="store_true", help="with a p-value that may be looked at at any time")
    arguments = parser.parse_args(argv)
    labels = arguments.labels.split(",") if arguments.labels else [folder.name for folder in arguments.folders]
    if len(labels) != len(arguments.folders) or len(set(labels)) != len(labels):
        raise ConfigurationError("give one distinct label for each folder with --labels A,B,...")
    runs = []
    for label, folder in zip(labels, arguments.folders, strict=True):
        summary, trials = read_evaluation(folder)
        runs.append(Run(label, summary, trials))
    starts = starts_of(trial for run in runs for trial in run.trials)
    print(write_comparison(arguments.out, runs, starts, "physics", any_time=arguments.sequential))
    return 0


def _override(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlm2vla-client eval override", description="A person's verdict on a plan, in place of D.3's keywords."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--suite", required=True, choices=tuple(SUITES))
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--plan-credit", required=True, choices=("yes", "no"))
    parser.add_argument("--by", required=True, metavar="NAME")
    parser.add_argument("--why", required=True, metavar="TEXT")
    given = parser.parse_args(argv)
    add_override(given.folder, Override(given.suite, given.seed, given.plan_credit == "yes", given.by, given.why))
    _say(rebuild(given.folder)[0])
    return 0


def _tell(trial: Trial, done: int, wanted: int) -> None:
    word = "success" if trial.success else str(trial.failure).replace("_", " ")
    print(
        f"{done}/{wanted} {trial.suite} {trial.seed}: {trial.score}/{trial.max_score} {printable(word)}, "
        f"{trial.cycles} cycles, {trial.seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def _say(summary: Summary) -> None:
    for name, suite in summary.suites.items():
        low, high = 100 * suite.wilson_95.low, 100 * suite.wilson_95.high
        print(
            f"{name}: {suite.successes}/{suite.trials} = {100 * suite.success_rate:.1f} % "
            f"(95 % {low:.1f} to {high:.1f}), mean score {suite.mean_score:.2f} of {suite.max_score}"
        )
    if summary.cycle_s is not None:
        print(f"cycle: median {summary.cycle_s.median:.2f} s, mean {summary.cycle_s.mean:.2f} s")
