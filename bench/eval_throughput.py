"""Trials a minute with `eval --parallel N` and one at a time, on the same seeds and the same server, in one run.

    vlm2vla-server serve --twin --engine vllm &          # the environment of scripts/install-server or .venv-vllm
    python bench/eval_throughput.py --out bench/results/eval_throughput.json

Blocks of trials are run in turns, and who goes first changes from block to block: what else runs on the machine and
what the server remembers of a picture then count for both alike. Must: at least three times one at a time, and every
trial the same in both ways but for its times. Exit code 1 and `missed` say what did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm2vla_client.evaluation.options import EvalOptions, suites_of
from vlm2vla_client.evaluation.run import run_suite, server_facts
from vlm2vla_client.evaluation.statistics import describe
from vlm2vla_client.evaluation.trials import Trial, read_trials
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.machine import about_machine, current_commit
from vlm2vla_client.recorder import write_json_atomic

MUST_RATIO = 3.0
TIMES = ("seconds", "cycle_seconds", "verify_seconds", "finished_utc", "retries")
READY_WAIT_S = 300.0


def content(trial: Trial) -> dict[str, Any]:
    """A trial without what the clock on the wall says."""
    return {name: value for name, value in asdict(trial).items() if name not in TIMES}


def block(options: EvalOptions, connection: ServerConnection) -> tuple[float, list[Trial]]:
    """Seconds of one call, everything included, and its trials by suite and seed."""
    began_s = time.perf_counter()
    run_suite(options, connection)
    return time.perf_counter() - began_s, sorted(read_trials(options.out), key=lambda trial: trial.key)


def measure(arguments: argparse.Namespace, connection: ServerConnection, folder: Path) -> dict[str, Any]:
    """All blocks, both ways."""
    ways = {"parallel": arguments.parallel, "alone": 1}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    trials: dict[str, list[Trial]] = {way: [] for way in ways}
    processor: dict[str, float] = dict.fromkeys(ways, 0.0)
    for number in range(arguments.blocks):
        for way in sorted(ways, reverse=bool(number % 2)):
            seed = arguments.seed + number * arguments.trials
            options = EvalOptions(
                suites_of(arguments.suite), arguments.trials, seed, folder / f"{way}-{number}",
                verifiers=(arguments.verifier,), parallel=ways[way],
            )  # fmt: skip
            used_s = time.process_time()
            took_s, found = block(options, connection)
            processor[way] += time.process_time() - used_s
            seconds[way].append(took_s)
            trials[way] += found
            print(f"block {number} {way}: {len(found)} trials in {took_s:.1f} s", file=sys.stderr, flush=True)
    return figures(seconds, trials, processor)


def figures(
    seconds: dict[str, list[float]], trials: dict[str, list[Trial]], processor: dict[str, float]
) -> dict[str, Any]:
    """What is written down: rates, their ratio, and whether the trials were the same."""
    pairs = list(zip(trials["alone"], trials["parallel"], strict=True))
    other = [list(one.key) for one, two in pairs if content(one) != content(two)]
    ways = {
        way: {
            "trials": len(trials[way]),
            "seconds": round(sum(seconds[way]), 2),
            "trials_a_minute": round(60 * len(trials[way]) / sum(seconds[way]), 2),
            "seconds_of_blocks": [round(value, 2) for value in seconds[way]],
            "cycle_s": describe([value for trial in trials[way] for value in trial.cycle_seconds]),
            "client_processor_s_a_trial": round(processor[way] / len(trials[way]), 3),
            "successes": sum(trial.success for trial in trials[way]),
            "restarted": sum(trial.retries > 0 for trial in trials[way]),
        }
        for way in seconds
    }
    by_block = [alone / side for alone, side in zip(seconds["alone"], seconds["parallel"], strict=True)]
    return {
        "ratio": round(sum(seconds["alone"]) / sum(seconds["parallel"]), 2),
        "ratio_of_blocks": [round(value, 2) for value in by_block],
        "same_trials": len(pairs) - len(other),
        "other_trials": other,
        **ways,
    }


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000", metavar="URL")
    parser.add_argument("--suite", default="pick_carrot", metavar="NAMES")
    parser.add_argument("--verifier", choices=("server", "twin", "none"), default="twin")
    parser.add_argument("--parallel", type=int, default=8, metavar="N")
    parser.add_argument("--trials", type=int, default=16, metavar="N", help="of each suite in a block (default 16)")
    parser.add_argument("--blocks", type=int, default=4, metavar="N", help="blocks each way (default 4)")
    parser.add_argument("--seed", type=int, default=500_000, metavar="S", help="development seeds (default 500000)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the file, prints the ratio; 1 when a must did not hold."""
    arguments = build_parser().parse_args(argv)
    connection = ServerConnection(arguments.server)
    connection.wait_ready(READY_WAIT_S)
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        warm = EvalOptions(
            suites_of(arguments.suite), 1, arguments.seed - 1, Path(folder) / "warm", verifiers=("twin",)
        )
        run_suite(warm, connection)
        found = measure(arguments, connection, Path(folder))
    missed = [] if found["ratio"] >= MUST_RATIO else [f"{found['ratio']} times one at a time, must be {MUST_RATIO:g}"]
    if found["other_trials"]:
        missed.append(f"{len(found['other_trials'])} trials were not the same")
    names = ("suite", "verifier", "parallel", "trials", "blocks", "seed")
    result = {
        "missed": missed,
        **found,
        "asked": {name: getattr(arguments, name) for name in names},
        "server": server_facts(connection, None),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "machine": about_machine(),
        "commit": current_commit(),
    }
    write_json_atomic(arguments.out, result)
    print(json.dumps({name: result[name] for name in ("ratio", "ratio_of_blocks", "same_trials", "missed")}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
