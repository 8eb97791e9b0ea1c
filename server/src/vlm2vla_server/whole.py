"""The whole policy in one question, for protocols that know a picture, an instruction and an action.

All three stages run on every picture: the subtasks that remain (the first is done now; `subtasks` examples are made for
every step of a demonstration, section 3.1), the motion plan, the rows.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from vlm2vla_schema import messages as wire
from vlm2vla_schema.images import to_model_square
from vlm2vla_server.errors import InvalidImage, InvalidRequest
from vlm2vla_server.generation import Call, refuse_control_tokens
from vlm2vla_server.policy import Sampling
from vlm2vla_server.stages import ServedModel, actions_stage, motion_plan_stage, subtasks_stage

SUBTASKS_TEMPERATURE = 0.0
"""Asked anew at every picture, a list that is drawn would waver between pictures that differ by a centimetre."""


class Motion(BaseModel):
    """What to do now. rows: [N][7] = dx_m, dy_m, dz_m, three zeros (no turn), gripper, as BridgeData V2 has them."""

    subtask: str
    motion_plan: str | None
    rows: list[list[float]]


class _Enough(Exception):
    """The first row is there; what the model would write after it is not needed."""

    def __init__(self, row: list[float]) -> None:
        super().__init__("the first row is there")
        self.row = row


async def motion(image: NDArray[np.uint8], instruction: str, call: Call, *, only_first: bool) -> Motion:
    """Run the stages of the server's default model.

    image: RGB, any size. only_first: generation ends with the first row. Raises InvalidRequest and what
    `policy.Policy.run` raises.
    """
    service = call.service
    model = service.resolve(None)
    model.require_stage("actions")
    if not 1 <= len(instruction) <= wire.MAX_TEXT_CHARS:
        raise InvalidRequest(f"the instruction must have 1 to {wire.MAX_TEXT_CHARS} characters")
    refuse_control_tokens(service, "instruction", instruction)
    images = [await asyncio.to_thread(to_model_square, image, model.card.image_size)]
    subtask, plan = instruction, None
    if "subtasks" in model.stages:
        sampling = _sampling(SUBTASKS_TEMPERATURE)
        named = await service.policy.run(subtasks_stage(instruction), model, images, sampling, call.clocking)
        subtask, call = named.value[0], replace(call, clocking=call.after(named.spent))
    if "motion_plan" in model.stages:
        stage = motion_plan_stage(subtask, service.engine.control_tokens())
        planned = await service.policy.run(stage, model, images, _sampling(wire.TEMPERATURE_MOTION_PLAN), call.clocking)
        plan, call = planned.value, replace(call, clocking=call.after(planned.spent))
    rows = await _rows(call, model, images, subtask, plan, only_first)
    return Motion(subtask=subtask, motion_plan=plan, rows=[[*row[:3], 0.0, 0.0, 0.0, row[3]] for row in rows])


async def _rows(
    call: Call, model: ServedModel, images: list[NDArray[np.uint8]], subtask: str, plan: str | None, only_first: bool
) -> list[list[float]]:
    async def enough(index: int, row: list[float]) -> None:
        raise _Enough(row)

    stage = actions_stage(subtask, plan, model.card, call.service.settings.max_row_translation_m)
    sampling, sink = _sampling(wire.TEMPERATURE_ACTIONS), enough if only_first else None
    try:
        outcome = await call.service.policy.run(stage, model, images, sampling, call.clocking, sink)
    except _Enough as first:
        return [first.row]
    return outcome.value.rows


def _sampling(temperature: float) -> Sampling:
    return Sampling(temperature, wire.TOP_P_POLICY, None, None, wire.DEFAULT_MAX_ATTEMPTS, True)


def picture(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The array as a picture. Raises InvalidImage."""
    if array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise InvalidImage("expected the image as uint8 [H, W, 3], RGB")
    return array
