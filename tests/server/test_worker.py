"""The engine's thread: what it runs, and what happens when it dies."""

from __future__ import annotations

import asyncio
import time

import pytest
from server_fakes import kill_thread, run

from vlm2vla_server.engines.base import GenerationError
from vlm2vla_server.engines.worker import Outlet, Worker


def counting(outlet: Outlet[int]) -> None:
    number = 0
    while not outlet.aborted:
        outlet.put(number)
        number += 1
        time.sleep(0.002)


def test_a_killed_thread_ends_every_stream_and_is_reported() -> None:
    async def work() -> None:
        worker = Worker("doomed")
        worker.start()
        dead = asyncio.create_task(worker.wait_dead())
        stream = worker.stream(counting)
        assert await anext(stream) == 0
        waiting = asyncio.create_task(worker.call(lambda: 1))
        while worker.waiting == 0:
            await asyncio.sleep(0.002)
        assert not dead.done()
        kill_thread("doomed")
        with pytest.raises(GenerationError, match="died"):
            while True:
                await anext(stream)
        with pytest.raises(GenerationError, match="died"):
            await waiting
        assert "SystemExit" in await asyncio.wait_for(dead, 5)
        assert (worker.running, worker.waiting) == (0, 0)
        with pytest.raises(GenerationError, match="died"):
            await worker.call(lambda: 1)
        worker.close()

    run(work())


def test_a_fatal_error_kills_and_an_ordinary_one_does_not() -> None:
    def lost() -> int:
        raise RuntimeError("the device is lost")

    def ordinary() -> int:
        raise ValueError("this once")

    async def work() -> None:
        worker = Worker("careful", fatal=lambda problem: "lost" in str(problem))
        worker.start()
        with pytest.raises(ValueError, match="this once"):
            await worker.call(ordinary)
        assert await worker.call(lambda: 5) == 5
        with pytest.raises(GenerationError, match="died"):
            await worker.call(lost)
        assert "RuntimeError" in await asyncio.wait_for(worker.wait_dead(), 5)
        worker.close()

    run(work())


def test_a_closed_worker_is_not_a_dead_one() -> None:
    async def work() -> None:
        worker = Worker("closing")
        worker.start()
        assert await worker.call(lambda: 5) == 5
        dead = asyncio.create_task(worker.wait_dead())
        worker.close()
        await asyncio.sleep(0.05)
        assert not dead.done()
        dead.cancel()
        await asyncio.gather(dead, return_exceptions=True)
        with pytest.raises(GenerationError, match="shutting down"):
            await worker.call(lambda: 5)

    run(work())
