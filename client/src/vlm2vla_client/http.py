"""The client's one way to talk HTTP to a server: deadlines on everything, errors typed by their wire code.

A response is read chunk by chunk, so that a server that trickles or stalls is noticed at the deadline and a body can
never grow without bound. Redirects are not followed and proxy variables are not read: the server is on the lab's own
network.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from vlm2vla_client.errors import (
    AnswerCancelledError,
    AnswerUnusableError,
    EngineFailedError,
    PolicyError,
    ProtocolMismatchError,
    RequestRefusedError,
    ServerBusyError,
    ServerUnreachableError,
)
from vlm2vla_schema.images import to_base64

CONNECT_TIMEOUT_S = 3.0
GRACE_S = 2.0  # the server answers "deadline_exceeded" itself; this long after, the client stops waiting for it
READY_TIMEOUT_S = 5.0
READY_POLL_S = 0.5
MAX_BODY_BYTES = 4 << 20
MAX_DEADLINE_S = 600.0

_BY_CODE: dict[str, type[PolicyError]] = {
    "invalid_request": RequestRefusedError,
    "invalid_image": RequestRefusedError,
    "payload_too_large": RequestRefusedError,
    "unsupported_media_type": RequestRefusedError,
    "unauthorized": RequestRefusedError,
    "not_found": RequestRefusedError,
    "unknown_model": RequestRefusedError,
    "method_not_allowed": RequestRefusedError,
    "unparseable_output": AnswerUnusableError,
    "deadline_exceeded": AnswerUnusableError,
    "overloaded": ServerBusyError,
    "not_ready": ServerBusyError,
    "engine_failure": EngineFailedError,
    "cancelled": AnswerCancelledError,
}


def _class_by_status(status: int) -> type[PolicyError]:
    """For bodies that are not ours (a proxy's page, an older server)."""
    if status == 499:
        return AnswerCancelledError
    if status == 503:
        return ServerBusyError
    if status in (502, 504):
        return ServerUnreachableError
    return RequestRefusedError if 400 <= status < 500 else EngineFailedError


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else None


def error_from_body(status: int, body: object, headers: Mapping[str, str] | None = None) -> PolicyError:
    """The typed error for an error answer, whether it came as a status or as the last line of a stream."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        kind = _class_by_status(status)
        return kind(f"the server answered HTTP {status} without a readable error", code=f"http_{status}")
    code = str(error.get("code", "unknown"))
    details = error.get("details")
    kind = _BY_CODE.get(code, _class_by_status(status))
    return kind(
        f"{code}: {error.get('message', 'no message')}",
        code=code,
        details=details if isinstance(details, dict) else {"details": details} if details is not None else None,
        request_id=str(error["request_id"]) if error.get("request_id") is not None else None,
        retry_after_s=_retry_after_s(headers or {}),
    )


def _parse(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolMismatchError(f"{what} is not JSON (first bytes {data[:60]!r})", code="bad_json") from None
    if not isinstance(value, dict):
        raise ProtocolMismatchError(f"{what}: expected a JSON object, received {type(value).__name__}", code="bad_json")
    return value


def _json(values: Mapping[str, Any], images: Mapping[str, bytes]) -> bytes:
    """One object of some values and base64 texts. The latter hold nothing to escape and are not searched for it."""
    members = [json.dumps(values, allow_nan=False)[1:-1]]
    members += [f'{json.dumps(name)}: "{to_base64(data)}"' for name, data in images.items()]
    return f"{{{', '.join(members)}}}".encode()


@functools.lru_cache(maxsize=32)
def _url(text: str) -> httpx.URL:
    """A client asks for the same few again and again."""
    return httpx.URL(text)


class ServerConnection:
    """One server, as seen by the policy, the verifier and ``vqa``.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        api_key: sent as a bearer token.
        multipart: send images as file parts instead of base64 inside JSON.
        transport: for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        multipart: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._multipart = multipart
        self._headers = {"Accept": "*/*", "User-Agent": f"vlm2vla-client ({httpx.__title__} {httpx.__version__})"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # httpx's transport without its Client, whose redirects, cookies, hooks and merging of defaults are not wanted
        # here and took a third of a request's time on this side.
        self._transport = transport or httpx.HTTPTransport(trust_env=False)
        self._closed = False

    def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        """GETs a JSON object.

        Raises:
            PolicyError: typed by the wire code, or ServerUnreachableError.
        """
        return self._whole(path, "GET", {}, timeout_s)

    def post(
        self, path: str, fields: Mapping[str, Any], images: Mapping[str, bytes], deadline_s: float
    ) -> dict[str, Any]:
        """POSTs fields and encoded images, returns the JSON object of the answer.

        Args:
            deadline_s: sent as ``deadline_ms``; the client itself waits two seconds longer.

        Raises:
            PolicyError: typed by the wire code, ProtocolMismatchError or ServerUnreachableError.
        """
        return self._whole(path, "POST", self._body(fields, images, deadline_s), deadline_s + GRACE_S)

    def stream(
        self, path: str, fields: Mapping[str, Any], images: Mapping[str, bytes], deadline_s: float
    ) -> Iterator[dict[str, Any]]:
        """POSTs and yields the objects of an NDJSON stream as their lines arrive.

        Raises:
            PolicyError: as ``post``; also when the stream ends inside a line or grows over the size limit.
        """
        body = self._body(fields, images, deadline_s)
        body["headers"] = {**body.get("headers", {}), "Accept": "application/x-ndjson"}
        with self._open(path, "POST", body, deadline_s + GRACE_S) as (response, chunks):
            if "ndjson" not in response.headers.get("content-type", ""):
                raise ProtocolMismatchError(
                    f"{path}: expected application/x-ndjson, received {response.headers.get('content-type')!r}; "
                    "is this a VLM2VLA server?",
                    code="bad_stream",
                )
            rest = b""
            for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield _parse(line, "a line of the stream")
            if rest.strip():
                raise ServerUnreachableError("the connection ended inside a line", code="stream_cut")

    def wait_ready(self, timeout_s: float) -> None:
        """Returns when ``/readyz`` says 200: a server that is still loading its model is worth waiting for.

        Raises:
            PolicyError: nobody answers (at once), or the server is still not ready after ``timeout_s``.
        """
        ends_s = time.monotonic() + timeout_s
        while True:
            try:
                self.get("/readyz", READY_TIMEOUT_S)
                return
            except ServerBusyError:
                if time.monotonic() > ends_s:
                    raise
            time.sleep(READY_POLL_S)

    def healthy(self, timeout_s: float) -> bool:
        """True when ``/healthz`` answers 200 in time. Never raises."""
        try:
            with self._sent("/healthz", "GET", {}, timeout_s) as response:
                response.read()  # or the connection could not be used again
                return response.status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError):
            return False

    def exchange(self, path: str, content: bytes, timeout_s: float) -> bytes:
        """POSTs JSON as it is and returns the body of the answer: for servers that are not ours.

        Raises:
            PolicyError: by the HTTP status, ProtocolMismatchError or ServerUnreachableError.
        """
        body = {"content": content, "headers": {"Content-Type": "application/json"}}
        with self._open(path, "POST", body, timeout_s) as (_, chunks):
            return b"".join(chunks)

    def answers(self, timeout_s: float) -> bool:
        """True when anything at all is answered in time: for servers without ``/healthz``. Never raises."""
        try:
            with self._sent("/", "HEAD", {}, timeout_s) as response:
                response.read()
                return True
        except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError):
            return False

    def close(self) -> None:
        """Closes the connections."""
        self._closed = True
        self._transport.close()

    def _body(self, fields: Mapping[str, Any], images: Mapping[str, bytes], deadline_s: float) -> dict[str, Any]:
        deadline_ms = max(1, round(min(deadline_s, MAX_DEADLINE_S) * 1000))
        values = {**fields, "deadline_ms": deadline_ms}
        if not self._multipart:
            return {"content": _json(values, images), "headers": {"Content-Type": "application/json"}}
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items() if v is not None}
        return {"data": text, "files": {name: (f"{name}.jpg", data, "image/jpeg") for name, data in images.items()}}

    def _whole(self, path: str, method: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        with self._open(path, method, body, timeout_s) as (_, chunks):
            answer = _parse(b"".join(chunks), f"the answer of {path}")
        if "error" in answer:
            raise ProtocolMismatchError(f"{path} answered HTTP 200 with an error inside", code="bad_error")
        return answer

    @contextlib.contextmanager
    def _open(
        self, path: str, method: str, body: dict[str, Any], timeout_s: float
    ) -> Iterator[tuple[httpx.Response, Iterator[bytes]]]:
        """An answer with status 200 and its bounded chunks; everything else is raised."""
        ends_s = time.monotonic() + timeout_s
        try:
            with self._sent(path, method, body, timeout_s) as response:
                chunks = self._bounded(response, ends_s, timeout_s)
                if response.status_code != 200:
                    raise self._refusal(response, chunks)
                yield response, chunks
        except httpx.TimeoutException as error:
            connecting = isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout)
            what = "connecting" if connecting else f"waiting for an answer (limit {timeout_s:g} s)"
            raise ServerUnreachableError(f"{self.url}{path}: gave up {what}", code="timeout") from error
        except httpx.ConnectError as error:
            raise ServerUnreachableError(
                f"cannot connect to {self.url} ({error}); is `vlm2vla-server serve` running there?", code="connect"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerUnreachableError(
                f"{self.url}{path}: connection lost ({type(error).__name__}: {error})", code="connection_lost"
            ) from error

    def _sent(
        self, path: str, method: str, body: Mapping[str, Any], timeout_s: float
    ) -> contextlib.closing[httpx.Response]:
        """One request; the answer's headers are there, its body is not read yet. Raises what httpx raises, and
        RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("this connection was closed")
        timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        request = httpx.Request(
            method,
            _url(self.url + path),
            headers={**self._headers, **body.get("headers", {})},
            content=body.get("content"),
            data=body.get("data"),
            files=body.get("files"),
            extensions={"timeout": timeout.as_dict()},
        )
        return contextlib.closing(self._transport.handle_request(request))

    def _refusal(self, response: httpx.Response, chunks: Iterator[bytes]) -> PolicyError:
        try:
            body: object = json.loads(b"".join(chunks))
        except (ValueError, RecursionError):
            body = None
        return error_from_body(response.status_code, body, response.headers)

    def _bounded(self, response: httpx.Response, ends_s: float, timeout_s: float) -> Iterator[bytes]:
        size = 0
        for chunk in response.iter_bytes():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise ProtocolMismatchError(f"an answer of more than {MAX_BODY_BYTES} bytes", code="too_large")
            if time.monotonic() > ends_s:
                raise ServerUnreachableError(f"the answer was not complete after {timeout_s:g} s", code="timeout")
            yield chunk
