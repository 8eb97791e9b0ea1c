"""What one pre-training run of the twin's base model does; apart from the run, so that its help needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What one pre-training run does; stored beside the model.

    The tower alone learns for ``tower_steps`` at ``tower_learning_rate``, then the whole model for ``steps`` on batches
    of ``batch`` conversations of ``turns`` questions, in which the tower's learning rate is ``tower_share`` of the
    others'. ``text_rows`` of a batch hold no picture and ``double_rows`` two, always as many, so that shapes repeat;
    ``warmup`` is in steps. ``compile`` fuses the layers: a third less time a step, needs a C++ compiler.
    """

    tower_steps: int = 3000
    tower_batch: int = 64
    steps: int = 8000
    batch: int = 24
    turns: int = 5
    learning_rate: float = 2e-3
    tower_learning_rate: float = 3e-3
    tower_share: float = 0.3
    warmup: int = 100
    weight_decay: float = 0.02
    double_rows: int = 3
    text_rows: int = 1
    dense_weight: float = 1.0
    seed: int = 0
    threads: int = 2
    compile: bool = False
