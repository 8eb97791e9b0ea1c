"""A trial sheet for a real bench: which policy is tried when and from which start, without saying which policy it is.

The trials are blocked: a block has, for every task, one start and each policy once from it, so that policies are
compared on the same starts and nothing that drifts over the day (light, a warm arm, a tired scorer) favours one of
them. Tasks within a block and policies within a task come in random order. Everything follows from the seed.
"""

from __future__ import annotations

import csv
import json
import os
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.recorder import write_json_atomic
from vlm2vla_twin.tasks import SUITES

FORMAT = 1
SHEET, PLAN, KEY, PAGE, STARTS = "sheet.csv", "plan.json", "key.json", "sheet.html", "starts"
FILLED = ("reached", "plan", "cycles", "fault", "recording", "by", "notes")
"""The scorer's columns; the others are printed."""
FAULTS = ("server", "safety_stop", "camera", "robot")

_STAGES: dict[str, dict[str, str]] = {
    "carrot_on_plate": {"c": "contact_carrot", "g": "grasped_carrot", "p": "placed_carrot"},
    "eggplant_pan_fish": {
        "c": "contact_eggplant", "g": "grasped_eggplant", "p": "placed_eggplant",
        "t": "toward_fish", "f": "contact_fish", "l": "lifted_fish",
    },
}  # fmt: skip
_PICK = {"c": "contact", "l": "lifted"}


def stages_of(suite: str) -> dict[str, str]:
    """The scoring keys of a task: letter -> stage of D.1, in order, by the names of the twin's judge."""
    return _STAGES.get(suite, _PICK)


@dataclass(frozen=True)
class Planned:
    """One line of a sheet as printed.

    Attributes:
        trial: 1, 2, ... in the order of running.
        start: the seed of the start condition: the same for every policy of a block and task.
        policy: the blind label.
        keys: the letters that the scorer may write, explained.
    """

    trial: int
    block: int
    suite: str
    task: str
    start: int
    policy: str
    keys: str


@dataclass(frozen=True)
class SheetPlan:
    """A whole sheet, before anything was tried.

    Attributes:
        policies: in the order of the report, whose first one the others are compared with.
        labels: blind label -> policy; written into a file of its own.
        reactive: policies that write no plan, scored by the other rubric of D.1.
    """

    suites: tuple[str, ...]
    policies: tuple[str, ...]
    seed: int
    mode: Literal["varied", "paper"]
    labels: Mapping[str, str]
    reactive: frozenset[str]
    lines: tuple[Planned, ...]


def plan_sheet(
    suites: Sequence[str],
    policies: Sequence[str],
    trials: int,
    seed: int,
    *,
    mode: Literal["varied", "paper"] = "varied",
    reactive: Sequence[str] = (),
) -> SheetPlan:
    """Draws order and labels; the same arguments give the same sheet.

    Args:
        trials: blocks, so trials of each policy and task.
        seed: of the first block's starts and of everything random.

    Raises:
        ConfigurationError: no or too many policies, one named twice, or an unknown reactive one.
    """
    if not 1 <= len(policies) <= len(string.ascii_uppercase) or len(set(policies)) != len(policies) or "" in policies:
        raise ConfigurationError("give 1 to 26 policies with different names: --policies NAME,NAME,...")
    if unknown := sorted(set(reactive) - set(policies)):
        raise ConfigurationError(f"--reactive names {', '.join(unknown)}, which is not among --policies")
    if trials < 1 or not 0 <= seed < 2**31 - trials:
        raise ConfigurationError("--trials must be at least 1 and every seed between 0 and 2147483647")
    draw = random.Random(f"trial sheet {seed}")
    labels = dict(zip(string.ascii_uppercase, draw.sample(list(policies), len(policies)), strict=False))
    lines: list[Planned] = []
    for block in range(1, trials + 1):
        start = seed + block - 1
        for suite in draw.sample(list(suites), len(suites)):
            keys = " ".join(f"{letter}={stage.replace('_', ' ')}" for letter, stage in stages_of(suite).items())
            for label in draw.sample(list(labels), len(labels)):
                task = SUITES[suite].instruction(start)
                lines.append(Planned(len(lines) + 1, block, suite, task, start, label, keys))
    return SheetPlan(tuple(suites), tuple(policies), seed, mode, labels, frozenset(reactive), tuple(lines))


def write_plan(folder: Path, plan: SheetPlan) -> None:
    """Writes ``plan.json`` (blind), ``key.json`` (who is who) and ``sheet.csv`` (to be filled) into a new folder.

    Raises:
        ConfigurationError: the folder has a sheet already, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot write into {folder}: {error.strerror}; give another --out") from None
    if (folder / SHEET).exists() or (folder / PLAN).exists():
        raise ConfigurationError(f"{folder} holds a trial sheet already; give another --out")
    facts = {"format": FORMAT, "suites": plan.suites, "seed": plan.seed, "mode": plan.mode}
    write_json_atomic(folder / PLAN, {**facts, "lines": [asdict(line) for line in plan.lines]})
    who = {
        label: {"policy": policy, "planning": policy not in plan.reactive}
        for label, policy in sorted(plan.labels.items(), key=lambda item: plan.policies.index(item[1]))
    }
    write_json_atomic(folder / KEY, {"format": FORMAT, "seed": plan.seed, "labels": who})
    _write_csv(folder / SHEET, plan.lines)


def _write_csv(path: Path, lines: Sequence[Planned]) -> None:
    part = path.with_name(path.name + ".part")
    names = [*asdict(lines[0]), *FILLED]
    # With a byte order mark, or a spreadsheet misreads the instructions in Hindi and Mandarin.
    with part.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_plan(folder: Path) -> tuple[list[Planned], Literal["varied", "paper"]]:
    """The lines of ``plan.json`` and the mode of their starts.

    Raises:
        ConfigurationError: no sheet in this folder, or a damaged one.
    """
    value = read_json(folder / PLAN)
    try:
        mode: Literal["varied", "paper"] = "paper" if value["mode"] == "paper" else "varied"
        return [Planned(**line) for line in value["lines"]], mode
    except (KeyError, TypeError):
        raise ConfigurationError(f"{folder / PLAN} is damaged") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a sheet.

    Raises:
        ConfigurationError: it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path} is missing: is this the folder of a trial sheet?") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not readable: {error}") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} is damaged: expected a JSON object")
    return value
