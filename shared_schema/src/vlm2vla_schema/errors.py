"""The error tree of the schema package and the error codes of the wire.

The codes, their HTTP statuses and the shape of the body are fixed by docs/protocol.md: programs branch on them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class VLM2VLAError(Exception):
    """Base of every error that this project raises on purpose."""


class ParseError(VLM2VLAError):
    """A model's text is not what its stage may say.

    Attributes:
        raw_text: the whole text, exactly as generated.
        expected: the accepted form in one line.
    """

    def __init__(self, message: str, raw_text: str, expected: str) -> None:
        super().__init__(f"{message}; expected {expected}")
        self.message = message
        self.raw_text = raw_text
        self.expected = expected


class ImageError(VLM2VLAError):
    """Bytes or an array that are not an image this project handles."""


class ArrayError(VLM2VLAError):
    """What another program sent for an array is not one that may be made here."""


class ErrorCode(StrEnum):
    """Stable error codes of protocol 1."""

    INVALID_REQUEST = "invalid_request"
    INVALID_IMAGE = "invalid_image"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    UNKNOWN_MODEL = "unknown_model"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNPARSEABLE_OUTPUT = "unparseable_output"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    OVERLOADED = "overloaded"
    NOT_READY = "not_ready"
    ENGINE_FAILURE = "engine_failure"
    CANCELLED = "cancelled"

    @property
    def http_status(self) -> int:
        """The HTTP status that this code always travels with; never 200."""
        return _HTTP_STATUS[self]


_HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.INVALID_REQUEST: 422,
    ErrorCode.INVALID_IMAGE: 400,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.UNKNOWN_MODEL: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.UNPARSEABLE_OUTPUT: 502,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.OVERLOADED: 503,
    ErrorCode.NOT_READY: 503,
    ErrorCode.ENGINE_FAILURE: 500,
    ErrorCode.CANCELLED: 499,
}


class ErrorInfo(BaseModel):
    """What went wrong, for a program (`code`) and for a person (`message`)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    code: ErrorCode
    message: str
    details: dict[str, Any] = Field(default_factory=dict)
    request_id: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    error: ErrorInfo


_MAX_LOCATION_CHARS = 200
_MAX_PROBLEMS = 20


def validation_details(error: ValidationError) -> dict[str, Any]:
    """Turn pydantic's report into `details` that name fields and rules but never repeat a received value.

    At most 20 problems are listed: a hostile body can hold a million.
    """
    problems = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:_MAX_PROBLEMS]:
        location = ".".join(str(part) for part in item["loc"])[:_MAX_LOCATION_CHARS]
        problems.append({"field": location, "problem": item["msg"], "type": item["type"]})
    return {"problems": problems}
