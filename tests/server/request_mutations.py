"""Requests that are wrong in one or several ways, from a seed; used by the tests and by bench/fuzz_requests.py.

Every answer to one of them must be a documented status with a documented body.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

DOCUMENTED: dict[int, frozenset[str]] = {
    400: frozenset({"invalid_image"}),
    401: frozenset({"unauthorized"}),
    404: frozenset({"not_found", "unknown_model"}),
    405: frozenset({"method_not_allowed"}),
    413: frozenset({"payload_too_large"}),
    415: frozenset({"unsupported_media_type"}),
    422: frozenset({"invalid_request"}),
    499: frozenset({"cancelled"}),
    502: frozenset({"unparseable_output"}),
    503: frozenset({"overloaded", "not_ready"}),
    504: frozenset({"deadline_exceeded"}),
}
"""Status -> codes that may come with it. 500 is documented too, but nothing a caller sends may cause it."""

GENERATING = ("/subtasks", "/motion_plan", "/actions", "/cycle", "/verify", "/vqa")


@dataclass
class Mutated:
    """One request. `kinds` names what was done to it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    kinds: list[str] = field(default_factory=list)


def base_request(path: str, image: bytes, rng: random.Random) -> dict[str, Any]:
    """A request that would be answered, short so that it costs little."""
    text = base64.b64encode(image).decode()
    known: dict[str, dict[str, Any]] = {
        "/subtasks": {"image": text, "task": "pick up the carrot"},
        "/motion_plan": {"image": text, "subtask": "Move to Carrot"},
        "/actions": {"image": text, "subtask": "Move to Carrot", "motion_plan": "Move forward."},
        "/cycle": {"image": text, "subtask": "Move to Carrot"},
        "/verify": {"before": text, "after": text, "subtask": "Grasp Carrot", "next_subtask": None},
        "/vqa": {"image": text, "question": "What is it?"},
    }
    return {**known[path], "max_tokens": 3, "max_attempts": 1, "deadline_ms": 20000, "seed": rng.randrange(1000)}


VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63,
    2**200,
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "0.5",
    "null",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    float("nan"),
    float("inf"),
    float("-inf"),
    "\x00",
    "\ud800",
    "é" * 3000,
    "<end_of_turn>",
    "<start_of_image>",
    "{subtask}",
    "../../etc/passwd",
    "http://localhost/x.jpg",
    "data:,x",
    "data:image/png;base64,AAAA",
    "AAAA",
    "a" * 100_000,
    [1] * 50,
    ["x"] * 9,
    10**400,
)


def _fields(rng: random.Random, body: dict[str, Any]) -> str:
    for _ in range(rng.randint(1, 3)):
        choice = rng.randrange(4)
        name = rng.choice(list(body) or ["image"])
        if choice == 0:
            body.pop(name, None)
        elif choice == 1:
            body[name] = rng.choice(VALUES)
        elif choice == 2:
            body[rng.choice(["top_k", "Image", "__proto__", "", "x" * 500, "temperature", "images", "episode_id"])] = (
                rng.choice(VALUES)
            )
        else:
            body[
                rng.choice(["temperature", "top_p", "max_attempts", "deadline_ms", "model", "scenario", "constrained"])
            ] = rng.choice(VALUES)
    return "fields"


def _decoded(text: str) -> bytes:
    """The bytes of a field that may have been spoilt already."""
    try:
        return base64.b64decode(text) or b"x"
    except ValueError:
        return b"spoilt"


def _image(rng: random.Random, body: dict[str, Any]) -> str:
    for name in ("image", "before", "after"):
        if isinstance(body.get(name), str):
            raw = bytearray(_decoded(body[name]))
            choice = rng.randrange(5)
            if choice == 0:
                del raw[rng.randrange(len(raw)) :]
            elif choice == 1:
                for _ in range(rng.randint(1, 60)):
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
            elif choice == 2:
                raw = bytearray(rng.randbytes(rng.randrange(2000)))
            elif choice == 3:
                raw = bytearray(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + rng.randbytes(40))
            else:
                raw += rng.randbytes(100)
            body[name] = base64.b64encode(bytes(raw)).decode()
    return "image"


def _nesting(rng: random.Random) -> bytes:
    depth = rng.choice([50, 300, 2000, 100_000])
    opener = rng.choice([b"[", b'{"a":', b'{"question":['])
    return opener * depth + rng.choice([b"", b"1" + b"]" * depth])


