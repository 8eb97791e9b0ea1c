"""The policy behind HTTP: frames out, words and rows back (protocol 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vlm2vla_client.errors import ProtocolMismatchError, ServerUnreachableError
from vlm2vla_client.http import ServerConnection, error_from_body
from vlm2vla_client.policies.base import (
    ALL_STAGES,
    Answered,
    Asked,
    CycleEvent,
    PlanArrived,
    PolicyInfo,
    RowArrived,
    RowDropped,
    Scenario,
    SubtasksAnswer,
)
from vlm2vla_schema.errors import validation_details
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.messages import (
    BASE_MODEL_NAME,
    PROTOCOL,
    ActionsDoneEvent,
    DoneEvent,
    InfoResponse,
    PlanEvent,
    RowEvent,
    SubtasksResponse,
)
from vlm2vla_schema.types import Frame

INFO_TIMEOUT_S = 10.0
STREAM_ERROR_STATUS = 500  # an error line of a stream has no status of its own; its code decides


Answer = TypeVar("Answer", bound=BaseModel)


def validated(model: type[Answer], answer: Mapping[str, Any]) -> Answer:
    """The answer as its schema type.

    Raises:
        ProtocolMismatchError: a field is missing or of the wrong kind; names the fields, never the values.
    """
    try:
        return model.model_validate(dict(answer))
    except ValidationError as error:
        details = validation_details(error)
        raise ProtocolMismatchError(f"not a {model.__name__}: {details}", code="bad_answer", details=details) from None


def about_model(info: InfoResponse, model: str | None) -> tuple[str, bool, tuple[str, ...]]:
    """Name, whether it was trained to act, and stages of ``model`` (None: the server's default) by ``/info``.

    Raises:
        ProtocolMismatchError: the server has no such model.
    """
    wanted = info.model if model is None else model
    for adapter in info.adapters:
        if adapter.name == wanted:
            return adapter.name, adapter.policy, tuple(adapter.card.stages) or ALL_STAGES
    if wanted in (BASE_MODEL_NAME, info.model):
        is_default = wanted == info.model
        return wanted, info.policy and is_default, (tuple(info.stages) if is_default else ()) or ALL_STAGES
    names = ", ".join([BASE_MODEL_NAME, *(adapter.name for adapter in info.adapters)])
    raise ProtocolMismatchError(f"the server has no model {wanted!r}; it has: {names}", code="unknown_model")


def worth_recording(info: InfoResponse) -> dict[str, Any]:
    """``/info`` without the cards' long tables."""
    short = info.model_dump(mode="json", exclude={"adapters", "units"})
    names = ("name", "hash", "policy", "proven")
    return {**short, "adapters": [{name: getattr(adapter, name) for name in names} for adapter in info.adapters]}


class ServerPolicy:
    """Asks a VLM2VLA server; drops what belongs to another episode or frame.

    Args:
        connection: shared with the server verifier.
        model: adapter name, ``base``, or None for the server's default.
    """

    name = "server"

    def __init__(self, connection: ServerConnection, *, model: str | None = None) -> None:
        self._connection = connection
        self._model = model
        self._requests = 0
        self._info: PolicyInfo | None = None

    def info(self) -> PolicyInfo:
        """Reads ``/info`` once; refuses another major protocol."""
        if self._info is None:
            self._info = self._read_info()
        return self._info

    def _read_info(self) -> PolicyInfo:
        answer = self._connection.get("/info", INFO_TIMEOUT_S)
        major = str(answer.get("protocol", "none")).split(".")[0]
        if major != str(PROTOCOL).split(".")[0]:
            raise ProtocolMismatchError(
                f"{self._connection.url} speaks protocol {answer.get('protocol')!r}, this client protocol {PROTOCOL}; "
                "install the same version on both machines",
                code="protocol",
            )
        info = validated(InfoResponse, answer)
        name, trained, stages = about_model(info, self._model)
        return PolicyInfo(name=name, trained_to_act=trained, stages=stages, details=worth_recording(info))

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """POST /subtasks."""
        fields = {**self._common(frame, asked), "task": task, "scenario": scenario}
        answer = self._connection.post("/subtasks", fields, {"image": encode_jpeg(frame.image)}, asked.deadline_s)
        self._check_echo(answer, fields)
        return SubtasksAnswer(validated(SubtasksResponse, answer).subtasks, answer)

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """POST /cycle, or /actions for the operator's motion plan and for an adapter without that stage; rows as the
        server decodes them."""
        plans = "motion_plan" in self.info().stages
        given = asked.motion_plan if plans else None
        planning = plans and given is None
        fields = {**self._common(frame, asked), "subtask": subtask}
        if not planning:
            fields["motion_plan"] = given
        if given is not None:
            yield PlanArrived(given)
        path = "/cycle" if planning else "/actions"
        images = {"image": encode_jpeg(frame.image)}
        rows: list[list[float]] = []
        for line in self._connection.stream(path, fields, images, asked.deadline_s):
            kind = line.get("event")
            if kind == "plan":
                yield PlanArrived(validated(PlanEvent, line).motion_plan)
            elif kind == "row":
                yield self._take_row(line, rows, fields)
            elif kind == "done":
                yield self._take_done(line, rows, fields, planning)
                return
            elif kind == "error":
                raise error_from_body(STREAM_ERROR_STATUS, line)
            # another event is a newer server's addition: protocol 1 may add, never rename
        raise ServerUnreachableError("the stream ended before its answer did", code="stream_cut")

    def _take_row(self, line: dict[str, Any], rows: list[list[float]], fields: dict[str, Any]) -> CycleEvent:
        """A row in its turn is kept; a foreign or repeated one is dropped; a gap is an error."""
        for name in ("episode_id", "frame_id"):
            if name in line and line[name] != fields[name]:
                return RowDropped(f"row of another {name.removesuffix('_id')}", line.get("row"))
        event = validated(RowEvent, line)
        if event.index < len(rows):
            return RowDropped("row already received", event.row)
        if event.index > len(rows):
            raise ProtocolMismatchError(f"expected row {len(rows)}, received row {event.index}", code="bad_order")
        rows.append(event.row)
        return RowArrived(event.index, event.row, str(fields["episode_id"]))

    def _take_done(
        self, line: dict[str, Any], rows: list[list[float]], fields: dict[str, Any], planning: bool
    ) -> Answered:
        """The final answer, which must echo this request and repeat exactly the rows that were streamed."""
        self._check_echo(line, fields)
        done: DoneEvent | ActionsDoneEvent
        done = validated(DoneEvent, line) if planning else validated(ActionsDoneEvent, line)
        if rows and done.actions != rows:
            raise ProtocolMismatchError("the final answer differs from the rows that were streamed", code="bad_answer")
        plan = done.motion_plan if isinstance(done, DoneEvent) else fields["motion_plan"]
        return Answered(done.actions, plan, str(fields["episode_id"]), line)

    def _common(self, frame: Frame, asked: Asked) -> dict[str, Any]:
        self._requests += 1
        fields: dict[str, Any] = {
            "request_id": f"{asked.episode_id}-{self._requests}",
            "episode_id": asked.episode_id,
            "frame_id": frame.frame_id,
        }
        if self._model is not None:
            fields["model"] = self._model
        if asked.seed is not None:
            fields["seed"] = asked.seed
        return fields

    @staticmethod
    def _check_echo(answer: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        for name in ("episode_id", "frame_id", "request_id"):
            if name in answer and answer[name] != fields[name]:
                raise ProtocolMismatchError(f"the answer belongs to another {name.removesuffix('_id')}", code="foreign")

    def alive(self, timeout_s: float) -> bool:
        """True when ``/healthz`` answers in time."""
        return self._connection.healthy(timeout_s)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()
