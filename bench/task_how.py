"""Rounds 17 and 18 on the twin's base and examples: how a task is done, and tasks that describe what they mean.

    vlm2vla-train pretrain --out work/none --stills work/stills --render 12000 --steps 1 --tower-steps 0
    python bench/task_words.py train --base models/twin/base --stills work/stills --steps 2200 --out work/words
    python bench/task_how.py render --stills work/stills
    python bench/task_how.py train --base work/words/base --stills work/stills --steps 2400 --out work/how

`train` goes on from round 16's base (`task_words.py`) with the language loss alone. Besides that round's questions it
tells, as any large language model could, in plain English sentences how a task of one of four languages is done and
which things it needs in their order; what lies nearest to what; and where the item above a card is. No plan, list of
subtasks in the paper's form, or action is in it. `render` adds 14,000 stills (seeds 212,000 to 255,999) in which an
item lies above a card.

    python bench/task_how.py demos --out work/demos_q --suite pick_any --seed 400000 --episodes 400 ...
    python bench/task_how.py describe --examples work/ex_p --out work/exd_p

`demos` is `vlm2vla-train demos`, but that pick_any from seed 400,000 on has the thing to take above another. `describe`
copies an example set of pick_any and lets most tasks describe what they mean ("the item above the pan", "the purple
item", "the item nearest to the fish", "the item furthest to the left") where that is unique in the scene. English, and
without cards, as all robot data: a relation is learned from things, and cards are known to the base.

    python bench/task_how.py lists --server http://localhost:8001 --model NAME

`lists` asks a server for the subtasks of "pick up the carrot", "the eggplant" and "the banana" in four languages, over
ten development scenes that hold all three, as out of distribution (T 1.0): does the list follow the name? The suites
of the twin always mean the carrot.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import task_words
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vlm2vla_client.scenes import choose_scene
from vlm2vla_schema.images import encode_jpeg, to_base64
from vlm2vla_training import demo_scenes, pretrain_data
from vlm2vla_training.cli import main as train_main
from vlm2vla_training.pretrain import offset_errors, spread_unmet
from vlm2vla_training.pretrain_batches import Batcher, Stills
from vlm2vla_training.pretrain_data import COLOURS, GRASPABLE, HOVER_M, NAMES, Pair, list_m
from vlm2vla_training.pretrain_settings import Settings
from vlm2vla_training.twin_model import save_base
from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import KINDS, SceneSpec, resting
from vlm2vla_twin.skills import Goal
from vlm2vla_twin.truth import Truth

THEN = ("{}, then {}", "{}, luego {}", "{}，然后{}", "{}, फिर {}")
STILLS = range(212_000, 256_000)
A_SHARD = 2000
ABOVE_FROM = 400_000
GAP_M = {"plate": (0.085, 0.098), "pan": (0.09, 0.099)}
SHARE = 0.8
LIST_SEEDS, LIST_THINGS = range(520_000, 520_010), ("carrot", "eggplant", "banana")
LANGUAGES = ("English", "Spanish", "Mandarin", "Hindi")


# --- what the base is asked -------------------------------------------------------------------------------------------


def taken(thing: str) -> str:
    """How a thing is picked up."""
    name = NAMES[thing][0]
    return f"Go to the {name}. Grasp the {name}. Lift the {name}."


def one_task(truth: Truth, rng: np.random.Generator, language: int) -> tuple[str, str, list[str]]:
    """A task in words, how it is done, and the things it needs in their order."""
    if truth.cards and language == 0 and rng.random() < 0.25:
        card = str(rng.choice(list(truth.cards)))
        above = truth.above_card(card)
        if above is not None:
            verb = task_words.TAKE[int(rng.integers(4))][0]
            return verb.format(f"item above the {card}"), taken(above), [above]
    one = str(rng.choice(GRASPABLE))
    if rng.random() < 0.5:
        verb = task_words.TAKE[int(rng.integers(len(task_words.TAKE)))][language]
        return verb.format(task_words.named(one, language, rng)), taken(one), [one]
    other = str(rng.choice([name for name in KINDS if name != one]))
    verb = task_words.PLACE[int(rng.integers(len(task_words.PLACE)))][language]
    words = verb.format(*(task_words.named(name, language, rng) for name in (one, other)))
    name, place = NAMES[one][0], NAMES[other][0]
    rest = f"Carry the {name} to the {place}. Lower the {name}. Let go of the {name}."
    return words, f"{taken(one)} {rest}", [one, other]


def any_task(truth: Truth, rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """One task, or two one after the other."""
    language = int(rng.integers(4))
    words, how, things = one_task(truth, rng, language)
    if rng.random() < 0.35:
        more_words, more, others = one_task(truth, rng, language)
        if others[0] not in things:
            return THEN[language].format(words, more_words), f"{how} {more}", things + others
    return words, how, things


def q_how(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """How a task is done, in plain sentences."""
    words, how, _ = any_task(truth, rng)
    if rng.random() < 0.6:
        return f"How is the task '{words}' done, step by step?", how
    return f"Describe in words what to do for the overall task '{words}'.", how


def q_things(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """What a task needs, in order."""
    words, _, things = any_task(truth, rng)
    question = f"Which things does the task '{words}' need, in their order?"
    return question, ", ".join(NAMES[thing][0].title() for thing in things)


def q_item_m(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Where the item above a card is, or the point above it."""
    if not truth.cards:
        return None
    card = str(rng.choice(list(truth.cards)))
    above = truth.above_card(card)
    if above is None:
        return None
    dx, dy, dz = truth.offset(above)
    if rng.random() < 0.5:
        return f"Offset in metres from the gripper to the item above the {card}?", list_m((dx, dy, dz))
    question = f"Offset in metres from the gripper to the point above the item above the {card}?"
    return question, list_m((dx, dy, HOVER_M - truth.gripper_m[2]))


