"""Scenes and instructions to demonstrate in, one function a suite.

Training scenes hold no picture cards and their instructions are English: what the evaluation asks beyond that must come
from the base model (twin.md, "Model").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm2vla_training.errors import UsageError
from vlm2vla_twin.scene import KINDS, ObjectSpec, SceneSpec, resting, vary
from vlm2vla_twin.skills import SPOKEN, Goal

GRASPABLE = tuple(name for name, kind in KINDS.items() if kind.graspable)
_X_M, _Y_M = (0.20, 0.38), (-0.15, 0.15)
_CLEARANCE_M = {"plate": 0.075, "pan": 0.09}
_OBJECT_CLEARANCE_M = 0.035
_TRIES = 20_000


@dataclass(frozen=True)
class DemoTask:
    """One demonstration to record."""

    instruction: str
    goals: tuple[Goal, ...]
    spec: SceneSpec


def demo_task(suite: str, seed: int, mode: str) -> DemoTask:
    """Build the task of one seed.

    Raises:
        UsageError: an unknown suite, or a seed that is not a training seed.
    """
    if not 0 <= seed < 500_000:
        raise UsageError(f"seed {seed} is not a training seed (0..499999)")
    if suite not in SUITES:
        raise UsageError(f"unknown suite {suite!r}; demos knows {', '.join(sorted(SUITES))}")
    random = np.random.default_rng([seed, sorted(SUITES).index(suite)])
    task = SUITES[suite](random, seed)
    if mode == "paper":
        return task
    return DemoTask(task.instruction, task.goals, vary(task.spec, random))


def _pick(random: np.random.Generator, seed: int, name: str, distractors: int) -> DemoTask:
    others = [str(other) for other in random.permutation([k for k in KINDS if k != name])[:distractors]]
    spec = SceneSpec(seed=seed, objects=_place_all(random, [name, *others], under=True))
    verb = str(random.choice(["pick up", "pick up", "lift"]))
    return DemoTask(f"{verb} the {name}", (Goal(name, None),), spec)


def _place(random: np.random.Generator, seed: int, name: str, target: str, distractors: int) -> DemoTask:
    others = [str(other) for other in random.permutation([k for k in KINDS if k not in (name, target)])[:distractors]]
    spec = SceneSpec(seed=seed, objects=_place_all(random, [target, name, *others], under=False))
    preposition = "in" if target == "pan" else "on"
    verb = str(random.choice(["put", "put", "place"]))
    instruction = f"{verb} the {name} {preposition} the {SPOKEN[target]}"
    return DemoTask(instruction, (Goal(name, target),), spec)


def _pick_any(random: np.random.Generator, seed: int) -> DemoTask:
    return _pick(random, seed, str(random.choice(GRASPABLE)), int(random.integers(0, 4)))


def _pick_carrot(random: np.random.Generator, seed: int) -> DemoTask:
    return _pick(random, seed, "carrot", 0)


def _place_any(random: np.random.Generator, seed: int) -> DemoTask:
    name, target = str(random.choice(GRASPABLE)), str(random.choice(["plate", "pan"]))
    return _place(random, seed, name, target, int(random.integers(0, 3)))


def _carrot_on_plate(random: np.random.Generator, seed: int) -> DemoTask:
    return _place(random, seed, "carrot", "plate", 0)


def _then(random: np.random.Generator, seed: int) -> DemoTask:
    """Two handlings in one instruction; the evaluated combination (eggplant, pan, fish) is left out."""
    while True:
        first, second = (str(name) for name in random.permutation(GRASPABLE)[:2])
        target = str(random.choice(["plate", "pan"]))
        if (first, target, second) != ("eggplant", "pan", "fish"):
            break
    spec = SceneSpec(seed=seed, objects=_place_all(random, [target, first, second], under=False))
    preposition = "in" if target == "pan" else "on"
    verb = str(random.choice(["lift", "pick up"]))
    instruction = f"put the {first} {preposition} the {SPOKEN[target]}, then {verb} the {second}"
    return DemoTask(instruction, (Goal(first, target), Goal(second, None)), spec)


def _place_all(random: np.random.Generator, names: list[str], under: bool) -> tuple[ObjectSpec, ...]:
    """Random poses without overlap; the object to take is by thirds under, before, or beside the gripper."""
    for _ in range(_TRIES):
        placed: list[tuple[str, float, float]] = []
        wanted = next(name for name in names if name in GRASPABLE)
        for name in names:
            x, y = _xy(random, int(random.integers(0 if under else 1, 3)) if name == wanted else 3)
            if any(np.hypot(x - px, y - py) < _reach(name) + _reach(other) for other, px, py in placed):
                break
            placed.append((name, x, y))
        else:
            return tuple(resting(name, (x, y), float(random.uniform(0, 2 * np.pi))) for name, x, y in placed)
    raise UsageError(f"no room for {names}: {_TRIES} random layouts overlapped")


def _xy(random: np.random.Generator, region: int) -> tuple[float, float]:
    if region == 0:
        return float(random.uniform(0.28, 0.32)), float(random.uniform(-0.02, 0.02))
    if region == 1:
        return float(random.uniform(0.31, _X_M[1])), float(random.uniform(-0.03, 0.03))
    return float(random.uniform(*_X_M)), float(random.uniform(*_Y_M))


def _reach(name: str) -> float:
    return _CLEARANCE_M.get(name, _OBJECT_CLEARANCE_M)


SUITES: dict[str, Callable[[np.random.Generator, int], DemoTask]] = {
    "pick_carrot": _pick_carrot,
    "carrot_on_plate": _carrot_on_plate,
    "pick_any": _pick_any,
    "place_any": _place_any,
    "then": _then,
}
