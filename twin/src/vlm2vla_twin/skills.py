"""Subtasks as this kitchen understands them: which skill a line of text asks for, on which things.

Shared by the demonstrator, which must carry a subtask out, and by the simulator's verifier, which must judge it. Text
from a trained policy may be worded freely, so the reading goes by keywords (those of appendix D.3 among them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vlm2vla_twin.scene import CARDS, KINDS

Kind = Literal["move", "grasp", "lift", "carry", "lower", "release"]

WORDS: dict[str, tuple[str, ...]] = {
    "carrot": ("carrot", "orange", "gajar", "zanahoria", "胡萝卜", "गाजर"),
    "eggplant": ("eggplant", "purple", "aubergine", "berenjena", "茄子"),
    "banana": ("banana", "plátano", "香蕉"),
    "fish": ("fish", "pez", "鱼"),
    "plate": ("plate", "plato"),
    "pan": ("pan", "sartén"),
}
VERBS: tuple[tuple[Kind, str], ...] = (
    ("release", r"\b(release|let go|open)"),
    ("lower", r"\b(lower|place|put|drop)"),
    ("lift", r"\b(lift|raise|pick)"),
    ("grasp", r"\b(grasp|grab|close|hold)"),
    ("move", r"\b(move|go|reach|approach|position|align|carry|bring)"),
)
"""What each verb asks for; the first that matches decides, so that 'open the gripper and move up' is a release."""
SPOKEN = {name: ("yellow plate" if name == "plate" else name) for name in KINDS}
TITLES = {name: spoken.title() for name, spoken in SPOKEN.items()}


@dataclass(frozen=True)
class Skill:
    """One subtask: a kind, the object it is about, and the place it goes to for ``carry`` and ``lower``."""

    kind: Kind
    object: str
    target: str | None = None


@dataclass(frozen=True)
class Goal:
    """One clause of an instruction: an object to pick up and, unless it is only lifted, where to put it."""

    object: str
    target: str | None = None


def mentioned(text: str) -> list[str]:
    """The things named in a text, in the order of their first mention."""
    lowered, found = text.lower(), []
    for name, words in WORDS.items():
        places = [match.start() for word in words if (match := re.search(_whole(word), lowered))]
        if places:
            found.append((min(places), name))
    return [name for _, name in sorted(found)]


def _whole(word: str) -> str:
    """A pattern for the word standing alone, where its script separates words at all."""
    return rf"\b{word}" if word.isascii() else re.escape(word)


def parse_subtask(text: str) -> Skill | None:
    """What a subtask asks for; None when no known thing or verb is in it.

    >>> parse_subtask("Move Carrot to Yellow Plate")
    Skill(kind='carry', object='carrot', target='plate')
    """
    things, lowered = mentioned(text), text.lower()
    if not things:
        return None
    graspable = [name for name in things if KINDS[name].graspable]
    targets = [name for name in things if not KINDS[name].graspable]
    thing, target = (graspable or things)[0], targets[0] if targets and graspable else None
    for kind, pattern in VERBS:
        if re.search(pattern, lowered):
            if kind == "move" and target is not None:
                return Skill("carry", thing, target)
            return Skill(kind, thing, target)
    return None


def parse_task(text: str) -> list[Goal] | str | None:
    """The goals of an instruction; a card's name when it asks for the item above it; None when nothing is known."""
    lowered = text.lower()
    for card in CARDS:
        if re.search(rf"\babove the {card}\b", lowered):
            return card
    goals = []
    for clause in re.split(r"\bthen\b", lowered):
        things = mentioned(clause)
        graspable = [name for name in things if KINDS[name].graspable]
        targets = [name for name in things if not KINDS[name].graspable]
        if graspable:
            goals.append(Goal(graspable[0], targets[0] if targets else None))
    return goals or None


def skills_for(goals: list[Goal]) -> list[Skill]:
    """The skills that reach the goals one after the other."""
    skills = []
    for goal in goals:
        skills += [Skill("move", goal.object), Skill("grasp", goal.object), Skill("lift", goal.object)]
        if goal.target is not None:
            skills += [
                Skill("carry", goal.object, goal.target),
                Skill("lower", goal.object, goal.target),
                Skill("release", goal.object, goal.target),
            ]
    return skills


def title(skill: Skill) -> str:
    """The skill as a subtask in the paper's manner, as in 'Move to Carrot'."""
    name, target = TITLES[skill.object], TITLES.get(skill.target or "", "")
    return {
        "move": f"Move to {name}",
        "grasp": f"Grasp {name}",
        "lift": f"Lift {name}",
        "carry": f"Move {name} to {target}",
        "lower": f"Lower {name} to {target}",
        "release": f"Release {name}",
    }[skill.kind]
