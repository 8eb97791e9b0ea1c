"""Whose turn it is when the engine runs one request at a time: measured by order, never by time."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from server_fakes import GOOD, Answer, Caller, FakeEngine, run, serving, until, with_settings, write_models

from vlm2vla_server.admission import Admission, Priority, Ticket, priority_of
from vlm2vla_server.app import create_app
from vlm2vla_server.engines.base import Delta, GenerationRequest
from vlm2vla_server.errors import Overloaded
from vlm2vla_server.metrics import Metrics


@dataclass
class GatedEngine(FakeEngine):
    """Runs one request at a time, and nothing while the gate is shut."""

    slots: int = 1
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    begun: list[str] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        self.begun.append(_stage(request.prompt))
        await self.gate.wait()
        async for delta in super().generate(request):
            yield delta


def _stage(prompt: str) -> str:
    """Which endpoint asked: the stage, and the subtask or question that the test put in."""
    found = re.search(r"robot-[a-z0-9-]+", prompt)
    starts = {"Given the image": "plan", "You are programming": "rows", "You are a precision": "verify"}
    stage = next((name for start, name in starts.items() if prompt.startswith(start)), "ask")
    return f"{stage} {found[0]}" if found else stage


class Queue:
    """Requests sent one after another, each waiting in the server's queue before the next is sent."""

    def __init__(self, caller: Caller, engine: GatedEngine) -> None:
        self.caller, self.engine = caller, engine
        self.tasks: dict[str, asyncio.Task[Answer]] = {}

    async def hold(self) -> None:
        """Shut the gate and let one request take the engine."""
        self.engine.gate.clear()
        self.engine.begun.clear()
        self._post("/vqa", "robot-holder")
        await until(lambda: self.engine.begun == ["ask robot-holder"])

    async def add(self, path: str, name: str, episode: str | None = None, queued: int | None = None) -> None:
        """Send a request; wait until `queued` wait in all (default: one more than before)."""
        expected = await self.waiting() + 1 if queued is None else queued
        self._post(path, name, episode)
        async with asyncio.timeout(5):
            while await self.waiting() != expected:
                await asyncio.sleep(0.002)

    def _post(self, path: str, name: str, episode: str | None = None) -> None:
        field = "question" if path == "/vqa" else "subtask"
        body: dict[str, Any] = {**GOOD[path], field: name, "episode_id": episode or name}
        self.tasks[name] = asyncio.create_task(self.caller.post(path, body))

    async def waiting(self) -> int:
        text = (await self.caller.get("/metrics")).body.decode()
        found = re.search(r"^vlm2vla_queued (\d+)", text, re.MULTILINE)
        assert found
        return int(found[1])

    async def release(self) -> list[str]:
        """Open the gate; the order in which generations began, without the holder's."""
        self.engine.gate.set()
        await asyncio.gather(*self.tasks.values())
        return self.engine.begun[1:]


async def opened(tmp_path: Path, work: Any, slots: int = 1, **settings: Any) -> None:
    engine = GatedEngine(slots=slots)
    engine.gate.set()
    app = create_app(with_settings(write_models(tmp_path), **settings), engine)
    async with serving(app) as caller:
        await work(Queue(caller, engine), engine)


def test_acting_goes_before_verifying_before_asking(tmp_path: Path) -> None:
    async def work(queue: Queue, engine: GatedEngine) -> None:
        await queue.hold()
        for path, name in (
            ("/vqa", "robot-a"),
            ("/verify", "robot-b"),
            ("/cycle", "robot-c"),
            ("/verify", "robot-d"),
            ("/actions", "robot-e"),
        ):
            await queue.add(path, name)
        assert await queue.release() == [
            "plan robot-c",
            "rows robot-c",
            "rows robot-e",
            "verify robot-b",
            "verify robot-d",
            "ask robot-a",
        ]
        assert {answer.result().status for answer in queue.tasks.values()} == {200}

    run(opened(tmp_path, work))


def test_an_engine_that_runs_several_at_once_gets_the_rest_by_priority(tmp_path: Path) -> None:
    async def work(queue: Queue, engine: GatedEngine) -> None:
        await queue.hold()
        queue._post("/vqa", "robot-holder-too")
        await until(lambda: len(engine.begun) == 2)
        for path, name in (("/vqa", "robot-a"), ("/verify", "robot-b"), ("/actions", "robot-c")):
            await queue.add(path, name)
        # nothing waits in the engine, and a full server makes room for a robot that wants to act
        assert engine.begun == ["ask robot-holder", "ask robot-holder-too"]
        await queue.add("/cycle", "robot-d", queued=3)
        assert (await queue.tasks.pop("robot-a")).status == 503
        engine.gate.set()  # for those who wait at it now: the next two find it shut again
        engine.gate.clear()
        await until(lambda: len(engine.begun) == 4)
        assert sorted(engine.begun[2:]) == ["plan robot-d", "rows robot-c"]
        await queue.release()
        assert "verify robot-b" in engine.begun[4:]

    run(opened(tmp_path, work, slots=2, max_concurrency=5))