def _syntax(rng: random.Random, raw: bytes) -> bytes:
    choice = rng.randrange(6)
    if choice == 0:
        return raw[: rng.randrange(len(raw))]
    if choice == 1:
        return raw + rng.choice([b"x", b"{}", b"\x00", b","])
    if choice == 2:
        return rng.randbytes(rng.randrange(3000))
    if choice == 3:
        return raw.replace(b":", b"=", 1)
    if choice == 4:
        return b"\xef\xbb\xbf" + raw
    return rng.choice([b"", b"null", b"[]", b"1", b'"x"', b"NaN", b"[" + b"1," * 200_000 + b"1]"])


def _multipart(rng: random.Random, body: dict[str, Any]) -> tuple[bytes, str]:
    boundary = "b" + str(rng.randrange(10**6))
    out = b""
    for name, value in body.items():
        head = f'Content-Disposition: form-data; name="{name}"'.encode("utf-8", "replace")
        if name in ("image", "before", "after") and isinstance(value, str) and rng.random() < 0.7:
            head += b'; filename="f.jpg"'
            payload = _decoded(value) if rng.random() < 0.8 else rng.randbytes(300)
        else:
            payload = str(value).encode("utf-8", "replace")
        if rng.random() < 0.1:
            head = rng.choice(
                [b"", b"Content-Disposition: x", b"X: y", head + b"\r\n" + b"A: " + b"z" * 5000, rng.randbytes(30)]
            )
        out += b"--" + boundary.encode() + b"\r\n" + head + b"\r\n\r\n" + payload + b"\r\n"
    out += b"--" + boundary.encode() + b"--\r\n"
    if rng.random() < 0.2:
        out = out[: rng.randrange(len(out))]
    shown = rng.choice([boundary, boundary, boundary, "other", "", "x" * 300])
    return out, f"multipart/form-data; boundary={shown}" if rng.random() < 0.9 else "multipart/form-data"


def _headers(rng: random.Random, headers: dict[str, str]) -> str:
    headers[rng.choice(["content-type", "accept", "content-encoding", "authorization", "x-junk"])] = rng.choice(
        [
            "",
            "text/plain",
            "application/json; charset=latin-1",
            "application/x-ndjson",
            "gzip",
            "*/*",
            "Bearer x",
            "\u00e9",
            "a" * 3000,
        ]
    )
    return "headers"


def mutate(seed: int, image: bytes, huge_bytes: int) -> Mutated:
    """The request of a seed. huge_bytes: size of an oversized body, some over the server's limit."""
    rng = random.Random(seed)
    path = rng.choice(GENERATING)
    body = base_request(path, image, rng)
    headers = {"content-type": "application/json"}
    request = Mutated("POST", path, headers, b"")
    kind = rng.choices(
        ["fields", "image", "nesting", "syntax", "multipart", "route", "huge", "headers", "both"],
        [30, 20, 6, 12, 14, 4, 1, 5, 8],
    )[0]
    request.kinds.append(kind)
    editors: dict[str, Callable[[random.Random, dict[str, Any]], str]] = {"fields": _fields, "image": _image}
    for name, edit in editors.items():
        if kind in (name, "both"):
            edit(rng, body)
    if kind == "multipart":
        if rng.random() < 0.5:
            _fields(rng, body)
        request.body, headers["content-type"] = _multipart(rng, body)
    elif kind == "nesting":
        request.body = _nesting(rng)
    elif kind == "huge":
        request.body = b'{"question":"' + b"x" * huge_bytes + b'"}'
    else:
        request.body = json.dumps(body).encode("utf-8", "surrogatepass")
    if kind == "syntax":
        request.body = _syntax(rng, request.body)
    if kind == "headers":
        _headers(rng, headers)
    if kind == "route":
        request.method = rng.choice(["GET", "PUT", "DELETE", "POST", "OPTIONS"])
        request.path = rng.choice(
            [
                *GENERATING,
                "/healthz",
                "/readyz",
                "/info",
                "/metrics",
                "/nope",
                "/%00",
                "/vqa/",
                "//vqa",
                "/" + "a" * 2000,
            ]
        )
    if rng.random() < 0.25:
        headers.setdefault("accept", "application/x-ndjson")
    return request


def problem(status: int, content_type: str, body: bytes) -> str | None:
    """Why an answer is not one that docs/protocol.md describes; None when it is."""
    if status == 200:
        return None
    if status not in DOCUMENTED:
        return f"status {status} is not documented for a caller's mistake"
    if not content_type.startswith("application/json"):
        return f"status {status} came as {content_type}"
    try:
        error = json.loads(body)["error"]
        code = str(error["code"])
    except (ValueError, KeyError, TypeError):
        return f"status {status} came without the error body"
    if set(error) != {"code", "message", "details", "request_id"}:
        return f"the error body has fields {sorted(error)}"
    return None if code in DOCUMENTED[status] else f"status {status} came with code {code}"
