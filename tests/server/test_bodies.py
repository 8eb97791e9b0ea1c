"""Where a body is parsed: an ordinary one on the event loop, what could hold it up on a thread."""

from __future__ import annotations

import json
import threading

import pytest
from pydantic import BaseModel, field_validator
from server_fakes import run
from starlette.datastructures import Headers

from vlm2vla_server.bodies import MAX_JSON_ELEMENTS, QUICK_BYTES, QUICK_ELEMENTS, parse_body
from vlm2vla_server.errors import InvalidRequest

JSON = Headers({"content-type": "application/json"})


class Parsed(BaseModel):
    """Remembers which thread validated it."""

    image: str
    numbers: list[int] = []

    @field_validator("image")
    @classmethod
    def here(cls, image: str) -> str:
        """The thread's number in front of the text."""
        return f"{threading.get_ident()} {image}"


def on_the_loop(value: dict[str, object]) -> bool:
    async def work() -> bool:
        parsed = await parse_body(JSON, json.dumps(value).encode(), Parsed)
        return parsed.image.split()[0] == str(threading.get_ident())

    return run(work())


def test_two_camera_frames_are_parsed_without_a_thread() -> None:
    assert on_the_loop({"image": "A" * (QUICK_BYTES - 1000), "numbers": [1] * (QUICK_ELEMENTS - 10)})


@pytest.mark.parametrize(
    "value",
    [{"image": "A" * QUICK_BYTES}, {"image": "A", "numbers": [1] * (QUICK_ELEMENTS + 1)}],
    ids=["many bytes", "many elements"],
)
def test_what_could_hold_up_the_loop_goes_to_a_thread(value: dict[str, object]) -> None:
    assert not on_the_loop(value)


def test_more_elements_than_any_request_has_are_refused_unread() -> None:
    body = json.dumps({"image": "A", "numbers": [1] * MAX_JSON_ELEMENTS}).encode()
    with pytest.raises(InvalidRequest, match="more than"):
        run(parse_body(JSON, body, Parsed))