def test_no_robot_waits_behind_many_requests_of_another(tmp_path: Path) -> None:
    async def work(queue: Queue, engine: GatedEngine) -> None:
        await queue.hold()
        for number in range(3):
            await queue.add("/verify", f"robot-greedy-{number}", "greedy")
        await queue.add("/verify", "robot-modest", "modest")
        order = await queue.release()
        assert order[:2] == ["verify robot-greedy-0", "verify robot-modest"] and len(order) == 4

    run(opened(tmp_path, work))


def test_a_full_queue_refuses_and_says_when_to_come_back(tmp_path: Path) -> None:
    async def work(queue: Queue, engine: GatedEngine) -> None:
        await queue.hold()
        await queue.add("/vqa", "robot-a")
        await queue.add("/verify", "robot-b")
        for path in ("/vqa",):
            answer = await queue.caller.post(path, GOOD[path])
            assert (answer.status, answer.code) == (503, "overloaded")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        # a robot that wants to act takes the place of one that only asks
        await queue.add("/cycle", "robot-c", queued=2)
        refused = await queue.tasks.pop("robot-a")
        assert (refused.status, refused.code) == (503, "overloaded") and int(refused.headers["retry-after"]) >= 1
        assert await queue.release() == ["plan robot-c", "rows robot-c", "verify robot-b"]

    run(opened(tmp_path, work, max_concurrency=3))


def test_one_that_leaves_the_queue_is_never_run(tmp_path: Path) -> None:
    async def work(queue: Queue, engine: GatedEngine) -> None:
        await queue.hold()
        await queue.add("/actions", "robot-gone")
        await queue.add("/actions", "robot-stays")
        queue.tasks.pop("robot-gone").cancel()
        await asyncio.sleep(0.01)
        assert await queue.waiting() == 1
        assert await queue.release() == ["rows robot-stays"]

    run(opened(tmp_path, work))


def test_a_newer_request_of_an_episode_replaces_the_one_that_waits(tmp_path: Path) -> None:
    async def work(queue: Queue, engine: GatedEngine) -> None:
        await queue.hold()
        await queue.add("/cycle", "robot-old", "e")
        await queue.add("/cycle", "robot-new", "e", queued=1)
        assert (await queue.tasks["robot-old"]).code == "cancelled"
        assert await queue.release() == ["plan robot-new", "rows robot-new"]

    run(opened(tmp_path, work))


def test_the_deadline_holds_in_the_queue_and_waiting_is_reported(tmp_path: Path) -> None:
    async def work(queue: Queue, engine: GatedEngine) -> None:
        await queue.hold()
        late = await queue.caller.post("/vqa", {**GOOD["/vqa"], "deadline_ms": 20})
        assert (late.status, late.code) == (504, "deadline_exceeded")
        await queue.add("/vqa", "robot-a")
        await asyncio.sleep(0.05)
        await queue.release()
        timing = (await queue.tasks["robot-a"]).json()["timing_ms"]
        assert timing["queue"] >= 50 and timing["total"] >= timing["queue"]
        text = (await queue.caller.get("/metrics")).body.decode()
        assert 'vlm2vla_queue_seconds_count{priority="ask"}' in text

    run(opened(tmp_path, work))


def test_an_engine_without_slots_gets_everything_at_once(tmp_path: Path) -> None:
    async def work() -> None:
        engine = GatedEngine(slots=0)
        engine.gate.set()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.gate.clear()
            engine.begun.clear()
            tasks = [asyncio.create_task(caller.post("/vqa", GOOD["/vqa"])) for _ in range(3)]
            await until(lambda: len(engine.begun) == 3)
            engine.gate.set()
            assert [(await task).status for task in tasks] == [200] * 3

    run(work())


def test_paths_that_are_not_named_come_last() -> None:
    assert priority_of("/v1/chat/completions") is priority_of("/vqa") is Priority.ASK
    assert priority_of("/cycle") is priority_of("/actions") is Priority.ACT


@pytest.mark.parametrize("seed", range(5))
def test_slots_are_never_exceeded_and_never_lost(seed: int) -> None:
    """Requests come, finish, are cancelled at random moments; afterwards everything is free again."""
    chance = random.Random(seed)

    async def work() -> None:
        admission = Admission(12, Metrics())
        admission.set_slots(2)
        running = most = refused = 0

        async def one(ticket: Ticket) -> None:
            nonlocal running, most, refused
            try:
                async with admission.generating(ticket):
                    running += 1
                    most = max(most, running)
                    try:
                        await asyncio.sleep(chance.random() * 0.002)
                    finally:
                        running -= 1
            except Overloaded:
                refused += 1

        tasks = []
        for _ in range(200):
            ticket = Ticket(0.0, priority=chance.choice(list(Priority)), robot=chance.choice("abc"))
            tasks.append(asyncio.create_task(one(ticket)))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.002)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 2 and refused > 0 and running == 0
        for _ in range(2):
            async with asyncio.timeout(1), admission.generating(Ticket(0.0)), admission.generating(Ticket(0.0)):
                pass

    run(work())
