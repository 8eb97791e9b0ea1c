"""Several robots at once against one server, for minutes: errors, memory, streams without an end, order.

Run by hand (`scripts/soak`). Each robot asks for a cycle (streamed), then for a verdict, again and again under its own
episode; now and then it sends a newer cycle while the older one runs, which must cancel it. Beside them somebody asks
questions, which must wait behind the robots. Success at the task is not judged here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from soak import BIN, ROOT, free_port, machine, open_files, resident_mb, wait_until_ready

from vlm2vla_schema.images import encode_jpeg, to_base64
from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image

DEADLINE_MS = 120_000
SAMPLE_S = 5.0
WARM_UP_SHARE = 0.3
"""Of the run; memory is compared after it."""
MAX_GROWTH_MB = 40.0
HEALTH_LIMIT_S = 1.0
SUPERSEDE_EVERY = 5
SUBTASKS = ("Move to the carrot", "Grasp the carrot", "Lift the carrot", "Move the carrot to the plate")
IMAGES = [to_base64(encode_jpeg(probe_image(index, 480))) for index in range(len(PROBE_PROMPTS))]


@dataclass
class Seen:
    """What the callers saw. outcomes: by path, the code of the answer or `done`."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    streams: int = 0
    streams_without_end: int = 0
    superseding: int = 0
    superseded_cancelled: int = 0
    superseded_finished_first: int = 0
    superseded_won: int = 0
    superseded_swapped: int = 0
    cycle_s: list[float] = field(default_factory=list)
    first_row_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    memory_mb: list[tuple[float, float]] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if len(self.problems) < 50:
            self.problems.append(text)


# 502 is the model's own failure to say something acceptable: counted, and not the server's fault. Questions wait while
# robots keep the engine busy, here without a pause, so their deadline may pass.
HONEST = {"done", "unparseable_output"}
HONEST_OF_QUESTIONS = HONEST | {"deadline_exceeded"}


@dataclass(frozen=True)
class Ended:
    outcome: str
    at_s: float


async def cycle(client: httpx.AsyncClient, seen: Seen, episode: str, chance: random.Random) -> Ended:
    body = {
        "image": chance.choice(IMAGES), "subtask": chance.choice(SUBTASKS), "episode_id": episode,
        "deadline_ms": DEADLINE_MS,
    }  # fmt: skip
    began_s = time.monotonic()
    outcome = "nothing"
    async with client.stream("POST", "/cycle", json=body, headers={"accept": "application/x-ndjson"}) as answer:
        if answer.status_code != 200:
            outcome = json.loads(await answer.aread())["error"]["code"]
        else:
            seen.streams += 1
            events = []
            async for line in answer.aiter_lines():
                event = json.loads(line)
                events.append(event["event"])
                if event["event"] == "row" and event["index"] == 0:
                    seen.first_row_s.append(time.monotonic() - began_s)
                if event["event"] in ("done", "error"):
                    outcome = "done" if event["event"] == "done" else event["error"]["code"]
            if sum(name in ("done", "error") for name in events) != 1 or events[-1] not in ("done", "error"):
                seen.streams_without_end += 1
    seen.outcomes[f"/cycle {outcome}"] += 1
    if outcome == "done":
        seen.cycle_s.append(time.monotonic() - began_s)
    return Ended(outcome, time.monotonic())


async def superseded_cycle(client: httpx.AsyncClient, seen: Seen, episode: str, chance: random.Random) -> None:
    """An older cycle and, a moment later, a newer one of the same episode. They travel on two connections: on a starved
    machine the older may be received last, and is then the newer one for the server."""
    seen.superseding += 1
    older = asyncio.create_task(cycle(client, seen, episode, chance))
    await asyncio.sleep(0.1 + chance.random() * 0.5)
    if older.done():
        seen.superseded_finished_first += 1
        return
    newer = await cycle(client, seen, episode, chance)
    old = await older
    if old.outcome == "cancelled":
        seen.superseded_cancelled += 1
    elif old.outcome == "done" and old.at_s > newer.at_s:
        seen.superseded_won += newer.outcome != "cancelled"
        seen.superseded_swapped += newer.outcome == "cancelled"
    else:
        seen.superseded_finished_first += 1
    for one in (old, newer):
        if one.outcome not in HONEST | {"cancelled"}:
            seen.problem(f"superseding cycles of {episode}: {one.outcome}")


