"""The six generating endpoints: from a validated request to the schema's answer, over `policy`.

Each function takes the request and a Call, and returns the answer. Streaming is an optional sink of events in the
Call; nothing here knows HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from vlm2vla_schema import messages as wire
from vlm2vla_schema.errors import ImageError
from vlm2vla_schema.images import decode_image, from_base64, to_model_square
from vlm2vla_server.certainty import EVEN, certain, probability_done
from vlm2vla_server.errors import InvalidImage, InvalidRequest
from vlm2vla_server.policy import Clocking, Outcome, RowSink, Sampling, Spent
from vlm2vla_server.service import Service
from vlm2vla_server.stages import (
    ServedModel,
    actions_stage,
    motion_plan_stage,
    subtasks_stage,
    verify_stage,
    vqa_stage,
)

Emit: TypeAlias = Callable[[BaseModel], Awaitable[None]]
"""Takes the events of a stream: `PlanEvent` and `RowEvent`, or the text of a chat completion."""


@dataclass(frozen=True)
class Call:
    """What surrounds a request: the service, its clock, and where events go when the caller wants a stream."""

    service: Service
    clocking: Clocking
    emit: Emit | None = None

    def sink(self) -> RowSink | None:
        """Rows as events, or None when the caller waits for the whole answer."""
        emit = self.emit
        if emit is None:
            return None

        async def send(index: int, row: list[float]) -> None:
            await emit(wire.RowEvent(index=index, row=row))

        return send

    def after(self, spent: Spent) -> Clocking:
        """The clock of the next stage: it begins where the last one ended; the deadline stays."""
        return Clocking(self.clocking.began_s + spent.total_ms / 1000.0, self.clocking.deadline_s)


async def subtasks(request: wire.SubtasksRequest, call: Call) -> wire.SubtasksResponse:
    """POST /subtasks (section 3.1, D.4)."""
    model = call.service.resolve(request.model)
    model.require_stage("subtasks")
    _refuse_control_tokens(call.service, request, ("task",))
    images = await model_images(call.service, model, [request.image])
    sampling = _sampling(request, request.temperature, wire.TEMPERATURE_SUBTASKS[request.scenario], wire.TOP_P_POLICY)
    outcome = await call.service.policy.run(subtasks_stage(request.task), model, images, sampling, call.clocking)
    return wire.SubtasksResponse(subtasks=outcome.value, **_common(request, model, outcome))


async def motion_plan(request: wire.MotionPlanRequest, call: Call) -> wire.MotionPlanResponse:
    """POST /motion_plan (section 3.1, D.4)."""
    model = call.service.resolve(request.model)
    model.require_stage("motion_plan")
    _refuse_control_tokens(call.service, request, ("subtask",))
    images = await model_images(call.service, model, [request.image])
    sampling = _sampling(request, request.temperature, wire.TEMPERATURE_MOTION_PLAN, wire.TOP_P_POLICY)
    outcome = await _plan(call, model, request.subtask, images, sampling)
    return wire.MotionPlanResponse(motion_plan=outcome.value, **_common(request, model, outcome))


async def actions(request: wire.ActionsRequest, call: Call) -> wire.ActionsResponse:
    """POST /actions (section 3.1, D.4). `motion_plan` is null exactly for models without that stage."""
    model = call.service.resolve(request.model)
    model.require_stage("actions")
    plans = "motion_plan" in model.stages
    if plans and request.motion_plan is None:
        raise InvalidRequest("field 'motion_plan': this model was trained with one; null is for models without it")
    if not plans and request.motion_plan is not None:
        raise InvalidRequest("field 'motion_plan': this model was trained without it; send null")
    _refuse_control_tokens(call.service, request, ("subtask", "motion_plan"))
    images = await model_images(call.service, model, [request.image])
    sampling = _sampling(request, request.temperature, wire.TEMPERATURE_ACTIONS, wire.TOP_P_POLICY)
    stage = actions_stage(request.subtask, request.motion_plan, model.card, call.service.settings.max_row_translation_m)
    outcome = await call.service.policy.run(stage, model, images, sampling, call.clocking, call.sink())
    return wire.ActionsResponse(actions=outcome.value.rows, **_common(request, model, outcome))


async def cycle(request: wire.CycleRequest, call: Call) -> wire.CycleResponse:
    """POST /cycle: one inference cycle of D.6, motion plan and then rows. Models without the motion-planning stage
    go straight to the rows; `motion_plan` is null then."""
    model = call.service.resolve(request.model)
    model.require_stage("actions")
    _refuse_control_tokens(call.service, request, ("subtask",))
    images = await model_images(call.service, model, [request.image])
    plan: Outcome[str] | None = None
    clocking = call.clocking
    if "motion_plan" in model.stages:
        sampling = _sampling(request, request.motion_plan_temperature, wire.TEMPERATURE_MOTION_PLAN, wire.TOP_P_POLICY)
        plan = await _plan(call, model, request.subtask, images, sampling)
        clocking = call.after(plan.spent)
        if call.emit is not None:
            await call.emit(wire.PlanEvent(motion_plan=plan.value))
    sampling = _sampling(request, request.actions_temperature, wire.TEMPERATURE_ACTIONS, wire.TOP_P_POLICY)
    text = plan.value if plan is not None else None
    stage = actions_stage(request.subtask, text, model.card, call.service.settings.max_row_translation_m)
    rows = await call.service.policy.run(stage, model, images, sampling, clocking, call.sink())
    parts = wire.CycleStages(
        motion_plan=None if plan is None else wire.StageResult(**_common(request, model, plan)),
        actions=wire.StageResult(**_common(request, model, rows)),
    )
    return wire.CycleResponse(motion_plan=text, actions=rows.value.rows, stages=parts, **_summed(parts))


async def verify(request: wire.VerifyRequest, call: Call) -> wire.VerifyResponse:
    """POST /verify (D.5)."""
    model = call.service.resolve(request.model or call.service.verifier)
    _refuse_control_tokens(call.service, request, ("subtask", "next_subtask"))
    images = await model_images(call.service, model, [request.before, request.after])
    sampling = _sampling(request, request.temperature, wire.TEMPERATURE_VERIFY, wire.TOP_P_GREEDY)
    stage = verify_stage(request.subtask, request.next_subtask)
    outcome = await call.service.policy.run(stage, model, images, sampling, call.clocking)
    verdict, probability = outcome.value, None
    threshold = call.service.verify_threshold(model.card)
    if verdict.success and threshold > EVEN:
        asked_s = time.monotonic()
        probability = await probability_done(
            call.service.engine, images, stage.prompt, model.adapter, call.clocking.deadline_s
        )
        asked_ms = (time.monotonic() - asked_s) * 1000.0
        outcome.spent.generate_ms += asked_ms
        outcome.spent.total_ms += asked_ms
        verdict = certain(verdict, probability, threshold)
    return wire.VerifyResponse(
        success=verdict.success,
        confidence=verdict.confidence,
        reasoning=verdict.reasoning,
        probability=probability,
        **_common(request, model, outcome),
    )


async def vqa(request: wire.VqaRequest, call: Call) -> wire.VqaResponse:
    """POST /vqa (section 4.1)."""
    model = call.service.resolve(request.model)
    _refuse_control_tokens(call.service, request, ("question",))
    images = await model_images(call.service, model, request.all_images)
    sampling = _sampling(request, request.temperature, wire.TEMPERATURE_VQA, wire.TOP_P_GREEDY)
    outcome = await call.service.policy.run(vqa_stage(request.question), model, images, sampling, call.clocking)
    return wire.VqaResponse(answer=outcome.value, **_common(request, model, outcome))


async def _plan(
    call: Call, model: ServedModel, subtask: str, images: Sequence[NDArray[np.uint8]], sampling: Sampling
) -> Outcome[str]:
    stage = motion_plan_stage(subtask, call.service.engine.control_tokens())
    return await call.service.policy.run(stage, model, images, sampling, call.clocking)


def _sampling(request: wire.GenerationFields, temperature: float | None, default: float, top_p: float) -> Sampling:
    return Sampling(
        temperature=default if temperature is None else temperature,
        top_p=top_p if request.top_p is None else request.top_p,
        seed=request.seed,
        max_tokens=request.max_tokens,
        max_attempts=request.max_attempts,
        constrained=request.constrained,
    )


def _refuse_control_tokens(service: Service, request: wire.GenerationFields, fields: Sequence[str]) -> None:
    for name in fields:
        refuse_control_tokens(service, name, getattr(request, name))


def refuse_control_tokens(service: Service, field: str, text: str | None) -> None:
    """Raises InvalidRequest when a caller's text could close its turn or ask for an image that is not there."""
    if text is not None and any(token in text for token in service.engine.control_tokens()):
        raise InvalidRequest(f"field {field!r}: it holds a control token of the model, such as an end-of-turn mark")


