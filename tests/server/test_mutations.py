"""Two thousand broken requests, in process: none may cause a 500 or an answer that the protocol does not describe."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from request_mutations import mutate, problem
from server_fakes import FakeEngine, image_bytes, run, serving, with_settings, write_models

from vlm2vla_server.app import create_app

CASES = 2000


def test_mutated_requests_get_documented_answers(tmp_path: Path) -> None:
    async def work() -> None:
        statuses: Counter[int] = Counter()
        settings = with_settings(write_models(tmp_path), max_body_mb=1)
        async with serving(create_app(settings, FakeEngine())) as caller:
            image = image_bytes()
            for seed in range(CASES):
                request = mutate(seed, image, huge_bytes=1_100_000)
                headers = [(k, v) for k, v in request.headers.items()]
                async with asyncio.timeout(20):
                    answer = await caller.send(request.method, request.path, request.body, headers)
                statuses[answer.status] += 1
                if answer.status != 200:
                    wrong = problem(answer.status, answer.headers.get("content-type", ""), answer.body)
                    assert wrong is None, (seed, request.kinds, wrong, answer.body[:300])
        assert sum(statuses.values()) == CASES and statuses[500] == 0
        assert {200, 400, 404, 405, 413, 415, 422} <= set(statuses)

    run(work(), limit_s=150)
