"""What one pre-training run of the twin's base model does; apart from the run, so that its help needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What one pre-training run does; stored beside the model.

    The tower alone learns for ``tower_steps``, then the whole model for ``steps`` on batches of ``batch`` conversations
    of ``turns`` questions, in which the tower's learning rate is ``tower_share`` of the others'. ``two_pictures`` and
    ``text_only`` are shares of the conversations; ``warmup`` is in steps.
    """

    tower_steps: int = 2500
    tower_batch: int = 64
    steps: int = 3500
    batch: int = 24
    turns: int = 5
    learning_rate: float = 1.5e-3
    tower_share: float = 0.3
    warmup: int = 100
    weight_decay: float = 0.02
    two_pictures: float = 0.06
    text_only: float = 0.04
    dense_weight: float = 1.0
    seed: int = 0
    threads: int = 2
