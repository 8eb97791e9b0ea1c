"""From the bytes of a request to a validated model of the schema.

Everything is bounded: bytes, elements, parts, seconds. The event loop collects bytes and reads the JSON of an ordinary
request, which takes a fraction of a millisecond; whatever could take longer is parsed on a thread.
"""

from __future__ import annotations

import asyncio
import functools
import re
import types
from collections.abc import AsyncIterator
from email.message import Message
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from vlm2vla_schema.errors import validation_details
from vlm2vla_schema.images import to_base64
from vlm2vla_server.errors import Cancelled, DeadlineExceeded, InvalidRequest, PayloadTooLarge, UnsupportedMediaType

M = TypeVar("M", bound=BaseModel)

MAX_JSON_ELEMENTS = 20_000
"""More commas and brackets than any request has: base64 contains none. Refused before the JSON parser sees them."""
QUICK_BYTES = 512 * 1024
QUICK_ELEMENTS = 200
"""JSON up to both, such as two camera frames and some fields, is parsed sooner than handed to a thread and back."""
_ELEMENT_MARKS = (b",", b"[", b"{")
MAX_PARTS = 64
MAX_PROBLEMS = 20
_FIELD_NAME_CHARS = 64
_INTEGER = re.compile(r"-?\d{1,20}")
_NUMBER = re.compile(r"-?\d{1,30}(\.\d{1,30})?([eE][-+]?\d{1,3})?")


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Collect the body. Raises PayloadTooLarge, DeadlineExceeded (a caller that stalls), Cancelled (one that left)."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 15 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise DeadlineExceeded(f"the request's body did not arrive within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise Cancelled("the caller left while sending the body") from None
    return b"".join(chunks)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the body is larger than {max_bytes} bytes; send a JPEG of at most 640x480 pixels per image",
        details={"max_body_bytes": max_bytes},
    )


async def parse_body(headers: Headers, body: bytes, model: type[M], *, forms: bool = True) -> M:
    """Validate a JSON or, with `forms`, a multipart body. Raises UnsupportedMediaType, InvalidRequest."""
    kind, charset = _content_type(headers.get("content-type", ""))
    if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise UnsupportedMediaType("compressed bodies are not accepted; send the body as it is")
    if kind == "application/json":
        if charset not in ("", "utf-8", "utf8", "us-ascii"):
            raise UnsupportedMediaType("JSON is accepted in UTF-8 only")
        if len(body) <= QUICK_BYTES and _has_few_elements(body):
            return _validated(body, model)
        return await asyncio.to_thread(parse_json, body, model)
    if forms and kind == "multipart/form-data":
        # A loop of its own on a thread: hostile boundaries make the parser slow, and it must not run on our loop.
        return await asyncio.to_thread(lambda: asyncio.run(parse_multipart(headers, body, model)))
    accepted = ["application/json", *(["multipart/form-data"] if forms else [])]
    raise UnsupportedMediaType(f"expected Content-Type {' or '.join(accepted)}", details={"accepted": accepted})


@functools.lru_cache(maxsize=64)
def _content_type(value: str) -> tuple[str, str]:
    """Media type and charset of a header's value; every client sends the same few again and again."""
    value = value.replace("\n", " ").replace("\r", " ")
    if not value:
        return "", ""
    message = Message()
    message["content-type"] = value
    charset = message.get_param("charset", "")
    return message.get_content_type(), charset.lower() if isinstance(charset, str) else "unreadable"


def parse_json(body: bytes, model: type[M]) -> M:
    """Validate JSON bytes. Raises InvalidRequest; a syntax error, too deep nesting and NaN included."""
    if _elements(body) > MAX_JSON_ELEMENTS:
        raise InvalidRequest(f"the JSON has more than {MAX_JSON_ELEMENTS} elements; no request of this server has")
    return _validated(body, model)


def _elements(body: bytes) -> int:
    return sum(map(body.count, _ELEMENT_MARKS))


def _has_few_elements(body: bytes) -> bool:
    """Whether there are at most QUICK_ELEMENTS; searching passes over a picture far sooner than counting does."""
    found = 0
    for mark in _ELEMENT_MARKS:
        at = body.find(mark)
        while at >= 0 and found <= QUICK_ELEMENTS:
            found += 1
            at = body.find(mark, at + 1)
    return found <= QUICK_ELEMENTS


def _validated(body: bytes, model: type[M]) -> M:
    try:
        return model.model_validate_json(body)
    except ValidationError as problem:
        raise _invalid(problem) from None
    except (RecursionError, ValueError):
        raise InvalidRequest("the body is not JSON that this server reads") from None


def _invalid(problem: ValidationError) -> InvalidRequest:
    details = validation_details(problem)
    problems = details.get("problems", [])
    details["problems"] = [
        {**item, "field": "".join(c for c in item["field"] if c.isprintable())[:_FIELD_NAME_CHARS]}
        for item in problems[:MAX_PROBLEMS]
    ]
    first = details["problems"][0] if details["problems"] else {"field": "", "problem": "not valid"}
    place = f"field {first['field']!r}: " if first["field"] else ""
    return InvalidRequest(f"{place}{first['problem']}", details=details)


async def parse_multipart(headers: Headers, body: bytes, model: type[M]) -> M:
    """Validate a form: file parts become base64 text, text parts are converted to the field's type first.

    Raises InvalidRequest.
    """

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    try:
        parser = MultiPartParser(
            headers,
            stream(),  # type: ignore[arg-type]  # declared as a generator; any async iterator of bytes is read
            max_files=MAX_PARTS,
            max_fields=MAX_PARTS,
            max_part_size=len(body) + 1,
        )
        form = await parser.parse()
    except MultiPartException as problem:
        raise InvalidRequest(f"the multipart body cannot be read: {problem.message}") from None
    except Exception:  # the parser raises KeyError, ValueError and its own classes on hostile headers
        raise InvalidRequest("the multipart body cannot be read; is its boundary in Content-Type?") from None
    try:
        values: dict[str, list[str]] = {}
        for name, part in form.multi_items():
            text = to_base64(await part.read()) if isinstance(part, UploadFile) else part
            values.setdefault(name, []).append(text)
    finally:
        await form.close()
    return _from_form(values, model)


def _from_form(values: dict[str, list[str]], model: type[M]) -> M:
    data: dict[str, Any] = {}
    for name, texts in values.items():
        field = model.model_fields.get(name)
        kinds = _kinds(field.annotation) if field is not None else set()
        if list in kinds:
            data[name] = texts
        elif len(texts) > 1:
            raise InvalidRequest("a form field that holds one value was given more than once")
        else:
            data[name] = _convert(texts[0], kinds)
    for name, field in model.model_fields.items():
        if name not in data and field.is_required() and type(None) in _kinds(field.annotation):
            data[name] = None  # a form cannot say null; leaving the field out says it
    try:
        return model.model_validate(data)
    except ValidationError as problem:
        raise _invalid(problem) from None
    except (RecursionError, ValueError):
        raise InvalidRequest("the form does not fit this endpoint") from None


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows: `Annotated[int, ...] | None` -> {int, NoneType}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set().union(*(_kinds(part) for part in get_args(annotation)))
    return {origin or annotation}


def _convert(text: str, kinds: set[Any]) -> Any:
    """Text of a form field as the JSON value it stands for; what does not convert stays text and is refused later."""
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    if int in kinds and _INTEGER.fullmatch(text):
        return int(text)
    if float in kinds and _NUMBER.fullmatch(text):
        return float(text)
    return text
