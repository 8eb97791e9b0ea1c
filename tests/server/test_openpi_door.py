"""Our server through openpi's own client, and what the websocket must refuse."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
import uvicorn
import websockets.exceptions
import websockets.sync.client
from live_server import free_port
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from server_fakes import PLAN_TEXT, ROWS, SUBTASKS_TEXT, FakeEngine, with_settings, write_models

from vlm2vla_server.app import create_app
from vlm2vla_server.openpi import MAX_MESSAGE_BYTES, read_observation
from vlm2vla_server.serving import http_config

IMAGE = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
OBSERVATION: dict[str, Any] = {
    "observation/image": IMAGE,
    "observation/wrist_image": IMAGE,
    "observation/state": np.zeros(8),
    "prompt": "pick up the carrot",
}
KEY = "secret"


@dataclass
class Served:
    """A listening server and its engine."""

    port: int
    engine: FakeEngine

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    def client(self) -> Any:
        return WebsocketClientPolicy("127.0.0.1", self.port, api_key=KEY)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port, engine = free_port(), FakeEngine()
    app = create_app(with_settings(write_models(tmp_path_factory.mktemp("models")), api_key=KEY), engine)
    server = uvicorn.Server(http_config(app, "127.0.0.1", port))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    ready = f"http://127.0.0.1:{port}/readyz"
    for _ in range(600):
        try:
            if httpx.get(ready, timeout=5).status_code == 200:
                break
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    yield Served(port, engine)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_openpi_s_own_client_gets_metadata_and_whole_chunks(served: Served) -> None:
    client = served.client()
    metadata = client.get_server_metadata()
    assert (metadata["protocol"], metadata["model"], metadata["policy"]) == (1, "twin", True)
    before = len(served.engine.requests)
    for _ in range(2):
        answer = client.infer(OBSERVATION)
        assert answer["actions"].tolist() == [[*row[:3], 0.0, 0.0, 0.0, row[3]] for row in ROWS]
        assert (answer["subtask"], answer["motion_plan"]) == ("Move to Carrot", PLAN_TEXT)
        assert answer["server_timing"]["infer_ms"] > 0
    assert len(served.engine.requests) == before + 6


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prompt": None}, "invalid_request"),
        ({"prompt": ""}, "invalid_request"),
        ({"prompt": "a <end_of_turn> b"}, "invalid_request"),
        ({"observation/image": IMAGE[..., 0]}, "invalid_image"),
        ({"observation/image": IMAGE.astype(np.float32)}, "invalid_image"),
        ({"observation/image": "x"}, "invalid_image"),
    ],
)
def test_openpi_s_own_client_is_told_what_is_wrong(served: Served, changes: dict[str, Any], code: str) -> None:
    client = served.client()
    with pytest.raises(RuntimeError, match=code):
        client.infer({**OBSERVATION, **changes})
    with pytest.raises(websockets.exceptions.ConnectionClosed):
        client.infer(OBSERVATION)


def test_model_text_that_does_not_parse_is_an_error_and_the_next_connection_works(served: Served) -> None:
    served.engine.texts += [SUBTASKS_TEXT, "Move.", *["[[9, 9, 9, 9]]"] * 3]
    with pytest.raises(RuntimeError, match="unparseable_output"):
        served.client().infer(OBSERVATION)
    assert len(served.client().infer(OBSERVATION)["actions"]) == len(ROWS)


def test_who_leaves_frees_the_engine(served: Served) -> None:
    served.engine.token_s = 0.2
    try:
        key = {"Authorization": f"Bearer {KEY}"}
        with websockets.sync.client.connect(served.url, additional_headers=key) as socket:
            socket.recv()
            before = served.engine.aborted
            socket.send(msgpack_numpy.packb(OBSERVATION))
            wait_for(lambda: served.engine.running > 0)
        wait_for(lambda: served.engine.aborted == before + 1 and served.engine.running == 0)
    finally:
        served.engine.token_s = 0.0


def wait_for(condition: Any) -> None:
    ends_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("", {}),
        ("", {"Authorization": "Api-Key other"}),
        ("", {"Authorization": f"Api-Key {KEY}", "Origin": "http://somewhere"}),
        ("other", {"Authorization": f"Api-Key {KEY}"}),
    ],
)
def test_the_door_stays_shut(served: Served, path: str, headers: dict[str, str]) -> None:
    refused = pytest.raises(websockets.exceptions.InvalidStatus, match="403")
    with refused, websockets.sync.client.connect(served.url + path, additional_headers=headers):
        pass


def test_openpi_s_scheme_opens_only_the_websocket(served: Served) -> None:
    url = f"http://127.0.0.1:{served.port}/info"
    assert httpx.get(url, headers={"Authorization": f"Api-Key {KEY}"}).status_code == 401
    assert httpx.get(url, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_message_that_is_too_large_closes_the_connection(served: Served) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    with websockets.sync.client.connect(served.url, additional_headers=key) as socket:
        socket.recv()
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.send(b"\0" * (MAX_MESSAGE_BYTES + 1))
            socket.recv(timeout=10)
        # The server does not read on, so the kernel may drop its last word with what it had not read.
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"",
        b"\xc1",
        msgpack.packb(3),
        msgpack.packb({"prompt": "a"}),
        msgpack.packb({str(number): 1 for number in range(65)}),
        b"\x91" * 2000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc7\xff\x01",
        msgpack.packb({1: 2}),
        msgpack.packb({"prompt": "a", "image": {b"data": b"", b"dtype": "|u1", b"shape": [0, 0, 3]}}),
        msgpack.packb({"prompt": "a", "image": {b"data": b"\0" * 12, b"dtype": "|u1", b"shape": [2**40, 2**40, 3]}}),
    ],
)
def test_broken_messages_are_refused(data: bytes | None) -> None:
    from vlm2vla_server.errors import InvalidImage, InvalidRequest

    with pytest.raises((InvalidRequest, InvalidImage)):
        read_observation(data, 10_000)
