"""Proof that an adapter is active, before the server says it is ready.

An adapter whose names match nothing answers exactly as the base does, without any error. So, over eight fixed
prompts, the base's own greedy answer is scored under base and adapter: the log-probabilities must differ by at least
MIN_MEAN_DIFFERENCE_NAT on average. The pictures are drawn here from arithmetic, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema import prompts
from vlm2vla_server.engines.base import Engine, GenerationRequest, ScoreRequest

MIN_MEAN_DIFFERENCE_NAT = 1e-3
ANSWER_TOKENS = 12
PROOF_PROMPTS: tuple[str, ...] = (
    prompts.subtasks_prompt("pick up the carrot"),
    prompts.subtasks_prompt("put the carrot on the yellow plate"),
    prompts.motion_plan_prompt("Move to the carrot"),
    prompts.motion_plan_prompt("Lift the carrot"),
    prompts.actions_prompt("Move to the carrot", "Move forward and down to the carrot."),
    prompts.actions_prompt("Grasp the carrot", "Close the gripper around the carrot."),
    prompts.actions_prompt("Lift the carrot", None),
    prompts.actions_prompt("Move to the plate", "Move left, slightly forward, and up."),
)


@dataclass(frozen=True)
class Proof:
    """Result for one adapter: mean absolute difference of log-probabilities from the base, in nat, per token."""

    adapter: str
    mean_difference_nat: float

    @property
    def problem(self) -> str | None:
        """None when the adapter is active; otherwise what was measured and what was expected."""
        if self.mean_difference_nat >= MIN_MEAN_DIFFERENCE_NAT:
            return None
        return (
            f"adapter {self.adapter!r} does not change the model: its log-probabilities differ from the base's by "
            f"{self.mean_difference_nat:.2e} nat on average over {len(PROOF_PROMPTS)} prompts, expected at least "
            f"{MIN_MEAN_DIFFERENCE_NAT:g}; was it exported for this base?"
        )


def proof_image(index: int, size: int) -> NDArray[np.uint8]:
    """A picture uint8 [size, size, 3]: two slopes and a block whose place depends on `index`."""
    rows, columns = np.mgrid[0:size, 0:size]
    image = np.zeros((size, size, 3), dtype=np.uint8)
    image[..., 0] = rows * 255 // max(1, size - 1)
    image[..., 1] = columns * 255 // max(1, size - 1)
    image[..., 2] = 40 + 20 * index
    edge = max(1, size // 4)
    corner = (index * 37) % max(1, size - edge)
    image[corner : corner + edge, size - edge - corner : size - corner] = (240, 130, 20)
    return image


async def prove(engine: Engine, adapters: Sequence[str], image_size: int) -> dict[str, Proof]:
    """Measure every adapter against the base. Raises what the engine raises."""
    totals = dict.fromkeys(adapters, 0.0)
    for index, prompt in enumerate(PROOF_PROMPTS):
        images = (proof_image(index, image_size),)
        answer = await _greedy(engine, images, prompt)
        base = await engine.score(ScoreRequest(images, prompt, answer, None))
        for name in adapters:
            adapted = await engine.score(ScoreRequest(images, prompt, answer, name))
            totals[name] += float(np.mean(np.abs(np.subtract(adapted, base))))
    return {name: Proof(name, total / len(PROOF_PROMPTS)) for name, total in totals.items()}


async def _greedy(engine: Engine, images: tuple[NDArray[np.uint8], ...], prompt: str) -> str:
    request = GenerationRequest(
        images=images, prompt=prompt, adapter=None, temperature=0.0, top_p=1.0, seed=0, max_tokens=ANSWER_TOKENS
    )
    return "".join([delta.text async for delta in engine.generate(request)])
