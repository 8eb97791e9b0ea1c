"""One answer as it arrives: recorded, shown, and reduced to the rows that may still be executed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from vlm2vla_client.arrivals import Arrivals
from vlm2vla_client.episode import LoopConfig, Parts
from vlm2vla_client.errors import ClientError
from vlm2vla_client.policies.base import Answered, PlanArrived, RowArrived, RowDropped
from vlm2vla_client.safety import SafetyContext


class Record(Protocol):
    """Writes one event of the recording."""

    def __call__(self, kind: str, **fields: object) -> None: ...


class Answer:
    """One answer as it arrives: recorded, shown, and reduced to the rows that may still be executed."""

    def __init__(
        self, arrivals: Arrivals, parts: Parts, config: LoopConfig, record: Record, sent_s: float, frame_age_s: float
    ) -> None:
        self._progress = parts.progress
        self._config = config
        self._record = record
        self._arrivals = arrivals
        self._sent_s = sent_s
        self._frame_age_s = frame_age_s
        self._age_s = 0.0
        self._row_episode_id = config.episode_id
        self.plan: str | None = None
        self._iterator = self._read()

    def failed(self) -> ClientError | None:
        """The error that ended the answer, as soon as it is known; rows that are being executed must then stop."""
        return self._arrivals.failed()

    def rows(self) -> Iterator[Sequence[float]]:
        """Rows in order. In streamed execution this runs inside the executor, which holds the arm if it raises."""
        return self._iterator

    def context(self) -> SafetyContext:
        """What the filter must know about the rows received so far."""
        return SafetyContext(
            episode_id=self._config.episode_id,
            row_episode_id=self._row_episode_id,
            frame_age_at_send_s=self._frame_age_s,
            answer_age_s=self._age_s,
        )

    def _read(self) -> Iterator[Sequence[float]]:
        progress, seen = self._progress, 0
        for event, arrived_s in self._arrivals:
            if isinstance(event, PlanArrived):
                self.plan = event.motion_plan
                self._record("plan", motion_plan=event.motion_plan)
                progress.plan(event.motion_plan)
            elif isinstance(event, RowArrived):
                age_s = arrived_s - self._sent_s
                self._record("row", index=event.index, row=event.row, answer_age_s=age_s)
                progress.row(event.index, event.row)
                seen += 1
                if (error := self._arrivals.failed()) is not None:  # no row starts of an answer known to be bad
                    self._record("dropped", reason="the answer failed after this row", row=event.row)
                    raise error
                if self._take(event.row, event.episode_id, age_s):
                    yield event.row
                else:
                    return
            elif isinstance(event, RowDropped):
                self._record("dropped", reason=event.reason, row=event.row)
            else:
                self._record("answer", rows=event.rows, answer=event.raw, seconds=arrived_s - self._sent_s)
                yield from self._unseen(event, seen, arrived_s)

    def _take(self, row: Sequence[float], row_episode_id: str, age_s: float) -> bool:
        """Keeps a row's age and origin for the filter. False when a row is too late to follow those before it."""
        self._age_s, self._row_episode_id = age_s, row_episode_id
        if self._config.execute == "whole":
            return True  # the filter sees the age and origin of the last row, which bound those of all
        problem = "the row arrived too late" if age_s > self._config.max_answer_age_s else None
        if row_episode_id != self._config.episode_id:
            problem = "row of another episode"
        if problem is not None:
            self._record("dropped", reason=problem, row=list(row))
        return problem is None

    def _unseen(self, answer: Answered, seen: int, arrived_s: float) -> Iterator[Sequence[float]]:
        """Rows that came only with the final answer (a policy that does not stream)."""
        for row in answer.rows[seen:]:
            if self._take(row, answer.episode_id, arrived_s - self._sent_s):
                yield row