def q_nearest(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """What lies nearest to a thing or a card; None when two are about as near."""
    name = pretrain_data._any(truth, rng)
    x, y, *_ = truth.position(name)
    away = sorted((float(np.hypot(at[0] - x, at[1] - y)), one) for one, at in truth.objects.items() if one != name)
    if not away or (len(away) > 1 and away[1][0] - away[0][0] < 0.02):
        return None
    return f"What lies nearest to the {pretrain_data._thing(name, rng)}?", NAMES[away[0][1]][0]


QUESTIONS = ((q_how, 4.0), (q_things, 2.0), (q_item_m, 3.0), (q_nearest, 2.0))


def ask_how() -> None:
    """Let `pretrain`'s conversations hold these questions too, and name things in other languages more often."""
    task_words.TASK_WEIGHT = 4.0
    task_words.ask_for_tasks()
    pretrain_data.QUESTIONS = (*pretrain_data.QUESTIONS, *QUESTIONS)
    usual = pretrain_data._thing

    def thing(name: str, rng: np.random.Generator) -> str:
        if name in KINDS and rng.random() < 0.25:
            return NAMES[name][int(rng.integers(1, 4))]
        return usual(name, rng)

    pretrain_data._thing = thing


def render(args: argparse.Namespace) -> int:
    """Write the stills of `STILLS` in which an item lies above a card; shards that exist are kept."""
    folder = args.stills / "train"
    for first in range(STILLS.start, STILLS.stop, A_SHARD):
        path = folder / f"stills-{first:07d}.npz"
        if path.exists():
            continue
        wanted = (seed for seed in range(first, first + A_SHARD) if has_item_above_card(seed))
        kept = [pair for seed in wanted if (pair := pretrain_data.still(seed)) is not None]
        part = path.with_suffix(".part.npz")
        pictures = np.array([picture for picture, _ in kept], np.uint8)
        np.savez(part, pictures=pictures, truths=np.array([json.dumps(truth.as_dict()) for _, truth in kept]))
        part.replace(path)
        print(f"seeds {first} to {first + A_SHARD - 1}: {len(kept)} stills", flush=True)
    return 0


def has_item_above_card(seed: int) -> bool:
    """By the scene alone, before anything is drawn."""
    scene, held = pretrain_data.random_scene(seed)
    return any(
        0.02 < item.position_m[0] - card.xy_m[0] < 0.10 and abs(item.position_m[1] - card.xy_m[1]) < 0.045
        for card in scene.cards
        for item in scene.objects
        if item.name in GRASPABLE and item.name != held
    )


def train(args: argparse.Namespace) -> int:
    """Go on from a base; OUT/base is the new one, OUT/state.pt what it resumes from."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    ask_how()
    settings = Settings(
        tower_steps=0, steps=args.steps, learning_rate=1e-3, tower_share=0.1, seed=args.seed, threads=args.threads,
        compile=True,
    )  # fmt: skip
    stills, held_out = (Stills.load(args.stills / part) for part in ("train", "dev"))
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForImageTextToText.from_pretrained(args.base, dtype=torch.float32).train()
    met = task_words.steps(model, Batcher(stills, tokenizer, settings), settings, args.out)
    spread_unmet(model, met, args.seed)
    metrics = offset_errors(model, tokenizer, held_out, most=200)
    print(metrics)
    save_base(model, tokenizer, args.out / "base", {**asdict(settings), "stills": len(stills.truths)}, metrics)
    return 0


# --- what the robot data say ------------------------------------------------------------------------------------------


def pick_above(random: np.random.Generator, seed: int) -> demo_scenes.DemoTask:
    """pick_any, from `ABOVE_FROM` on with the thing to take above another."""
    if seed < ABOVE_FROM:
        return demo_scenes._pick_any(random, seed)
    name = str(random.choice(GRASPABLE))
    others = random.permutation([kind for kind in KINDS if kind != name])[: int(random.integers(1, 4))]
    anchor, *rest = (str(other) for other in others)
    while True:
        x, y = demo_scenes._xy(random, 3)
        below_x = x - float(random.uniform(*GAP_M.get(anchor, (0.05, 0.09))))
        below_y = y + float(random.uniform(-0.03, 0.03))
        placed = [(name, x, y), (anchor, below_x, below_y)]
        placed += [(other, *demo_scenes._xy(random, 3)) for other in rest]
        if below_x >= 0.20 and all(_free(one, placed[:number], placed[1]) for number, one in enumerate(placed[2:], 2)):
            break
    objects = tuple(resting(one, (px, py), float(random.uniform(0, 2 * np.pi))) for one, px, py in placed)
    verb = str(random.choice(["pick up", "pick up", "lift"]))
    goals = (Goal(name, None),)
    return demo_scenes.DemoTask(f"{verb} the {name}", goals, SceneSpec(seed=seed, objects=objects))


_Placed = tuple[str, float, float]


def _free(one: _Placed, others: Sequence[_Placed], anchor: _Placed) -> bool:
    """Whether a third thing touches none and is not itself above the anchor."""
    name, x, y = one
    above = 0.0 < x - anchor[1] < 0.11 and abs(y - anchor[2]) < 0.06
    reach = demo_scenes._reach
    return not above and all(np.hypot(x - px, y - py) >= reach(name) + reach(other) for other, px, py in others)


def descriptions(scene: SceneSpec, thing: str) -> list[tuple[str, str]]:
    """Kind and words of what is true of one thing in a scene and of no other; relations above another alone if any."""
    at = {item.name: np.asarray(item.position_m[:2]) for item in scene.objects}
    found = []
    for anchor in at.keys() - {thing}:
        aside = {name: place - at[anchor] for name, place in at.items() if name != anchor}
        above = [n for n, (dx, dy) in aside.items() if n in GRASPABLE and 0.02 < dx < 0.10 and abs(dy) < 0.045]
        near = sorted((float(np.hypot(*offset)), name) for name, offset in aside.items())
        if above == [thing]:
            found.append(("above", f"the item above the {NAMES[anchor][0]}"))
        if near[0][1] == thing and (len(near) == 1 or near[1][0] - near[0][0] > 0.02):
            found.append(("nearest", f"the item nearest to the {NAMES[anchor][0]}"))
    if len(at) > 1:
        if not any(COLOURS[name] == COLOURS[thing] for name in at if name != thing):
            found.append(("colour", f"the {COLOURS[thing]} item"))
        left = sorted(((float(y), name) for name, (_, y) in at.items()), reverse=True)
        if left[0][1] == thing and left[0][0] - left[1][0] > 0.03:
            found.append(("left", "the item furthest to the left"))
        if left[-1][1] == thing and left[-2][0] - left[-1][0] > 0.03:
            found.append(("right", "the item furthest to the right"))
    return [one for one in found if one[0] == "above"] or sorted(found)


def describe(args: argparse.Namespace) -> int:
    """Copy an example set of pick_any; the prompts of most of its lists describe instead of naming."""
    demo_scenes.SUITES["pick_any"] = pick_above
    shutil.copytree(args.examples, args.out)
    counts: Counter[str] = Counter()
    for path in sorted(args.out.glob("part-*.parquet")):
        table = pq.read_table(path)
        rows = table.select(["kind", "prompt", "episode_key", "first"]).to_pylist()
        prompts = [_described(row, counts) for row in rows]
        place = table.schema.get_field_index("prompt")
        pq.write_table(table.set_column(place, table.schema.field(place), pa.array(prompts, pa.string())), path)
    print(json.dumps(dict(sorted(counts.items()))))
    return 0


def _described(row: dict[str, Any], counts: Counter[str]) -> str:
    prompt = str(row["prompt"])
    named = re.search(r"overall task '((?:pick up|lift) )the \w+'", prompt)
    if row["kind"] != "subtasks" or named is None:
        return prompt
    _, suite, seed = str(row["episode_key"]).split("/")
    task = demo_scenes.demo_task(suite, int(seed), "varied")
    found = descriptions(task.spec, task.goals[0].object)
    rng = np.random.default_rng([int(seed), int(row["first"])])
    if not found or rng.random() >= SHARE:
        counts["named"] += 1
        return prompt
    kind, words = found[int(rng.integers(len(found)))]
    counts[kind] += 1
    return prompt.replace(named[0], f"overall task '{named[1]}{words}'")


# --- what a list follows ----------------------------------------------------------------------------------------------


def lists(args: argparse.Namespace) -> int:
    """Print how many lists begin with the thing that the task names, by language and thing."""
    right: Counter[str] = Counter()
    for seed in LIST_SEEDS:
        scene = choose_scene("recoge la zanahoria", None, seed).spec
        picture = to_base64(encode_jpeg(Camera(World(scene)).rgb()))
        for language, words in zip(LANGUAGES, task_words.TAKE[0], strict=True):
            for thing in LIST_THINGS:
                task = words.format(NAMES[thing][LANGUAGES.index(language)])
                asked = {"image": picture, "task": task, "scenario": "out_of_distribution", "seed": seed}
                answer = httpx.post(f"{args.server}/subtasks", json={**asked, "model": args.model}, timeout=120.0)
                first = answer.json()["subtasks"][0] if answer.status_code == 200 else ""
                right[f"{language} {thing}"] += first.lower() == f"move to {thing}"
    for what, count in right.items():
        print(f"{what}: {count} of {len(LIST_SEEDS)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """One of the five."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["demos"]:
        demo_scenes.SUITES["pick_any"] = pick_above
        return train_main(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("render", "train", "demos", "describe", "lists"))
    parser.add_argument("--base", type=Path, help="of train")
    parser.add_argument("--stills", type=Path, help="of render and train: train/ and dev/ in it")
    parser.add_argument("--examples", type=Path, help="of describe")
    parser.add_argument("--out", type=Path, help="of train and describe")
    parser.add_argument("--server", help="of lists")
    parser.add_argument("--model", help="of lists: an adapter's name")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(given)
    needed = {
        "render": ("stills",), "train": ("base", "stills", "out"), "describe": ("examples", "out"),
        "lists": ("server", "model"),
    }[args.what]  # fmt: skip
    if missing := [name for name in needed if getattr(args, name) is None]:
        parser.error(f"{args.what} needs --{', --'.join(missing)}")
    return {"render": render, "train": train, "describe": describe, "lists": lists}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
