"""The policy behind HTTP: frames out, words and rows back (protocol 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

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
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.messages import PROTOCOL
from vlm2vla_schema.types import Frame

INFO_TIMEOUT_S = 10.0
STREAM_ERROR_STATUS = 500  # an error line of a stream has no status of its own; its code decides


def _text(answer: Mapping[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ProtocolMismatchError(f"expected text in {name!r}, received {type(value).__name__}", code="bad_answer")
    return value


def _row(value: object) -> list[float]:
    if not isinstance(value, list) or len(value) != 4:
        raise ProtocolMismatchError("expected a row of 4 numbers", code="bad_row")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            raise ProtocolMismatchError("expected a row of 4 finite numbers", code="bad_row")
    return [float(item) for item in value]


def _rows(value: object) -> list[list[float]]:
    if not isinstance(value, list) or not 1 <= len(value) <= 32:
        raise ProtocolMismatchError("expected 1..32 rows in 'actions'", code="bad_answer")
    return [_row(item) for item in value]


def select_adapter(info: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """The entry of ``/info`` for ``model``: by default the first adapter; empty for ``base`` or when there is none.

    Raises:
        ProtocolMismatchError: ``/info`` lists no such model.
    """
    adapters = [entry for entry in info.get("adapters") or [] if isinstance(entry, dict)]
    if model is None:
        return adapters[0] if adapters else {}
    for entry in adapters:
        if entry.get("name") == model:
            return entry
    if model == "base":
        return {}
    names = ", ".join(str(entry.get("name")) for entry in adapters) or "none"
    raise ProtocolMismatchError(f"the server has no model {model!r}; it has: base, {names}", code="unknown_model")


class ServerPolicy:
    """Asks a VLM2VLA server; drops what belongs to another episode or frame.

    Args:
        connection: shared with the server verifier.
        model: adapter name, ``base``, or None for the server's default.
        extra: more request fields for every cycle (``motion_plan_temperature``, ``constrained``, ...).
    """

    name = "server"

    def __init__(
        self, connection: ServerConnection, *, model: str | None = None, extra: Mapping[str, Any] | None = None
    ) -> None:
        self._connection = connection
        self._model = model
        self._extra = dict(extra or {})
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
        adapter = select_adapter(answer, self._model)
        card = adapter.get("card") if isinstance(adapter.get("card"), dict) else {}
        assert isinstance(card, dict)
        stages = card.get("stages") or list(ALL_STAGES)
        trained = card.get("policy", adapter.get("policy", False))
        name = str(adapter.get("name") or self._model or answer.get("model") or "base")
        return PolicyInfo(name=name, trained_to_act=trained is True, stages=tuple(map(str, stages)), details=answer)

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """POST /subtasks."""
        fields = {**self._common(frame, asked), "task": task, "scenario": scenario}
        answer = self._connection.post("/subtasks", fields, {"image": encode_jpeg(frame.image)}, asked.deadline_s)
        self._check_echo(answer, fields)
        subtasks = answer.get("subtasks")
        if not isinstance(subtasks, list) or not subtasks or not all(isinstance(s, str) and s for s in subtasks):
            raise ProtocolMismatchError("expected a list of strings in 'subtasks'", code="bad_answer")
        return SubtasksAnswer(subtasks, answer)

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """POST /cycle, or /actions for an adapter without the motion plan stage; rows as the server decodes them."""
        planning = "motion_plan" in self.info().stages
        fields = {**self._common(frame, asked), **self._extra, "subtask": subtask}
        if not planning:
            fields["motion_plan"] = None
        path = "/cycle" if planning else "/actions"
        images = {"image": encode_jpeg(frame.image)}
        rows: list[list[float]] = []
        for line in self._connection.stream(path, fields, images, asked.deadline_s):
            kind = line.get("event")
            if kind == "plan":
                yield PlanArrived(_text(line, "motion_plan"))
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
        index = line.get("index")
        if isinstance(index, bool) or not isinstance(index, int):
            raise ProtocolMismatchError("expected a row's 'index' to be a whole number", code="bad_row")
        if index < len(rows):
            return RowDropped("row already received", line.get("row"))
        if index > len(rows):
            raise ProtocolMismatchError(f"expected row {len(rows)}, received row {index}", code="bad_order")
        row = _row(line.get("row"))
        rows.append(row)
        return RowArrived(index, row, str(line.get("episode_id", fields["episode_id"])))

    def _take_done(
        self, line: dict[str, Any], rows: list[list[float]], fields: dict[str, Any], planning: bool
    ) -> Answered:
        """The final answer, which must echo this request and repeat exactly the rows that were streamed."""
        self._check_echo(line, fields)
        actions = _rows(line.get("actions"))
        if actions[: len(rows)] != rows or (rows and len(actions) != len(rows)):
            raise ProtocolMismatchError("the final answer differs from the rows that were streamed", code="bad_answer")
        plan = _text(line, "motion_plan") if planning else None
        return Answered(actions, plan, str(fields["episode_id"]), line)

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