async def post(client: httpx.AsyncClient, seen: Seen, path: str, body: dict[str, Any]) -> None:
    answer = await client.post(path, json={**body, "deadline_ms": DEADLINE_MS})
    outcome = "done" if answer.status_code == 200 else answer.json()["error"]["code"]
    seen.outcomes[f"{path} {outcome}"] += 1
    if outcome not in (HONEST_OF_QUESTIONS if path == "/vqa" else HONEST):
        seen.problem(f"{path}: {outcome}")


async def robot(client: httpx.AsyncClient, seen: Seen, number: int, until_s: float, least: int) -> None:
    chance, episode, count = random.Random(number), f"robot-{number}", 0
    while time.monotonic() < until_s or count < least:
        count += 1
        if count % SUPERSEDE_EVERY == 0:
            await superseded_cycle(client, seen, episode, chance)
        else:
            ended = await cycle(client, seen, episode, chance)
            if ended.outcome not in HONEST:
                seen.problem(f"cycle of {episode}: {ended.outcome}")
        before, after = chance.sample(IMAGES, 2)
        verify = {"before": before, "after": after, "subtask": SUBTASKS[0], "next_subtask": SUBTASKS[1]}
        await post(client, seen, "/verify", {**verify, "episode_id": episode})


async def asker(client: httpx.AsyncClient, seen: Seen, until_s: float) -> None:
    chance = random.Random(1)
    while time.monotonic() < until_s:
        body = {"image": chance.choice(IMAGES), "question": "What is on the counter?", "max_tokens": 40}
        await post(client, seen, "/vqa", body)
        await asyncio.sleep(0.5)


async def watch(client: httpx.AsyncClient, seen: Seen, pid: int, until_s: float) -> None:
    """Memory, and whether /healthz keeps answering."""
    began_s = time.monotonic()
    while time.monotonic() < until_s:
        asked_s = time.monotonic()
        if (await client.get("/healthz")).status_code != 200:
            seen.problem("/healthz did not answer 200")
        seen.health_s.append(time.monotonic() - asked_s)
        seen.memory_mb.append((round(asked_s - began_s, 1), round(resident_mb(pid), 1)))
        await asyncio.sleep(SAMPLE_S)


async def load(url: str, robots: int, seconds: float, pid: int, least: int = 0) -> tuple[Seen, str]:
    """Run the robots for some seconds and at least `least` rounds each. Returns what was seen, and /metrics."""
    seen = Seen()
    until_s = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=4 * robots + 8)
    timeout_s = DEADLINE_MS / 1000 + 30
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits, trust_env=False) as client:
        work = [robot(client, seen, number, until_s, least) for number in range(robots)]
        ended = await asyncio.gather(
            *work, asker(client, seen, until_s), watch(client, seen, pid, until_s), return_exceptions=True
        )
        for problem in ended:
            if isinstance(problem, BaseException):
                seen.problem(f"{type(problem).__name__}: {problem}")
        metrics = (await client.get("/metrics")).text
    return seen, metrics


