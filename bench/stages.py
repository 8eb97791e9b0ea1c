"""Each stage of the twin's model by itself, on start scenes of every suite: where does an unseen task fail?

    python bench/stages.py --base models/twin/base --adapter ADAPTER --out bench/results/twin_rounds/main.json

Greedy and without a grammar, on development scenes. Of the adapter: whether the subtask list begins with the right
thing and is wholly right, and, told the right subtask whatever it listed, how far its motion plan and rows end beside
the thing. Of the base: the task in English, what is above the card, and how far off it says that the thing is.
`--plain-names` is for adapters trained on annotations of `annotate --plain-names`.

Prints one JSON object and writes it to --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlm2vla_schema import images, prompts
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.parsing import parse_actions, parse_subtasks
from vlm2vla_schema.types import ModelCard
from vlm2vla_training.analysis.model import LoadedModel
from vlm2vla_training.jsonio import write_json
from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import World
from vlm2vla_twin.skills import SPOKEN
from vlm2vla_twin.tasks import SUITES, Suite
from vlm2vla_twin.truth import Truth, observe

FIRST_SEED = 520_000
NEAR_MM = 20.0


class Scene:
    """The start of one trial: task, picture, truth, the thing to move to first, and the right list of subtasks."""

    def __init__(self, suite: Suite, seed: int, plain_names: bool) -> None:
        spec = suite.scene(seed)
        world, goal = World(spec), suite.goal(spec)
        self.task, self.card = suite.instruction(seed), suite.card_for(seed)
        self.picture: NDArray[np.uint8] = images.to_model_square(Camera(world).rgb(), 112)
        self.truth: Truth = observe(world)
        self.thing = goal.place or goal.lift or ""
        self._plain_names = plain_names
        first = self.named(self.thing)
        self.subtasks = [f"Move to {first}", f"Grasp {first}", f"Lift {first}"]
        if goal.place and goal.target:
            target = self.named(SPOKEN.get(goal.target, goal.target))
            self.subtasks += [f"Move {first} to {target}", f"Lower {first} to {target}", f"Release {first}"]
            if goal.lift:
                then = self.named(goal.lift)
                self.subtasks += [f"Move to {then}", f"Grasp {then}", f"Lift {then}"]

    def named(self, thing: str) -> str:
        return f"the {thing}" if self._plain_names else thing.title()

    def beside_mm(self, dx_m: float, dy_m: float) -> float:
        x_m, y_m, _ = self.truth.offset(self.thing)
        return 1000.0 * float(np.hypot(dx_m - x_m, dy_m - y_m))


def main(argv: Sequence[str] | None = None) -> int:
    """Ask base and adapter about every suite; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=20, help="a suite; of 20 half have another item above the card")
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--plain-names", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    card = ModelCard.read(options.adapter)
    size = card.image_size
    base, adapter = LoadedModel(options.base, None, size), LoadedModel(options.base, options.adapter, size)
    suites: dict[str, Any] = {}
    for name, suite in SUITES.items():
        seeds = range(options.seed, options.seed + options.scenes)
        scenes = [Scene(suite, seed, options.plain_names) for seed in seeds]
        suites[name] = {"adapter": of_adapter(adapter, scenes), "base": of_base(base, scenes, name)}
        print(f"{name}: {json.dumps(suites[name], ensure_ascii=False)}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    told = {"adapter": card.name, "base_hash": card.base_hash, "commit": commit, "scenes": options.scenes,
            "first_seed": options.seed, "suites": suites}  # fmt: skip
    write_json(options.out, told)
    return 0


def of_adapter(model: LoadedModel, scenes: Sequence[Scene]) -> dict[str, Any]:
    first = whole = 0
    beside = []
    for scene in scenes:
        told, _ = model.answer(prompts.subtasks_prompt(scene.task), scene.picture, 90)
        try:
            listed = parse_subtasks(told)
        except ParseError:
            listed = []
        first += listed[:1] == scene.subtasks[:1]
        whole += listed == scene.subtasks
        beside.append(moved_beside_mm(model, scene))
    return {
        "first_subtask_right": first, "all_subtasks_right": whole, "scenes": len(scenes),
        "told_what_to_move_to": distances(beside),
    }  # fmt: skip


def moved_beside_mm(model: LoadedModel, scene: Scene) -> float | None:
    """How far beside the thing plan and rows of the right first subtask end; None where the rows do not parse."""
    subtask = scene.subtasks[0]
    plan, _ = model.answer(prompts.motion_plan_prompt(subtask), scene.picture, 40)
    told, _ = model.answer(prompts.actions_prompt(subtask, plan), scene.picture, 200)
    try:
        rows = parse_actions(told).rows
    except ParseError:
        return None
    return scene.beside_mm(sum(row[0] for row in rows), sum(row[1] for row in rows))


def of_base(model: LoadedModel, scenes: Sequence[Scene], suite: str) -> dict[str, Any]:
    beside: list[float | None] = []
    known = 0
    for scene in scenes:
        question = f"Offset in metres from the gripper to the point above the {scene.thing}?"
        told, _ = model.answer(question, scene.picture, 30)
        try:
            x_m, y_m, _ = json.loads(told)
            beside.append(scene.beside_mm(x_m, y_m))
        except (ValueError, TypeError):
            beside.append(None)
        if suite == "pick_above_picture":
            known += model.answer(f"Which item is above the {scene.card}?", scene.picture, 12)[0] == scene.thing
        elif suite.startswith("pick_carrot_"):
            asked = f"Translate into English: '{scene.task}'"
            known += model.answer(asked, scene.picture, 16)[0] == SUITES["pick_carrot"].instruction(0)
    asks = {"pick_above_picture": "item_above_right"}.get(suite, "translation_right")
    words = {asks: known} if suite.startswith("pick_") and suite != "pick_carrot" else {}
    return {**words, "scenes": len(scenes), "where_it_is": distances(beside)}


def distances(beside: Sequence[float | None]) -> dict[str, Any]:
    """Median in millimetres and how many within 2 cm; what does not parse counts as far off."""
    values = [1000.0 if value is None else value for value in beside]
    return {
        "median_mm": round(float(np.median(values)), 1), "within_2_cm": sum(value <= NEAR_MM for value in values),
        "not_parsed": sum(value is None for value in beside),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
