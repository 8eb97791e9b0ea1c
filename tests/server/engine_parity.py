"""Greedy rows of two engines on the same frames of the twin, and how close each difference was."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlm2vla_schema.images import to_model_square
from vlm2vla_server.engines.base import Engine, GenerationRequest
from vlm2vla_server.engines.decoding import Detokenizer, GrammarCache
from vlm2vla_server.engines.hf_model import HFModel
from vlm2vla_server.stages import actions_stage
from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks import SUITES

FIRST_SEED = 600_000
"""Development seeds: nothing is tuned on what these scenes show."""
MOTIONS = (
    ("Move to Carrot", "Move forward, slightly left, and down, gripper stays open."),
    ("Grasp Carrot", "Move down, then close the gripper."),
    ("Lift Carrot", "Move up, gripper stays closed."),
)
AT_ONCE = 8


@dataclass(frozen=True)
class Difference:
    """Where two engines part. gap_nat: between the two likeliest allowed tokens at the first token that differs, as the
    transformers engine sees them."""

    frame: int
    one: str
    other: str
    gap_nat: float


def twin_frames(count: int, size: int) -> list[NDArray[np.uint8]]:
    """Pictures uint8 [size, size, 3] of as many scenes."""
    suite = SUITES["pick_carrot"]
    return [to_model_square(Camera(World(suite.scene(FIRST_SEED + i))).rgb(), size) for i in range(count)]


def row_requests(frames: Sequence[NDArray[np.uint8]], card: Any, adapter: str) -> list[GenerationRequest]:
    """The actions stage for each frame, greedy, under the grammar, as the server asks it."""
    requests = []
    for number, frame in enumerate(frames):
        subtask, plan = MOTIONS[number % len(MOTIONS)]
        stage = actions_stage(subtask, plan, card, 0.10)
        requests.append(
            GenerationRequest((frame,), stage.prompt, adapter, 0.0, 1.0, 0, stage.max_tokens, stage.grammar)
        )
    return requests


async def greedy_texts(engine: Engine, requests: Sequence[GenerationRequest]) -> list[str]:
    """The text of each request, a few at a time."""
    free = asyncio.Semaphore(AT_ONCE)

    async def one(request: GenerationRequest) -> str:
        async with free:
            return "".join([delta.text async for delta in engine.generate(request)])

    return list(await asyncio.gather(*(one(request) for request in requests)))


def gap_nat(model: HFModel, request: GenerationRequest, other: str) -> float:
    """Decode greedily until the text leaves `other`: how much likelier the chosen token is than the next allowed."""
    prompt = model.encode(request.images, request.conversation)
    assert request.grammar is not None
    constraint = GrammarCache(model.tokenizer, model.logit_width, model.stop_ids).constraint(request.grammar)
    text, said = Detokenizer(model.tokenizer, model.control_ids), ""
    with model.using(request.adapter):
        logits, cache, _ = model.prefill(prompt)
        for _ in range(request.max_tokens):
            best = torch.topk(torch.log_softmax(constraint.mask(logits.clone()), dim=-1), 2)
            token, gap = int(best.indices[0]), float(best.values[0] - best.values[1])
            said += text.push(token)
            if not other.startswith(said) or token in model.stop_ids:
                return gap
            constraint.accept(token)
            logits = model.step(token, cache)
    return float("inf")
