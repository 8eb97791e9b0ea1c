"""The control with the wrong picture: every image is another seed's, so that success must come from looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.policies.base import Asked, CycleEvent, Policy, PolicyInfo, Scenario, SubtasksAnswer
from vlm2vla_schema.types import Frame


class SwappedPolicy:
    """Asks another policy, showing it a picture from elsewhere under the true frame's id and time.

    Args:
        policy: who answers; closed with this one.
        other_image: gives the picture to show instead, uint8 [H, W, 3].
    """

    name = "swapped"

    def __init__(self, policy: Policy, other_image: Callable[[], NDArray[np.uint8]]) -> None:
        self._policy = policy
        self._other_image = other_image

    def _swap(self, frame: Frame) -> Frame:
        return replace(frame, image=self._other_image())

    def info(self) -> PolicyInfo:
        """The inner policy's, under the name ``swapped(...)``."""
        info = self._policy.info()
        return replace(info, name=f"swapped({info.name})")

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """The inner policy's answer to the wrong picture."""
        return self._policy.subtasks(self._swap(frame), task, scenario, asked)

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """The inner policy's answer to the wrong picture."""
        return self._policy.cycle(self._swap(frame), subtask, asked)

    def alive(self, timeout_s: float) -> bool:
        """The inner policy's."""
        return self._policy.alive(timeout_s)

    def close(self) -> None:
        """Closes the inner policy."""
        self._policy.close()
