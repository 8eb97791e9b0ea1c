"""The tasks of appendix D.1 as data: instruction, start conditions, what counts, and how much.

A suite's scenes are functions of the seed alone. Mode ``varied`` moves everything within the ranges of the twin's
design; mode ``paper`` keeps what D.1 keeps invariant: the robot's start, and the poses of eggplant, pan and fish.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vlm2vla_twin.scene import CARDS, COUNTER_Z_M, KINDS, CardSpec, ObjectSpec, SceneSpec, resting, vary
from vlm2vla_twin.tasks import layout
from vlm2vla_twin.tasks.layout import Draw, Piece

Scenario = Literal["in_distribution", "out_of_distribution"]

CONDITIONS = ("under", "front", "side")
CARD_ITEMS = ("carrot", "eggplant")


@dataclass(frozen=True)
class Goal:
    """What physics has to show: ``place`` into ``target`` where both are given, then ``lift`` where it is given.

    None of the names may be missing from the scene; a goal whose object is absent can never be reached.
    """

    lift: str | None = None
    place: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class Suite:
    """One task of appendix D.1.

    Attributes:
        name: as given to ``--suite``.
        label: short name for plots, in the style of Fig. 5.
        scenario: sets the temperature of the subtasks stage (D.4).
        max_score: full score of the D.1 rubric.
        plan_counts: whether D.1 gives partial credit to planning policies only for a right plan (D.3).
        card: the one card that the instruction asks about; None lets the seed choose (``pick_above_picture`` only).
    """

    name: str
    label: str
    text: str
    scenario: Scenario
    max_score: int
    build: Callable[[Suite, int, str], SceneSpec]
    goal_of: Callable[[Suite, SceneSpec], Goal]
    plan_counts: bool = False
    card: str | None = None

    def instruction(self, seed: int) -> str:
        """What the robot is told in the trial of ``seed``."""
        return self.text.format(card=self.card_for(seed))

    def card_for(self, seed: int) -> str:
        """The card that the instruction of ``seed`` names, for suites that name one."""
        return self.card or CARDS[seed % len(CARDS)]

    def scene(self, seed: int, mode: str = "varied") -> SceneSpec:
        """The start condition of ``seed``; ``extra`` says which suite, mode and condition it is.

        Raises:
            ValueError: a mode that is neither ``varied`` nor ``paper``.
        """
        if mode not in ("varied", "paper"):
            raise ValueError(f"mode must be 'varied' or 'paper', received {mode!r}")
        return self.build(self, seed, mode)

    def goal(self, spec: SceneSpec) -> Goal:
        """What has to happen in ``spec``, which may also be another suite's scene."""
        return self.goal_of(self, spec)

    def keywords(self, spec: SceneSpec) -> tuple[str, ...]:
        """The things a plan must name (keys of :data:`~vlm2vla_twin.tasks.plans.KEYWORDS`)."""
        goal = self.goal(spec)
        return tuple(name for name in (goal.place, goal.target, goal.lift) if name is not None and name != "plate")


def _rng(stream: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(stream.encode()), seed])


def _compose(
    seed: int, mode: str, stream: str, names: list[str], draws: Callable[[SceneSpec, np.random.Generator], list[Draw]],
    **extra: str,
) -> SceneSpec:  # fmt: skip
    """Look first (light, camera, colours, start pose), then places, which may depend on the start pose."""
    rng = _rng(stream, seed)
    bare = SceneSpec(seed=seed, objects=tuple(resting(name, (0.0, 0.0)) for name in names))
    look = vary(bare, rng, move_start=mode == "varied")
    pieces = {piece.name: piece for piece in layout.arrange(rng, draws(look, rng))}
    return replace(
        look,
        objects=tuple(_put(item, pieces[item.name]) for item in look.objects),
        cards=tuple(
            CardSpec(name.removeprefix("card:"), (piece.x_m, piece.y_m))
            for name, piece in pieces.items()
            if piece.kind == "card"
        ),
        extra={"suite": stream, "mode": mode, **extra},
    )