def growth_mb(samples: list[tuple[float, float]]) -> float:
    """Median of the last third of what follows the warm-up, less the median of its first third."""
    if len(samples) < 9:
        return 0.0
    steady = [value for at_s, value in samples if at_s >= WARM_UP_SHARE * samples[-1][0]]
    third = max(1, len(steady) // 3)
    return statistics.median(steady[-third:]) - statistics.median(steady[:third])


def mean_waits(metrics: str) -> dict[str, float]:
    """Mean wait in the server's queue in seconds, by what requests are for."""
    found: dict[str, float] = {}
    for kind in ("act", "verify", "ask"):
        total, count = (
            re.search(rf'^vlm2vla_queue_seconds_{part}{{priority="{kind}"}} (\S+)$', metrics, re.MULTILINE)
            for part in ("sum", "count")
        )
        if total and count and float(count[1]):
            found[kind] = round(float(total[1]) / float(count[1]), 3)
    return found


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in
          (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}  # fmt: skip
    return {**{name: round(value, 3) for name, value in at.items()}, "max": round(ordered[-1], 3)}


def judge(seen: Seen, waits: dict[str, float], exit_code: int, files: tuple[int, int]) -> list[str]:
    problems = list(seen.problems)
    if seen.streams_without_end:
        problems.append(f"{seen.streams_without_end} streams had no end, or more than one")
    if seen.superseded_won:
        problems.append(f"{seen.superseded_won} older cycles finished after the newer one of their episode")
    if seen.superseding and seen.superseded_cancelled <= seen.superseded_swapped:
        problems.append("older cycles were not cancelled by newer ones")
    if growth_mb(seen.memory_mb) > MAX_GROWTH_MB:
        problems.append(f"memory grew by {growth_mb(seen.memory_mb):.0f} MB after warm-up")
    in_order = [waits[kind] for kind in ("act", "verify", "ask") if kind in waits]
    if in_order != sorted(in_order):
        problems.append(f"mean waits are not in the order act, verify, ask: {waits}")
    if seen.health_s and max(seen.health_s) > HEALTH_LIMIT_S:
        problems.append(f"/healthz took {max(seen.health_s):.1f} s")
    if not seen.cycle_s:
        problems.append("no cycle was finished")
    if exit_code != 0:
        problems.append(f"the server ended with {exit_code} on SIGTERM")
    if files[1] > files[0] + 5:
        problems.append(f"open files grew from {files[0]} to {files[1]}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--robots", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/soak_robots.json")
    parser.add_argument("--server-argument", action="append", default=None, help="instead of --twin; repeatable")
    arguments = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(BIN / "vlm2vla-server"), "serve", *(arguments.server_argument or ["--twin"]), "--port", str(port),
               "--max-concurrency", str(4 * arguments.robots)]  # fmt: skip
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    try:
        wait_until_ready(url, server)
        files_before = open_files(server.pid)
        seen, metrics = asyncio.run(load(url, arguments.robots, 60 * arguments.minutes, server.pid))
        time.sleep(1.0)
        files = (files_before, open_files(server.pid))
        server.send_signal(signal.SIGTERM)
        exit_code = server.wait(timeout=60)
    finally:
        server.kill()
        server.wait(timeout=20)
    waits = mean_waits(metrics)
    result = {
        "command": " ".join(["scripts/soak", *sys.argv[1:]]), "robots": arguments.robots, "minutes": arguments.minutes,
        "outcomes": dict(sorted(seen.outcomes.items())), "streams": seen.streams,
        "streams_without_end": seen.streams_without_end,
        "latest_wins": {"superseding": seen.superseding, "older_cancelled": seen.superseded_cancelled,
                        "older_finished_before": seen.superseded_finished_first, "older_won": seen.superseded_won,
                        "received_in_the_other_order": seen.superseded_swapped},
        "mean_queue_s": waits, "cycle_s": spread(seen.cycle_s), "first_row_s": spread(seen.first_row_s),
        "healthz_s": spread(seen.health_s), "memory_mb": seen.memory_mb,
        "growth_after_warm_up_mb": round(growth_mb(seen.memory_mb), 1), "open_files": files,
        "exit_code_on_sigterm": exit_code, "problems": judge(seen, waits, exit_code, files), **machine(),
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if key != "memory_mb"}
    print(json.dumps(shown, indent=1))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
