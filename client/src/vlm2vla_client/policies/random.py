"""Chance as a policy: valid rows with no idea behind them, the floor that a trained policy must beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlm2vla_client.policies.base import (
    Answered,
    Asked,
    CycleEvent,
    PlanArrived,
    PolicyInfo,
    RowArrived,
    Scenario,
    SubtasksAnswer,
)
from vlm2vla_schema.types import Frame

MAX_AXIS_M = 0.05
MAX_ROWS = 6


class RandomPolicy:
    """Takes the task as its only subtask and draws 1..6 rows a cycle, uniform within 5 cm an axis.

    Args:
        seed: the rows are a function of it.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def info(self) -> PolicyInfo:
        """Not trained to act: refused on a physical arm."""
        return PolicyInfo(name="random", trained_to_act=False)

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """The task itself."""
        return SubtasksAnswer([task])

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """One random chunk."""
        plan = asked.motion_plan or "move somewhere"
        yield PlanArrived(plan)
        rows = []
        for index in range(int(self._rng.integers(1, MAX_ROWS + 1))):
            moves = self._rng.uniform(-MAX_AXIS_M, MAX_AXIS_M, 3).round(3)
            rows.append([*(float(move) for move in moves), float(self._rng.integers(0, 2))])
            yield RowArrived(index, list(rows[-1]), asked.episode_id)
        yield Answered(rows, plan, asked.episode_id)

    def alive(self, timeout_s: float) -> bool:
        """Always there."""
        return True

    def close(self) -> None:
        """Nothing to free."""