async def model_images(service: Service, model: ServedModel, texts: Sequence[str]) -> list[NDArray[np.uint8]]:
    """base64 texts to RGB squares of the model's size, on a thread. Raises InvalidImage."""
    limit, size = service.settings.max_image_pixels, model.card.image_size

    def decode() -> list[NDArray[np.uint8]]:
        squares = []
        for number, text in enumerate(texts, start=1):
            try:
                squares.append(to_model_square(decode_image(from_base64(text), limit), size))
            except ImageError as problem:
                raise InvalidImage(f"image {number} of {len(texts)}: {problem}") from None
        return squares

    return await asyncio.to_thread(decode) if texts else []


def _common(request: wire.GenerationFields, model: ServedModel, outcome: Outcome[Any]) -> dict[str, Any]:
    spent = outcome.spent
    return {
        "model": model.name,
        "policy": model.policy,
        "prompt_version": outcome.prompt_version,
        "raw_text": outcome.raw_text,
        "attempts": outcome.attempts,
        "finish_reason": outcome.finish_reason,
        "usage": wire.Usage(
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
            cached_tokens=spent.cached_tokens,
        ),
        "timing_ms": wire.TimingMs(
            queue=spent.queue_ms,
            preprocess=spent.preprocess_ms,
            first_token=spent.first_token_ms,
            generate=spent.generate_ms,
            parse=spent.parse_ms,
            total=spent.total_ms,
        ),
        "request_id": request.request_id,
        "episode_id": request.episode_id,
        "frame_id": request.frame_id,
    }


def _summed(parts: wire.CycleStages) -> dict[str, Any]:
    """The top level of a cycle: sums of numbers; of texts, the last stage's."""
    stages = [stage for stage in (parts.motion_plan, parts.actions) if stage is not None]
    last = stages[-1]
    usage = {name: sum(getattr(s.usage, name) for s in stages) for name in wire.Usage.model_fields}
    timing = {name: sum(getattr(s.timing_ms, name) for s in stages) for name in wire.TimingMs.model_fields}
    fields = {name: getattr(last, name) for name in wire.StageResult.model_fields}
    return {
        **fields,
        "raw_text": "\n".join(stage.raw_text for stage in stages),
        "attempts": sum(stage.attempts for stage in stages),
        "usage": wire.Usage(**usage),
        "timing_ms": wire.TimingMs(**timing),
    }
