"""Eight fixed prompts and pictures by which an adapter, or a model that holds one, is proven active, and how far off it
may be.

`export` measures log-probabilities on them where the adapter was made; a server measures them again before it becomes
ready. The pictures are drawn from arithmetic, the same on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema import prompts

PROBE_PROMPTS: tuple[str, ...] = (
    prompts.subtasks_prompt("pick up the carrot"),
    prompts.subtasks_prompt("put the carrot on the yellow plate"),
    prompts.motion_plan_prompt("Move to the carrot"),
    prompts.motion_plan_prompt("Lift the carrot"),
    prompts.actions_prompt("Move to the carrot", "Move forward and down to the carrot."),
    prompts.actions_prompt("Grasp the carrot", "Close the gripper around the carrot."),
    prompts.actions_prompt("Lift the carrot", None),
    prompts.actions_prompt("Move to the plate", "Move left, slightly forward, and up."),
)

TOLERANCE_NAT = {"float32": 0.02, "bfloat16": 0.1, "float16": 0.1}
QUANTISED_TOLERANCE_NAT = 0.3
"""fp8 and fewer bits: any dtype that TOLERANCE_NAT does not name."""
CLOSER_THAN_BASE = 3.0
"""So many times closer to the references than the untouched base must be what counts as active."""


def tolerance_nat(dtype: str) -> float:
    """How far from the references a computation in this dtype may be: mean absolute difference of a probe, in nat."""
    return TOLERANCE_NAT.get(dtype, QUANTISED_TOLERANCE_NAT)


def probe_image(index: int, size: int) -> NDArray[np.uint8]:
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