def _put(item: ObjectSpec, piece: Piece) -> ObjectSpec:
    height_m = COUNTER_Z_M + KINDS[item.name].rest_z_m
    return replace(item, position_m=(piece.x_m, piece.y_m, height_m), yaw_rad=piece.yaw_rad)


def _pick_carrot(suite: Suite, seed: int, mode: str, distractors: tuple[str, ...] = ()) -> SceneSpec:
    condition = CONDITIONS[seed % 3]
    # One stream for the three languages: the same scenes, so that they can be compared trial by trial.
    stream = "pick_carrot_language" if distractors else suite.name

    def draws(look: SceneSpec, rng: np.random.Generator) -> list[Draw]:
        carrot = layout.by_gripper("carrot", condition, look.start_position_m[:2])
        return [carrot, *(layout.anywhere(name) for name in distractors)]

    return _compose(seed, mode, stream, ["carrot", *distractors], draws, condition=condition)


def _pick_carrot_language(suite: Suite, seed: int, mode: str) -> SceneSpec:
    return _pick_carrot(suite, seed, mode, ("banana", "eggplant"))


def _carrot_on_plate(suite: Suite, seed: int, mode: str) -> SceneSpec:
    condition = CONDITIONS[1 + seed % 2]

    def draws(look: SceneSpec, rng: np.random.Generator) -> list[Draw]:
        carrot = layout.by_gripper("carrot", condition, look.start_position_m[:2])
        return [carrot, layout.anywhere("plate", (0.22, 0.36), (-0.13, 0.15))]

    return _compose(seed, mode, suite.name, ["carrot", "plate"], draws, condition=condition)


_EGGPLANT = Piece("eggplant", 0.355, -0.130, 0.3)
_FISH = Piece("fish", 0.360, -0.055, 0.2)
_PAN = Piece("pan", 0.285, 0.120, 1.1)


def _eggplant_pan_fish(suite: Suite, seed: int, mode: str) -> SceneSpec:
    def beside(rng: np.random.Generator) -> list[Piece]:
        x, y = float(rng.uniform(0.33, 0.38)), float(rng.uniform(-0.075, -0.045))
        fish = Piece("fish", x, y, float(rng.uniform(0.0, 2 * np.pi)))
        right = Piece(
            "eggplant",
            float(np.clip(x + rng.uniform(-0.02, 0.02), 0.33, 0.38)),
            float(max(y - rng.uniform(0.065, 0.085), -0.150)),
            float(rng.uniform(0.0, 2 * np.pi)),
        )
        return [fish, right]

    def pan(rng: np.random.Generator) -> list[Piece]:
        x, y = float(rng.uniform(0.26, 0.32)), float(rng.uniform(0.10, 0.15))
        return [Piece("pan", x, y, float(rng.uniform(0.8, 1.4)))]

    def draws(look: SceneSpec, rng: np.random.Generator) -> list[Draw]:
        if mode == "paper":
            return [layout.fixed(piece) for piece in (_PAN, _FISH, _EGGPLANT)]
        return [pan, beside]

    return _compose(seed, mode, suite.name, ["eggplant", "pan", "fish"], draws)


