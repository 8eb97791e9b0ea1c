"""The client's error tree. Every error knows the exit code of the command line that it ends."""

from __future__ import annotations

from typing import Any, ClassVar

from vlm2vla_schema.errors import VLM2VLAError


class ClientError(VLM2VLAError):
    """Base of everything the robot PC raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 3


class ConfigurationError(ClientError):
    """Wrong usage or configuration: nothing was started."""

    exit_code: ClassVar[int] = 2


class NotBuiltError(ConfigurationError):
    """Something that this version does not contain yet was asked for."""


class NotCompletedError(ClientError):
    """The task was not completed (out of cycles, no verdict)."""

    exit_code: ClassVar[int] = 3


class ServerError(ClientError):
    """The policy server could not be reached, refused, or answered with an error."""

    exit_code: ClassVar[int] = 4


class SafetyStop(ClientError):
    """Motion was stopped and must not be resumed without a person."""

    exit_code: ClassVar[int] = 5


class CameraError(ClientError):
    """No frame that is new enough arrived before the deadline, or the camera failed."""

    exit_code: ClassVar[int] = 6


class RobotError(ClientError):
    """The arm did not accept or carry out a command, or its state contradicts itself."""

    exit_code: ClassVar[int] = 7


class VerifierError(NotCompletedError):
    """A verifier gave no verdict (error, timeout, unreadable answer); never a success.

    Attributes:
        again: False when asking the same verifier once more would not help.
    """

    def __init__(self, message: str, *, again: bool = True) -> None:
        super().__init__(message)
        self.again = again


class RecordingError(ConfigurationError):
    """An episode folder cannot be written or read."""


class RecordingStoppedError(NotCompletedError):
    """Too little room is left for the recording, or it cannot be written: an arm does not move unrecorded."""


class PolicyError(ServerError):
    """The policy gave no usable answer.

    Attributes:
        code: the wire code (a value of ``vlm2vla_schema.errors.ErrorCode``) or a client-side name such as "timeout".
        details: what the server said about it; safe to record.
        request_id: the request that failed, when the server named it.
        retry_after_s: how long the server asked to wait, if it did.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        details: dict[str, Any] | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.details = details or {}
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class ServerUnreachableError(PolicyError):
    """No connection, connection lost, or no complete answer within the time limit."""


class ProtocolMismatchError(PolicyError):
    """The server speaks another protocol, or answered what the protocol does not allow."""


class RequestRefusedError(PolicyError):
    """The server refused the request itself (4xx): sending it again would not help."""


class AnswerUnusableError(PolicyError):
    """The model's text never parsed, or took too long (502, 504): a new frame may give a better answer."""


class ServerBusyError(PolicyError):
    """The server is overloaded or not ready (503)."""


class AnswerCancelledError(PolicyError):
    """A newer request of the same episode replaced this one (499)."""


class EngineFailedError(PolicyError):
    """The server's engine failed (500)."""
