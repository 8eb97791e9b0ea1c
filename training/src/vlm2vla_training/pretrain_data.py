"""Pictures and questions for the twin's base model: vision-language skill, and no robot action anywhere.

A picture is a random still of the toy kitchen; its :class:`~vlm2vla_twin.truth.Truth` answers any number of
questions, so the text is made afresh in every epoch. Seeds stay below 500,000 (training); the same functions with
later seeds give held-out sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema import images, prompts
from vlm2vla_schema.directions import NAMES as WORDS
from vlm2vla_schema.directions import direction_words, join_words
from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import UnreachableError, World
from vlm2vla_twin.scene import CARDS, FINGER_OPEN_M, KINDS, CardSpec, ObjectSpec, SceneSpec, resting, vary
from vlm2vla_twin.truth import ALIGNED_M, HOVER_RANGE_M, LIFTED_M, Truth, observe

IMAGE_SIZE = 112
HOVER_M = 0.07
GRASP_M = 0.010
GRASPABLE = tuple(name for name, kind in KINDS.items() if kind.graspable)

NAMES: dict[str, tuple[str, str, str, str]] = {
    "carrot": ("carrot", "zanahoria", "胡萝卜", "गाजर"),
    "eggplant": ("eggplant", "berenjena", "茄子", "बैंगन"),
    "banana": ("banana", "plátano", "香蕉", "केला"),
    "fish": ("fish", "pez", "鱼", "मछली"),
    "plate": ("yellow plate", "plato amarillo", "黄盘子", "पीली थाली"),
    "pan": ("pan", "sartén", "平底锅", "कड़ाही"),
}
"""English, Spanish, Mandarin, Hindi."""
COLOURS = {
    "carrot": "orange", "eggplant": "purple", "banana": "yellow", "fish": "blue", "plate": "yellow", "pan": "black",
}  # fmt: skip
VERBS = {
    "pick up": ("pick up the {}", "recoge la {}", "拿起{}", "{} उठाओ"),
    "where": ("where is the {}?", "¿dónde está {}?", "{}在哪里?", "{} कहाँ है?"),
}


# --- pictures ---------------------------------------------------------------------------------------------------------


def random_scene(seed: int) -> tuple[SceneSpec, str | None]:
    """A random still: one to six things, up to two cards, the gripper anywhere, it may hold what is returned second."""
    rng = np.random.default_rng([7, seed])
    chosen: list[str] = []
    weights = np.array([0.30, 0.18, 0.14, 0.14, 0.14, 0.10])
    for name in rng.choice(list(KINDS), size=int(rng.integers(1, 7)), replace=False, p=weights):
        chosen.append(str(name))
    taken: list[tuple[float, float, float]] = []
    objects = [spec for name in chosen if (spec := _free_spot(name, rng, taken)) is not None]
    cards = []
    for name in rng.choice(CARDS, size=int(rng.choice([0, 1, 2], p=[0.5, 0.2, 0.3])), replace=False):
        spot = _free_xy(rng, taken, 0.035, (0.17, 0.36))
        if spot is None:
            continue
        cards.append(CardSpec(str(name), spot))
        above = [i for i, item in enumerate(objects) if item.name in GRASPABLE]
        if above and rng.random() < 0.7:
            index = int(rng.choice(above))
            x, y = spot[0] + float(rng.uniform(0.05, 0.075)), spot[1] + float(rng.uniform(-0.02, 0.02))
            if all(np.hypot(x - a, y - b) > 0.03 + r for a, b, r in taken if (a, b) != (spot[0], spot[1])):
                objects[index] = resting(objects[index].name, (x, y), objects[index].yaw_rad)
                taken.append((x, y, 0.03))
    gripper, held = _gripper(rng, objects)
    if held is not None:
        objects = [ObjectSpec(item.name, gripper, item.yaw_rad) if item.name == held else item for item in objects]
    scene = SceneSpec(
        seed, tuple(objects), tuple(cards), start_position_m=gripper,
        start_gripper_open=held is None and bool(rng.random() < 0.85),
    )  # fmt: skip
    return vary(scene, rng, move_start=False), held


def _free_xy(
    rng: np.random.Generator, taken: list[tuple[float, float, float]], radius: float, x_range: tuple[float, float]
) -> tuple[float, float] | None:
    for _ in range(20):
        x, y = float(rng.uniform(*x_range)), float(rng.uniform(-0.19, 0.21))
        if all(np.hypot(x - a, y - b) > radius + r for a, b, r in taken):
            taken.append((x, y, radius))
            return x, y
    return None


def _free_spot(name: str, rng: np.random.Generator, taken: list[tuple[float, float, float]]) -> ObjectSpec | None:
    radius = {"plate": 0.065, "pan": 0.078}.get(name, 0.028)
    spot = _free_xy(rng, taken, radius, (0.17, 0.42) if radius < 0.05 else (0.24, 0.42))
    return None if spot is None else resting(name, spot, float(rng.uniform(0.0, 2 * np.pi)))


def _gripper(rng: np.random.Generator, objects: list[ObjectSpec]) -> tuple[tuple[float, float, float], str | None]:
    """Where the gripper is: at the start pose, anywhere, close above an object, down around one, or holding one.

    More than half of what it holds still lies on the counter: whether the fingers are open or closed around a thing is
    a matter of a few pixels, and a verifier has to see it.
    """
    graspable = [item for item in objects if item.name in GRASPABLE]
    mode = rng.random()
    if mode < 0.20 or not graspable:
        x, y, z = np.array([0.30, 0.0, 0.15]) + rng.uniform(-0.015, 0.015, 3)
    elif mode < 0.40:
        x, y, z = rng.uniform(0.18, 0.42), rng.uniform(-0.18, 0.19), rng.uniform(0.055, 0.22)
    elif mode < 0.65:
        item = graspable[int(rng.integers(len(graspable)))]
        spread = float(rng.choice([0.008, 0.02, 0.04]))
        x, y = np.asarray(item.position_m[:2]) + rng.normal(0.0, spread, 2)
        z = rng.uniform(0.05, 0.10)
    elif mode < 0.78:
        item = graspable[int(rng.integers(len(graspable)))]
        x, y = np.asarray(item.position_m[:2]) + rng.normal(0.0, 0.006, 2)
        z = rng.uniform(0.008, 0.05)
    else:
        item = graspable[int(rng.integers(len(graspable)))]
        x, y, z = rng.uniform(0.18, 0.42), rng.uniform(-0.18, 0.19), rng.uniform(0.012, 0.20)
        if rng.random() < 0.55:
            z = rng.uniform(0.008, 0.016)
        return (float(x), float(y), float(z)), item.name
    return (float(np.clip(x, 0.16, 0.43)), float(np.clip(y, -0.20, 0.22)), float(z)), None


def still(seed: int) -> tuple[NDArray[np.uint8], Truth] | None:
    """The picture of one seed, uint8 [112, 112, 3], and its truth; None for an empty counter or an arm out of reach."""
    spec, held = random_scene(seed)
    if not spec.objects:
        return None
    try:
        world = World(spec, settle_s=0.0)
    except UnreachableError:
        return None
    if held is not None:
        width = {"eggplant": 0.022}.get(held, 0.0205 if held != "banana" else 0.019)
        world.set_arm(spec.start_position_m, gripper_m=width)
        x, y, z = spec.start_position_m
        world.place(held, (x, y, z + KINDS[held].rest_z_m - GRASP_M), spec.object(held).yaw_rad)
    elif spec.start_gripper_open:
        world.set_arm(spec.start_position_m, gripper_m=FINGER_OPEN_M)
    truth = observe(world)
    picture = images.to_model_square(Camera(world).rgb(), IMAGE_SIZE)
    return picture, Truth(**{**truth.__dict__, "held": held})


def _shard(job: tuple[int, int, str]) -> str:
    first, count, folder = job
    path = Path(folder) / f"stills-{first:07d}.npz"
    if not _holds(path, count):
        kept = [pair for seed in range(first, first + count) if (pair := still(seed)) is not None]
        part = path.with_suffix(".part.npz")
        np.savez(
            part,
            pictures=np.array([picture for picture, _ in kept], np.uint8).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3),
            truths=np.array([json.dumps(truth.as_dict()) for _, truth in kept], np.str_),
            seeds=np.array([first, count]),
        )
        part.replace(path)
    return str(path)


def _holds(path: Path, count: int) -> bool:
    """Whether a shard exists and is not the shorter last one of an earlier, smaller rendering."""
    if not path.exists():
        return False
    with np.load(path) as shard:
        return "seeds" not in shard or int(shard["seeds"][1]) >= count


def render(folder: Path, first_seed: int, count: int, workers: int = 1, shard: int = 1000) -> Iterator[Path]:
    """Render stills of seeds ``first_seed ..`` into shards, skipping those that exist; yields each shard's path."""
    folder.mkdir(parents=True, exist_ok=True)
    end = first_seed + count
    jobs = [(seed, min(shard, end - seed), str(folder)) for seed in range(first_seed, end, shard)]
    if workers <= 1:
        yield from (Path(_shard(job)) for job in jobs)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from (Path(path) for path in pool.imap(_shard, jobs))


