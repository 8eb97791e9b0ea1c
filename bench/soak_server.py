"""Several robots at once against one server, for minutes: errors, memory, streams without an end, order.

Run by hand (`scripts/soak server --robots 8 --minutes 10`). Each robot asks for a cycle or for rows (streamed), then
for a verdict, again and again under its own episode; now and then it sends a newer cycle while the older one runs,
which must cancel it with 499. Beside them somebody asks questions, which must wait behind the robots. Success at the
task is not judged here. Prints a table, writes one JSON file; exit code 1, and `problems`, when something did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from soak import BIN, ROOT, free_port, machine, open_files, wait_until_ready
from soak_server_load import DEADLINE_S, KINDS, Seen, load

WARM_UP_SHARE = 0.3
"""Of the run; memory is compared after it."""
MAX_GROWTH_MB = 40.0
LEAST_SAMPLES = 9
MEMORY_RULE = (
    f"after the first {WARM_UP_SHARE:.0%} of the run: median of the last third of samples less that of the first, "
    f"at most {MAX_GROWTH_MB:g} MB"
)
HEALTH_LIMIT_S = 1.0
MAX_MORE_FILES = 5


def _steady(samples: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The samples (seconds, MB) after the warm-up; none when there are too few to compare."""
    if len(samples) < LEAST_SAMPLES:
        return []
    return [(at_s, value) for at_s, value in samples if at_s >= WARM_UP_SHARE * samples[-1][0]]