def _pick_above_picture(suite: Suite, seed: int, mode: str) -> SceneSpec:
    """Card, side and item go through all their combinations every twenty seeds."""
    card = suite.card_for(seed)
    side = 1.0 if (seed // 5) % 2 == 0 else -1.0
    item = CARD_ITEMS[(seed // 10) % 2]
    other_item = CARD_ITEMS[1 - (seed // 10) % 2]

    def draws(look: SceneSpec, rng: np.random.Generator) -> list[Draw]:
        others = [name for name in CARDS if name != card]
        other_card = others[int(rng.integers(len(others)))]
        left, right = (0.055, 0.110), (-0.110, -0.055)
        mine, theirs = (left, right) if side > 0 else (right, left)
        return [
            layout.card_with_item(card, item, (0.22, 0.295), mine),
            layout.card_with_item(other_card, other_item, (0.22, 0.295), theirs),
        ]

    extra = {"card": card, "side": "left" if side > 0 else "right", "item": item}
    return _compose(seed, mode, suite.name, [item, other_item], draws, **extra)


def kitchen_scene(seed: int) -> SceneSpec:
    """The kitchen with everything in it, for tasks that match no suite: all objects, and two cards with items above."""
    order = _rng("kitchen cards", seed)
    cards = [str(name) for name in order.permutation(CARDS)[:2]]
    above = [str(name) for name in order.permutation([name for name in KINDS if KINDS[name].graspable])]

    def pan(rng: np.random.Generator) -> list[Piece]:
        x, y = float(rng.uniform(0.33, 0.39)), float(rng.uniform(0.13, 0.17))
        return [Piece("pan", x, y, float(rng.uniform(0.8, 1.8)))]

    def draws(look: SceneSpec, rng: np.random.Generator) -> list[Draw]:
        return [
            pan,
            layout.anywhere("plate", (0.22, 0.38), (-0.14, 0.10)),
            layout.card_with_item(cards[0], above[0], (0.21, 0.30), (-0.14, 0.15)),
            layout.card_with_item(cards[1], above[1], (0.21, 0.30), (-0.14, 0.15)),
            layout.anywhere(above[2], (0.20, 0.40), (-0.15, 0.18)),
            layout.anywhere(above[3], (0.20, 0.40), (-0.15, 0.18)),
        ]

    return _compose(seed, "varied", "kitchen", list(KINDS), draws)


def item_above(spec: SceneSpec, card: str) -> str | None:
    """The object that stands a few centimetres further along +x than ``card``; None without card or object."""
    x, y = next((item.xy_m for item in spec.cards if item.name == card), (None, None))
    if x is None or y is None:
        return None
    near = [
        (abs(item.position_m[1] - y), item.name)
        for item in spec.objects
        if KINDS[item.name].graspable and 0.02 < item.position_m[0] - x < 0.10 and abs(item.position_m[1] - y) < 0.045
    ]
    return min(near)[1] if near else None


def _lift_carrot(suite: Suite, spec: SceneSpec) -> Goal:
    return Goal(lift="carrot")


def _lift_above(suite: Suite, spec: SceneSpec) -> Goal:
    return Goal(lift=item_above(spec, suite.card_for(spec.seed)))


def _suites() -> dict[str, Suite]:
    inside: Scenario = "in_distribution"
    outside: Scenario = "out_of_distribution"
    languages = {"es": "recoge la zanahoria", "zh": "拿起胡萝卜", "hi": "गाजर उठाओ"}
    suites = [
        Suite("pick_carrot", "Pick Up", "pick up the carrot", inside, 2, _pick_carrot, _lift_carrot),
        Suite(
            "carrot_on_plate", "Pick and Place", "put the carrot on the yellow plate", inside, 2, _carrot_on_plate,
            lambda suite, spec: Goal(place="carrot", target="plate"),
        ),
        Suite(
            "eggplant_pan_fish", "Pick, Place, and Lift", "put the eggplant in the pan, then lift the fish", outside, 5,
            _eggplant_pan_fish, lambda suite, spec: Goal(place="eggplant", target="pan", lift="fish"), plan_counts=True,
        ),
        *(
            Suite(
                f"pick_carrot_{code}", f"Pick Up - T ({code})", text, outside, 2, _pick_carrot_language, _lift_carrot,
                plan_counts=True,
            )
            for code, text in languages.items()
        ),
        Suite(
            "pick_above_picture", "Pick Up - A", "pick up the item above the {card}", outside, 2, _pick_above_picture,
            _lift_above, plan_counts=True,
        ),
    ]  # fmt: skip
    return {suite.name: suite for suite in suites}


SUITES: dict[str, Suite] = _suites()


def match_task(text: str) -> Suite | None:
    """The suite whose instruction ``text`` is, whatever its case and spaces; None when no suite asks that.

    An instruction that names a card gives the suite with that card fixed, so that its scenes hold the card at any seed.
    """
    wanted = _canonical(text)
    for suite in SUITES.values():
        if "{card}" not in suite.text:
            if _canonical(suite.text) == wanted:
                return suite
            continue
        for card in CARDS:
            if _canonical(suite.text.format(card=card)) == wanted:
                return replace(suite, card=card)
    return None


def _canonical(text: str) -> str:
    return " ".join(text.casefold().split())