# --- questions --------------------------------------------------------------------------------------------------------

Pair = tuple[str, str]


def _centimetres(delta: tuple[float, ...]) -> str:
    return ", ".join(f"{abs(v) * 100:.1f} cm {w[0] if v >= 0 else w[1]}" for v, w in zip(delta, WORDS, strict=False))


def list_m(delta: tuple[float, ...]) -> str:
    """Metres to the millimetre, written as numbers are in B.2: at least one decimal, no trailing zeros, no ``-0.0``."""
    return "[" + ", ".join(str(round(value, 3) + 0.0) for value in delta) + "]"


def _thing(name: str, rng: np.random.Generator) -> str:
    """What to call a thing: mostly English, in small letters or Title Case, sometimes one of the other languages."""
    english = f"{name} card" if name in CARDS else NAMES[name][0]
    if name not in CARDS and rng.random() < 0.2:
        return NAMES[name][int(rng.integers(1, 4))]
    return english.title() if rng.random() < 0.35 else english


def _any(truth: Truth, rng: np.random.Generator) -> str:
    """A thing in the picture, graspable ones and cards more often than furniture."""
    things = [*truth.objects, *truth.cards]
    weights = np.array([1.0 if name in CARDS or not KINDS[name].graspable else 2.0 for name in things])
    return str(rng.choice(things, p=weights / weights.sum()))


