"""One timed request: where its milliseconds went, on this side and on the server's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.bench.floor import Generation
from vlm2vla_client.errors import ProtocolMismatchError, ServerUnreachableError
from vlm2vla_client.http import ServerConnection, error_from_body
from vlm2vla_client.policies.server import STREAM_ERROR_STATUS, validated
from vlm2vla_schema.images import encode_jpeg, to_base64
from vlm2vla_schema.messages import StageResult

ENDPOINTS = ("cycle", "actions", "motion_plan", "subtasks", "verify", "vqa")
STREAMED = ("cycle", "actions")
PARTS = ("encode", "network", "queue", "preprocess", "prefill", "decode", "parse", "rest")
"""In the order of a request's life. encode: JPEG and base64 here. network: what neither side accounts for, so sockets,
HTTP on both ends, JSON of request and answer. queue to parse: the server's timing_ms, with prefill its first_token
and decode what generation took after it, without parse. rest: between the server's stages and attempts."""
MARK_PX = 16
PLAN = "Move forward and slightly left, then down."


@dataclass(frozen=True)
class Question:
    """What is asked, request after request.

    Attributes:
        endpoint: one of ``ENDPOINTS``.
        model: adapter, ``base``, or None for the server's default.
        plans: the model has the motion planning stage; without it /actions takes no plan.
    """

    endpoint: str
    subtask: str
    task: str
    model: str | None = None
    plans: bool = True
    deadline_s: float = 60.0

    def fields(self, picture: str) -> dict[str, Any]:
        """The endpoint's own fields; ``picture`` is base64."""
        by_endpoint: dict[str, dict[str, Any]] = {
            "cycle": {"image": picture, "subtask": self.subtask},
            "actions": {"image": picture, "subtask": self.subtask, "motion_plan": PLAN if self.plans else None},
            "motion_plan": {"image": picture, "subtask": self.subtask},
            "subtasks": {"image": picture, "task": self.task},
            "verify": {"before": picture, "after": picture, "subtask": self.subtask, "next_subtask": None},
            "vqa": {"image": picture, "question": "What is on the counter?"},
        }
        model = {} if self.model is None else {"model": self.model}
        return {**by_endpoint[self.endpoint], **model}


@dataclass(frozen=True)
class Sample:
    """One answered request. ``parts`` by the names of ``PARTS``, which add up to ``wall_ms``; ``first_row_ms`` counts
    from the same moment, None where rows are not streamed. ``work``: the generations, for the floor."""

    wall_ms: float
    parts: dict[str, float]
    first_row_ms: float | None
    attempts: int
    work: tuple[Generation, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all stages."""
        return sum(part.prompt for part in self.work)

    @property
    def generated_tokens(self) -> int:
        """Of all stages."""
        return sum(part.generated for part in self.work)

    @property
    def cached_tokens(self) -> int:
        """Of all stages."""
        return sum(part.cached for part in self.work)

    @property
    def ms_per_token(self) -> float | None:
        """One decoding step: decode over the tokens after each stage's first. None when there was none."""
        steps = sum(part.generated - 1 for part in self.work)
        return self.parts["decode"] / steps if steps > 0 else None


class Pictures:
    """One picture, marked anew for every request, as a camera's frames differ: a server that keeps what it made of a
    picture must not answer the bench from memory."""

    def __init__(self, rgb: NDArray[np.uint8]) -> None:
        self._rgb = rgb

    def take(self, number: int) -> NDArray[np.uint8]:
        """The picture of request ``number``, uint8 [H, W, 3]."""
        marked = self._rgb.copy()
        marked[:MARK_PX, :MARK_PX] = (number * 37 % 256, number // 7 * 53 % 256, number // 49 * 71 % 256)
        return marked


def ask(
    connection: ServerConnection, question: Question, rgb: NDArray[np.uint8], seed: int, episode_id: str
) -> Sample:
    """Sends one request and takes the time. Blocks until the answer is whole.

    Raises:
        PolicyError: no usable answer.
    """
    began_s = time.perf_counter()
    picture = to_base64(encode_jpeg(rgb))
    encode_ms = _ms_since(began_s)
    fields = {**question.fields(picture), "seed": seed, "episode_id": episode_id, "frame_id": str(seed)}
    path, first_row_ms = f"/{question.endpoint}", None
    if question.endpoint in STREAMED:
        answer, first_row_ms = _stream(connection, path, fields, question.deadline_s, began_s)
    else:
        answer = connection.post(path, fields, {}, question.deadline_s)
    wall_ms = _ms_since(began_s)
    whole = validated(StageResult, answer)
    pictures = 2 if question.endpoint == "verify" else 1
    work = work_of(answer, whole, pictures)
    return Sample(wall_ms, parts_of(whole, wall_ms, encode_ms), first_row_ms, whole.attempts, work)


def _stream(
    connection: ServerConnection, path: str, fields: Mapping[str, Any], deadline_s: float, began_s: float
) -> tuple[dict[str, Any], float | None]:
    first_row_ms = None
    for line in connection.stream(path, fields, {}, deadline_s):
        kind = line.get("event")
        if kind == "row" and first_row_ms is None:
            first_row_ms = _ms_since(began_s)
        elif kind == "done":
            return line, first_row_ms
        elif kind == "error":
            raise error_from_body(STREAM_ERROR_STATUS, line)
    raise ServerUnreachableError("the stream ended before its answer did", code="stream_cut")


def parts_of(answer: StageResult, wall_ms: float, encode_ms: float) -> dict[str, float]:
    """The wall time by ``PARTS``."""
    timing = answer.timing_ms
    return {
        "encode": encode_ms,
        "network": max(0.0, wall_ms - encode_ms - timing.total),
        "queue": timing.queue,
        "preprocess": timing.preprocess,
        "prefill": timing.first_token,
        "decode": max(0.0, timing.generate - timing.first_token - timing.parse),
        "parse": timing.parse,
        "rest": max(0.0, timing.total - timing.queue - timing.preprocess - timing.generate),
    }


def work_of(answer: Mapping[str, Any], whole: StageResult, pictures: int) -> tuple[Generation, ...]:
    """The generations behind an answer: of a cycle the stages', else the one.

    Raises:
        ProtocolMismatchError: ``stages`` is not what protocol 1 says.
    """
    stages = answer.get("stages")
    if stages is None:
        return (_generation(whole, pictures),)
    if not isinstance(stages, Mapping):
        raise ProtocolMismatchError("the answer's stages are not an object", code="bad_answer")
    found = [validated(StageResult, stages[name]) for name in ("motion_plan", "actions") if stages.get(name)]
    return tuple(_generation(stage, pictures) for stage in found)


def _generation(stage: StageResult, pictures: int) -> Generation:
    """Counts are sums over attempts; the floor is that of one good attempt."""
    usage, tries = stage.usage, stage.attempts
    return Generation(
        usage.prompt_tokens // tries, usage.completion_tokens // tries, usage.cached_tokens // tries, pictures
    )


def _ms_since(moment_s: float) -> float:
    return (time.perf_counter() - moment_s) * 1000.0
