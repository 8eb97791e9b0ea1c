"""Requests made from the OpenAPI document (by schemathesis), against a listening server with a scripted engine: no 500,
and no status, content type or body that the document does not describe."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from live_server import free_port
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_fakes import GOOD, IMAGE, FakeEngine, run, serving, with_settings, write_models

from vlm2vla_schema.arrays import to_json
from vlm2vla_server.app import create_app

CHECKS: list[Any] = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EXAMPLES = 25
"""Per operation and way of making requests; three ways."""
GENERATING = [*sorted(GOOD), "/act", "/v1/chat/completions"]
PLAIN = ["/healthz", "/readyz", "/info", "/metrics", "/v1/models"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    app = create_app(write_models(tmp_path_factory.mktemp("models")), FakeEngine())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    made = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(made + "/readyz", timeout=5).status_code == 200:
                break
        except httpx.HTTPError:
            pass
        threading.Event().wait(0.05)
    yield made
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def document(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def served_well(case: Any) -> Any:
    """The same request with real pictures and a model that exists, so that it gets past the first doors."""
    body = case.body
    if isinstance(body, dict):
        body.pop("model", None)
        for field in ("image", "before", "after"):
            if field in body:
                body[field] = IMAGE
        if body.get("images"):
            body["images"] = [IMAGE]
            body.pop("image", None)
        if case.path == "/act":
            body.pop("encoded", None)
            body |= {"image": to_json(np.zeros((8, 8, 3), np.uint8)), "instruction": body.get("instruction") or "go"}
        for message in body.get("messages", []):
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image_url":
                    part["image_url"]["url"] = f"data:image/jpeg;base64,{IMAGE}"
    return case


def exercise(strategy: Any, statuses: Counter[int]) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def ask(case: Any) -> None:
        answer = case.call(timeout=20)
        statuses[answer.status_code] += 1
        assert answer.status_code != 500, answer.content
        case.validate_response(answer, checks=CHECKS)

    ask()


@pytest.mark.parametrize("path", GENERATING)
def test_no_answer_to_a_generating_request_is_undocumented(document: Any, path: str) -> None:
    operation = document[path]["POST"]
    fitting = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
    statuses: Counter[int] = Counter()
    exercise(fitting.map(served_well), statuses)
    assert statuses[200] > 0, statuses
    exercise(fitting, statuses)
    exercise(operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE), statuses)
    assert sum(n for status, n in statuses.items() if status >= 400) > 0, statuses


@pytest.mark.parametrize("path", PLAIN)
def test_no_answer_of_a_plain_path_is_undocumented(document: Any, path: str) -> None:
    statuses: Counter[int] = Counter()
    exercise(document[path]["GET"].as_strategy(), statuses)
    assert set(statuses) == {200}


@pytest.mark.parametrize("path", [*GENERATING, *PLAIN])
def test_a_missing_key_is_a_documented_answer(document: Any, tmp_path: Path, path: str) -> None:
    method = "POST" if path in GENERATING else "GET"

    async def work() -> None:
        app = create_app(with_settings(write_models(tmp_path), api_key="k"), FakeEngine())
        async with serving(app) as caller:
            answer = await caller.send(method, path)
            expected = 200 if path in ("/healthz", "/readyz") else 401
            assert (
                answer.status == expected
                and str(expected) in document.raw_schema["paths"][path][method.lower()]["responses"]
            )

    run(work())
