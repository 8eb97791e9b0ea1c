"""The server's error tree: every failure a caller can see has one of the wire codes of the schema.

Raise these anywhere below the HTTP layer; `app` turns them into `{"error": {...}}` with the code's HTTP status. Nothing
that the caller sent is repeated in a message or in details.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm2vla_schema.errors import ErrorCode, VLM2VLAError


class ServerError(VLM2VLAError):
    """A failure with a wire code. `details` is sent as it is; `headers` are added to the HTTP answer. `openai_code` is
    the name that OpenAI's clients know it by, where that is another."""

    code: ErrorCode = ErrorCode.ENGINE_FAILURE
    openai_code: str | None = None

    def __init__(
        self, message: str, *, details: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})
        self.headers: dict[str, str] = dict(headers or {})


class InvalidRequest(ServerError):
    """The request does not fit the endpoint's schema, or asks a model for a stage that it does not have (422)."""

    code = ErrorCode.INVALID_REQUEST


class InvalidImage(ServerError):
    """An image is not JPEG, PNG or WebP, is broken, or is too large once decoded (400)."""

    code = ErrorCode.INVALID_IMAGE


class PayloadTooLarge(ServerError):
    """The body is larger than `--max-body-mb` (413)."""

    code = ErrorCode.PAYLOAD_TOO_LARGE


class UnsupportedMediaType(ServerError):
    """The body is neither JSON nor multipart/form-data (415)."""

    code = ErrorCode.UNSUPPORTED_MEDIA_TYPE


class Unauthorized(ServerError):
    """The API key is missing or wrong (401)."""

    code = ErrorCode.UNAUTHORIZED
    openai_code = "invalid_api_key"


class NotFound(ServerError):
    """No such path (404)."""

    code = ErrorCode.NOT_FOUND


class UnknownModel(ServerError):
    """`model` names no adapter of this server (404)."""

    code = ErrorCode.UNKNOWN_MODEL
    openai_code = "model_not_found"


class MethodNotAllowed(ServerError):
    """The path exists, the method does not (405)."""

    code = ErrorCode.METHOD_NOT_ALLOWED


class UnparseableOutput(ServerError):
    """No attempt gave text that the strict parser accepts (502); details hold the raw text of each attempt."""

    code = ErrorCode.UNPARSEABLE_OUTPUT


class DeadlineExceeded(ServerError):
    """`deadline_ms`, counted from receipt, ran out (504); details hold the attempts made so far."""

    code = ErrorCode.DEADLINE_EXCEEDED


class Overloaded(ServerError):
    """Too many requests are being served or waiting (503 with Retry-After)."""

    code = ErrorCode.OVERLOADED

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, details={"retry_after_s": retry_after_s}, headers={"Retry-After": str(retry_after_s)})


class NotReady(ServerError):
    """The model is loading, or an adapter could not be proven active (503)."""

    code = ErrorCode.NOT_READY


class EngineFailure(ServerError):
    """The engine broke (500). The cause is in the server's log, never on the wire."""

    code = ErrorCode.ENGINE_FAILURE


class Cancelled(ServerError):
    """A newer request of the same episode took this one's place, or the caller left (499)."""

    code = ErrorCode.CANCELLED


class ConfigurationError(VLM2VLAError):
    """The settings cannot work. `cli` prints the message and exits 2."""


def attempt_details(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Details of `unparseable_output` and `deadline_exceeded`: what each attempt produced and why it failed."""
    return {"attempts": [dict(attempt) for attempt in attempts]}