def q_offset_cm(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """How far a thing is from the gripper, in centimetres and directional words."""
    name = _any(truth, rng)
    return f"How far is the {_thing(name, rng)} from the gripper?", _centimetres(truth.offset(name))


def q_offset_m(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """The displacement from the gripper to a thing's centre, as a list of metres."""
    name = _any(truth, rng)
    return f"Offset in metres from the gripper to the {_thing(name, rng)}?", list_m(truth.offset(name))


def q_above_m(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """The displacement from the gripper to the point at hover height above a thing, as a list of metres."""
    name = _any(truth, rng)
    dx, dy, _ = truth.offset(name)
    question = f"Offset in metres from the gripper to the point above the {_thing(name, rng)}?"
    return question, list_m((dx, dy, HOVER_M - truth.gripper_m[2]))


def q_way(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Which way a thing, or the point above it, lies from the gripper: words with words of degree."""
    name = _any(truth, rng)
    above = rng.random() < 0.5
    dx, dy, dz = truth.offset(name)
    delta = (dx, dy, HOVER_M - truth.gripper_m[2] if above else dz)
    question = f"Which way is the {'point above the ' if above else ''}{_thing(name, rng)} from the gripper?"
    return question, join_words(direction_words(delta))


def q_where(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Where a thing stands in the base frame, forward and left in centimetres."""
    name = _any(truth, rng)
    return f"Where is the {_thing(name, rng)}?", _centimetres(truth.position(name)[:2])


def q_gripper(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Where the gripper is, or how high."""
    if rng.random() < 0.5:
        return "Where is the gripper?", _centimetres(truth.gripper_m)
    return "How high is the gripper?", f"{truth.gripper_m[2] * 100:.1f} cm"


def q_held(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Whether the gripper is open, or what it holds."""
    if rng.random() < 0.4:
        return "Is the gripper open or closed?", "open" if truth.gripper_fraction > 0.8 else "closed"
    return "What is the gripper holding?", "nothing" if truth.held is None else f"the {NAMES[truth.held][0]}"


def q_state(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Yes or no: is the gripper right above a thing, is a thing in the gripper, is it lifted?"""
    gripper = np.asarray(truth.gripper_m)
    aside = {name: float(np.hypot(*(np.asarray(place[:2]) - gripper[:2]))) for name, place in truth.objects.items()}
    near = [name for name, distance in aside.items() if distance < 0.05]
    name = str(rng.choice(near if near and rng.random() < 0.8 else list(aside)))
    called, kind = _thing(name, rng), rng.random()
    if kind < 0.4:
        right = aside[name] <= ALIGNED_M and HOVER_RANGE_M[0] <= gripper[2] <= HOVER_RANGE_M[1]
        return f"Is the gripper right above the {called}?", "yes" if right else "no"
    if kind < 0.8:
        # Held means closed around, on the counter or above it.
        return f"Is the {called} in the gripper?", "yes" if truth.held == name else "no"
    lifted = truth.held == name and truth.objects[name][2] >= KINDS[name].rest_z_m + LIFTED_M
    return f"Is the {called} lifted?", "yes" if lifted else "no"


def q_change(before: Truth, after: Truth, rng: np.random.Generator) -> Pair:
    """Yes or no about two pictures: which way the gripper moved, whether something was taken or let go."""
    moved = np.asarray(after.gripper_m) - np.asarray(before.gripper_m)
    if rng.random() < 0.5:
        axis = int(rng.integers(3))
        positive, negative = WORDS[axis]
        forth = bool(rng.random() < 0.5)
        answer = moved[axis] > 0.0 if forth else moved[axis] < 0.0
        return f"Did the gripper move {positive if forth else negative}?", "yes" if answer else "no"
    if rng.random() < 0.5:
        taken = before.held is None and after.held is not None
        return "Did the gripper take something?", "yes" if taken else "no"
    let_go = before.held is not None and after.held is None
    return "Did the gripper let something go?", "yes" if let_go else "no"


def q_there(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Whether a thing of any kind is in the picture at all."""
    name = str(rng.choice([*KINDS, *CARDS]))
    there = name in truth.objects or name in truth.cards
    return f"Is there a {_thing(name, rng)} in the picture?", "yes" if there else "no"


def q_list(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """What is in the picture, or how many objects."""
    cards = [f"{name} card" for name in CARDS if name in truth.cards]
    names = [NAMES[name][0] for name in KINDS if name in truth.objects] + cards
    if rng.random() < 0.4:
        return "How many objects are on the counter, cards not counted?", str(len(truth.objects))
    return "What is in the picture?", "a " + ", a ".join(names)


def q_compare(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Which of two things is further left, further forward or nearer; None when there is only one."""
    things = [*truth.objects, *truth.cards]
    if len(things) < 2:
        return None
    one, two = (str(name) for name in rng.choice(things, 2, replace=False))
    a, b = truth.position(one), truth.position(two)
    kind = int(rng.integers(3))
    if kind == 0:
        return f"Is the {_thing(one, rng)} left of the {_thing(two, rng)}?", "yes" if a[1] > b[1] else "no"
    if kind == 1:
        return f"Is the {_thing(one, rng)} further forward than the {_thing(two, rng)}?", "yes" if a[0] > b[0] else "no"
    g = truth.gripper_m
    nearer = one if np.hypot(a[0] - g[0], a[1] - g[1]) < np.hypot(b[0] - g[0], b[1] - g[1]) else two
    label = f"{nearer} card" if nearer in CARDS else NAMES[nearer][0]
    return f"Which is nearer to the gripper, the {_thing(one, rng)} or the {_thing(two, rng)}?", f"the {label}"


def q_colour(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """The usual colour of a kind of thing, in the picture or not."""
    name = str(rng.choice(list(KINDS)))
    return f"What colour is the {_thing(name, rng)}?", COLOURS[name]


def q_translate(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """A name or a short instruction of another language, in English."""
    name, language = str(rng.choice(list(KINDS))), int(rng.integers(1, 4))
    if rng.random() < 0.5:
        return f"What is '{NAMES[name][language]}' in English?", NAMES[name][0]
    verb = VERBS[str(rng.choice(list(VERBS)))]
    foreign, english = verb[language].format(NAMES[name][language]), verb[0].format(NAMES[name][0])
    return f"Translate into English: '{foreign}'", english


def q_card(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Which item is above a card, or which cards lie there; None without cards."""
    if not truth.cards:
        return None
    card = str(rng.choice(list(truth.cards)))
    above = truth.above_card(card)
    if above is not None and rng.random() < 0.7:
        return f"Which item is above the {card}?", NAMES[above][0]
    return "Which pictures lie on the counter?", ", ".join(name for name in CARDS if name in truth.cards)


QUESTIONS: tuple[tuple[Callable[[Truth, np.random.Generator], Pair | None], float], ...] = (
    (q_offset_cm, 1.0),
    (q_offset_m, 2.5),
    (q_above_m, 4.0),
    (q_way, 1.5),
    (q_where, 1.0),
    (q_gripper, 1.2),
    (q_held, 1.5),
    (q_state, 3.0),
    (q_there, 0.5),
    (q_list, 0.5),
    (q_compare, 0.6),
    (q_colour, 0.2),
    (q_translate, 0.6),
    (q_card, 1.2),
)
"""How often each kind is asked, relative to the others."""


def user_text(rng: np.random.Generator) -> str:
    """A text without a picture: one of the paper's prompts about some subtask, for the embeddings of their words.

    No answer follows: the base never sees a plan, a subtask list as an answer, or an action.
    """
    one, two = (str(name) for name in rng.choice([NAMES[name][0].title() for name in KINDS], 2, replace=False))
    verbs = ["Move to {a}", "Grasp {a}", "Lift {a}", "Move {a} to {b}", "Lower {a} to {b}", "Release {a}"]
    verb = str(rng.choice(verbs))
    subtask = verb.format(a=one, b=two)
    kind = int(rng.integers(5))
    if kind == 0:
        task = str(rng.choice(["pick up the {}", "put the {} down", "lift the {}"]))
        return prompts.subtasks_prompt(task.format(one.lower()))
    if kind == 1:
        return prompts.motion_plan_prompt(subtask)
    if kind == 2:
        words = [str(rng.choice(["far ", "slightly ", "very slightly ", ""])) + str(rng.choice(pair)) for pair in WORDS]
        plan = f"Move {join_words(words)}, gripper stays {rng.choice(['open', 'closed'])}."
        return prompts.actions_prompt(subtask, plan)
    if kind == 3:
        return prompts.verify_prompt(subtask, f"Grasp {two}" if rng.random() < 0.7 else None)
    return prompts.completion_prompt(subtask) if rng.random() < 0.5 else prompts.direction_prompt(subtask)


def conversation(
    truth: Truth, rng: np.random.Generator, turns: int = 7, before: Truth | None = None
) -> list[Pair]:
    """``turns`` questions about one picture with their answers, in random order and of random kinds.

    With ``before``, an earlier picture, half of them are about what has changed since.

    Kinds may repeat (about other things); none has a fixed place, so that no answer can lean on an earlier one.
    """
    weights = np.array([weight for _, weight in QUESTIONS])
    pairs: list[Pair] = []
    while len(pairs) < turns:
        if before is not None and rng.random() < 0.5:
            pairs.append(q_change(before, truth, rng))
            continue
        make = QUESTIONS[int(rng.choice(len(QUESTIONS), p=weights / weights.sum()))][0]
        pair = make(truth, rng)
        if pair is not None:
            pairs.append(pair)
    return pairs