def growth_mb(samples: list[tuple[float, float]]) -> float:
    """Median of the last third of what follows the warm-up, less the median of its first third."""
    steady = [value for _, value in _steady(samples)]
    third = max(1, len(steady) // 3)
    return statistics.median(steady[-third:]) - statistics.median(steady[:third]) if steady else 0.0


def slope_mb_per_min(samples: list[tuple[float, float]]) -> float:
    """Least-squares slope of what follows the warm-up; told beside the growth, which is what is judged."""
    steady = _steady(samples)
    if len(steady) < 2:
        return 0.0
    return 60.0 * statistics.linear_regression([at_s for at_s, _ in steady], [value for _, value in steady]).slope


def mean_waits(metrics: str) -> dict[str, float]:
    """Mean wait in the server's queue in seconds, by what requests are for."""
    found: dict[str, float] = {}
    for kind in KINDS:
        total, count = (
            re.search(rf'^vlm2vla_queue_seconds_{part}{{priority="{kind}"}} (\S+)$', metrics, re.MULTILINE)
            for part in ("sum", "count")
        )
        if total and count and float(count[1]):
            found[kind] = round(float(total[1]) / float(count[1]), 3)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Count, p50, p95, p99 and maximum."""
    ordered = sorted(values)
    if not ordered:
        return {}
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in
          (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}  # fmt: skip
    rounded = {name: round(value, 3) for name, value in at.items()}
    return {"count": len(ordered), **rounded, "max": round(ordered[-1], 3)}


def judge(seen: Seen, waits: dict[str, float], exit_code: int, files: tuple[int, int]) -> list[str]:
    """What did not hold, in words. waits: by kind, as the server's own metrics have them."""
    problems = list(seen.problems)
    if seen.streams_without_end:
        problems.append(f"{seen.streams_without_end} streams had no end, or more than one")
    if seen.superseded_won:
        problems.append(f"{seen.superseded_won} older cycles finished after the newer one of their episode")
    if seen.superseding and seen.superseded_cancelled <= seen.superseded_swapped:
        problems.append("older cycles were not cancelled by newer ones")
    if growth_mb(seen.memory_mb) > MAX_GROWTH_MB:
        problems.append(f"memory grew by {growth_mb(seen.memory_mb):.0f} MB after warm-up")
    measured = {kind: statistics.median(values) for kind, values in seen.queue_s.items() if values}
    for what, found in (("mean waits of the server", waits), ("median waits of the callers", measured)):
        in_order = [found[kind] for kind in KINDS if kind in found]
        if in_order != sorted(in_order):
            problems.append(f"{what} are not in the order {', '.join(KINDS)}: {found}")
    if seen.health_s and max(seen.health_s) > HEALTH_LIMIT_S:
        problems.append(f"/healthz took {max(seen.health_s):.1f} s")
    if not seen.cycle_s:
        problems.append("no cycle was finished")
    if exit_code != 0:
        problems.append(f"the server ended with {exit_code} on SIGTERM")
    if files[1] > files[0] + MAX_MORE_FILES:
        problems.append(f"open files grew from {files[0]} to {files[1]}")
    return problems


def table(result: dict[str, Any]) -> str:
    """The result for eyes."""
    lines = [f"{'seconds':<22}{'count':>8}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}"]
    rows = {f"wait of {kind}": values for kind, values in result["queue_s"].items()}
    rows |= {"cycle": result["cycle_s"], "first row": result["first_row_s"], "/healthz": result["healthz_s"]}
    for name, found in rows.items():
        values = "".join(f"{found[key]:>9.3f}" for key in ("p50", "p95", "p99", "max")) if found else "        -"
        lines.append(f"{name:<22}{found.get('count', 0):>8}{values}")
    lines.append("")
    for name in ("outcomes", "streams", "streams_without_end", "latest_wins", "growth_after_warm_up_mb",
                 "slope_after_warm_up_mb_per_min", "open_files", "exit_code_on_sigterm", "load_average"):  # fmt: skip
        lines.append(f"{name.replace('_', ' ')}: {result[name]}")
    return "\n".join([*lines, f"problems: {'; '.join(result['problems']) or 'none'}"])


def report(seen: Seen, metrics: str, exit_code: int, files: tuple[int, int]) -> dict[str, Any]:
    """What is committed of a run."""
    waits = mean_waits(metrics)
    return {
        "outcomes": dict(sorted(seen.outcomes.items())), "streams": seen.streams,
        "streams_without_end": seen.streams_without_end,
        "latest_wins": {"superseding": seen.superseding, "older_cancelled": seen.superseded_cancelled,
                        "older_finished_before": seen.superseded_finished_first, "older_won": seen.superseded_won,
                        "received_in_the_other_order": seen.superseded_swapped},
        "queue_s": {kind: spread(values) for kind, values in seen.queue_s.items()}, "mean_queue_of_server_s": waits,
        "cycle_s": spread(seen.cycle_s), "first_row_s": spread(seen.first_row_s), "healthz_s": spread(seen.health_s),
        "memory_rule": MEMORY_RULE, "growth_after_warm_up_mb": round(growth_mb(seen.memory_mb), 1),
        "slope_after_warm_up_mb_per_min": round(slope_mb_per_min(seen.memory_mb), 2), "open_files": files,
        "exit_code_on_sigterm": exit_code, "problems": judge(seen, waits, exit_code, files),
        "memory_mb": seen.memory_mb,
    }  # fmt: skip


def soak(arguments: argparse.Namespace) -> tuple[Seen, str, int, tuple[int, int]]:
    """Start the server, load it, stop it. Returns what was seen, /metrics, exit code, open files before and after."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(BIN / "vlm2vla-server"), "serve", *(arguments.server_argument or ["--twin"]), "--port", str(port),
               "--max-concurrency", str(4 * arguments.robots)]  # fmt: skip
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(url, server)
        files_before = open_files(server.pid)
        seen, metrics = asyncio.run(
            load(url, arguments.robots, 60 * arguments.minutes, server.pid, deadline_s=arguments.deadline_s)
        )
        time.sleep(1.0)
        files = (files_before, open_files(server.pid))
        server.send_signal(signal.SIGTERM)
        return seen, metrics, server.wait(timeout=60), files
    finally:
        server.kill()
        server.wait(timeout=20)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak server", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--robots", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--deadline-s", type=float, default=DEADLINE_S, help="of a request; more on a starved machine")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/soak_server.json")
    parser.add_argument("--server-argument", action="append", default=None, help="instead of --twin; repeatable")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    found = report(*soak(arguments))
    result = {
        "command": " ".join(["scripts/soak server", *sys.argv[1:]]), "robots": arguments.robots,
        "minutes": arguments.minutes, "deadline_s": arguments.deadline_s, **machine(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)], **found,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
