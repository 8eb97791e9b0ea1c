"""The callers of `soak_server.py`: robots, somebody who asks questions, a watch on the server; and what they saw."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from soak import resident_mb

from vlm2vla_schema.images import encode_jpeg, to_base64
from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image

DEADLINE_S = 120.0
SAMPLE_S = 5.0
SUPERSEDE_EVERY = 5
"""Each fifth round of a robot is a cycle and a newer one."""
ACTIONS_EVERY = 3
SUBTASKS = ("Move to the carrot", "Grasp the carrot", "Lift the carrot", "Move the carrot to the plate")
PLAN = "Move forward and slightly left, then down."
IMAGES = [to_base64(encode_jpeg(probe_image(index, 480))) for index in range(len(PROBE_PROMPTS))]
NDJSON = {"accept": "application/x-ndjson"}
ENDS = ("done", "error")
KINDS = ("act", "verify", "ask")
"""What requests are for, first served first."""

# 502 is the model's own failure to say something acceptable: counted, and not the server's fault. Questions wait while
# robots keep the engine busy, here without a pause, so their deadline may pass.
HONEST = {"done", "unparseable_output"}
HONEST_OF_QUESTIONS = HONEST | {"deadline_exceeded"}


@dataclass
class Seen:
    """What the callers saw.

    outcomes: by path, the code of the answer or `done`. queue_s: by kind, how long each answered request waited for its
    turn, as its `timing_ms` says; a deadline that passed counts as a wait of that long.
    """

    deadline_s: float = DEADLINE_S
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
    queue_s: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    memory_mb: list[tuple[float, float]] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if len(self.problems) < 50:
            self.problems.append(text)

    def waited(self, kind: str, outcome: str, answer: dict[str, Any]) -> None:
        """Note how long a request waited, where its answer tells."""
        if outcome == "done":
            self.queue_s[kind].append(answer["timing_ms"]["queue"] / 1000)
        elif outcome == "deadline_exceeded":
            self.queue_s[kind].append(self.deadline_s)


@dataclass(frozen=True)
class Ended:
    outcome: str
    at_s: float


async def act(client: httpx.AsyncClient, seen: Seen, path: str, body: dict[str, Any]) -> Ended:
    """A streamed /cycle or /actions, read to its end."""
    began_s = time.monotonic()
    async with client.stream("POST", path, json={**body, **_deadline(seen)}, headers=NDJSON) as answer:
        if answer.status_code != 200:
            outcome = json.loads(await answer.aread())["error"]["code"]
            if (outcome == "cancelled") != (answer.status_code == 499):
                seen.problem(f"{path}: {outcome} with status {answer.status_code}")
        else:
            outcome = await _events(answer, seen, began_s)
    seen.outcomes[f"{path} {outcome}"] += 1
    if outcome == "done" and path == "/cycle":
        seen.cycle_s.append(time.monotonic() - began_s)
    return Ended(outcome, time.monotonic())


async def _events(answer: httpx.Response, seen: Seen, began_s: float) -> str:
    """Read a stream to its end and check that it has exactly one. Returns `done`, an error's code, or `nothing`."""
    outcome, events = "nothing", []
    seen.streams += 1
    async for line in answer.aiter_lines():
        event = json.loads(line)
        events.append(event["event"])
        if event["event"] == "row" and event["index"] == 0:
            seen.first_row_s.append(time.monotonic() - began_s)
        if event["event"] in ENDS:
            outcome = "done" if event["event"] == "done" else event["error"]["code"]
            seen.waited("act", outcome, event)
    if sum(name in ENDS for name in events) != 1 or events[-1] not in ENDS:
        seen.streams_without_end += 1
    return outcome


def _deadline(seen: Seen) -> dict[str, int]:
    return {"deadline_ms": round(1000 * seen.deadline_s)}


def _scene(chance: random.Random, episode: str) -> dict[str, Any]:
    return {"image": chance.choice(IMAGES), "subtask": chance.choice(SUBTASKS), "episode_id": episode}


async def superseded_cycle(client: httpx.AsyncClient, seen: Seen, episode: str, chance: random.Random) -> None:
    """An older cycle and, a moment later, a newer one of the same episode. They travel on two connections: on a starved
    machine the older may be received last, and is then the newer one for the server."""
    seen.superseding += 1
    older = asyncio.create_task(act(client, seen, "/cycle", _scene(chance, episode)))
    await asyncio.sleep(0.1 + chance.random() * 0.5)
    if older.done():
        seen.superseded_finished_first += 1
        return
    newer = await act(client, seen, "/cycle", _scene(chance, episode))
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


async def post(client: httpx.AsyncClient, seen: Seen, kind: str, path: str, body: dict[str, Any]) -> None:
    """A whole answer of /verify or /vqa."""
    answer = await client.post(path, json={**body, **_deadline(seen)})
    found = answer.json()
    outcome = "done" if answer.status_code == 200 else found["error"]["code"]
    seen.outcomes[f"{path} {outcome}"] += 1
    seen.waited(kind, outcome, found)
    if outcome not in (HONEST_OF_QUESTIONS if kind == "ask" else HONEST):
        seen.problem(f"{path}: {outcome}")


async def robot(client: httpx.AsyncClient, seen: Seen, number: int, until_s: float, least: int) -> None:
    """Act, then verify, again and again under an episode of its own."""
    chance, episode, count = random.Random(number), f"robot-{number}", 0
    while time.monotonic() < until_s or count < least:
        count += 1
        if count % SUPERSEDE_EVERY == 0:
            await superseded_cycle(client, seen, episode, chance)
        else:
            path, more = ("/actions", {"motion_plan": PLAN}) if count % ACTIONS_EVERY == 0 else ("/cycle", {})
            ended = await act(client, seen, path, {**_scene(chance, episode), **more})
            if ended.outcome not in HONEST:
                seen.problem(f"{path} of {episode}: {ended.outcome}")
        before, after = chance.sample(IMAGES, 2)
        verify = {"before": before, "after": after, "subtask": SUBTASKS[0], "next_subtask": SUBTASKS[1]}
        await post(client, seen, "verify", "/verify", {**verify, "episode_id": episode})


async def asker(client: httpx.AsyncClient, seen: Seen, until_s: float) -> None:
    """Ask questions, which must wait behind the robots."""
    chance = random.Random(1)
    while time.monotonic() < until_s:
        body = {"image": chance.choice(IMAGES), "question": "What is on the counter?", "max_tokens": 40}
        await post(client, seen, "ask", "/vqa", body)
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


async def load(
    url: str, robots: int, seconds: float, pid: int, least: int = 0, deadline_s: float = DEADLINE_S
) -> tuple[Seen, str]:
    """Run the robots for some seconds and at least `least` rounds each. Returns what was seen, and /metrics."""
    seen = Seen(deadline_s)
    until_s = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=4 * robots + 8)
    timeout_s = deadline_s + 30
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
