"""A small grammar of English instructions: which objects are picked, and where they go."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CLAUSE = re.compile(r"\s*[,;.]?\s*\b(?:and\s+)?(?:then|afterwards|next)\b[,\s]*", re.IGNORECASE)
_VERBS = (
    "pick up|pick|take out|take|get|grab|grasp|lift up|lift|raise|put|place|move|set|drop|bring|"
    "open|close|push|pull|slide|turn|flip|fold|wipe|sweep|stack|remove"
)
_AND_VERB = re.compile(rf"\s*,?\s+and\s+(?=(?:{_VERBS})\b)", re.IGNORECASE)
_VERB = re.compile(rf"^(?:please\s+)?(?P<verb>{_VERBS})\s+(?P<rest>.+)$", re.IGNORECASE)
_PLACE = re.compile(
    r"^(?P<object>.+?)\s+(?:onto|on top of|on|into|inside|in|to the|to|next to|near|above|over|under)\s+"
    r"(?P<target>.+)$",
    re.IGNORECASE,
)
_FROM = re.compile(r"\s+(?:from|off|out of)\s+.+$", re.IGNORECASE)
# "the pot which is in the sink" and "the lever vertical" are still the pot and the lever.
_ASIDE = re.compile(
    r"\s+(?:(?:which|that)(?:\s+(?:is|are))?(?:\s.*)?|upright|vertical|horizontal|upside down)$", re.IGNORECASE
)
_ARTICLE = re.compile(r"^(?:(?:the|a|an|some|its|your|this|that)\s+)+", re.IGNORECASE)
_PLACING_VERBS = frozenset({"put", "place", "move", "set", "drop", "bring", "take", "stack", "slide", "push"})
_PRONOUNS = frozenset({"it", "them"})
_SMALL_WORDS = frozenset({"of", "the", "and", "with", "in", "on"})


@dataclass(frozen=True)
class Goal:
    """One object to handle: names in Title Case, `target` None when it is only picked."""

    verb: str
    object: str
    target: str | None


def parse_instruction(text: str) -> list[Goal]:
    """Split an instruction into goals, for example "put the eggplant in the pan, then lift the fish" into
    Goal("put", "Eggplant", "Pan") and Goal("lift", "Fish", None). Unknown wording becomes one goal about its last
    words; the list is never empty.
    """
    goals: list[Goal] = []
    for clause in (part for piece in _CLAUSE.split(text) for part in _AND_VERB.split(piece)):
        words = clause.strip(" \t\n.,;!?'\"")
        if words:
            goal = _goal(words, goals[-1] if goals else None)
            # "pick up the carrot and put it on the plate" is one goal: the same object, now with a target.
            if goals and goal.object == goals[-1].object and goals[-1].target is None:
                goals.pop()
            goals.append(goal)
    return goals or [Goal("handle", "Object", None)]


def _goal(clause: str, previous: Goal | None) -> Goal:
    match = _VERB.match(clause)
    verb = match["verb"].lower() if match else "handle"
    rest = match["rest"] if match else clause
    target: str | None = None
    place = _PLACE.match(rest)
    if place and verb in _PLACING_VERBS:
        rest, target = place["object"], title_case(place["target"])
    elif place:
        rest = place["object"]
    name = _without_asides(_FROM.sub("", rest))
    if name.strip().lower() in _PRONOUNS and previous is not None:
        return Goal(verb, previous.object, target)
    return Goal(verb, title_case(name), target)


def _without_asides(name: str) -> str:
    shorter = _ASIDE.sub("", name)
    return name if shorter == name else _without_asides(shorter)


def title_case(phrase: str) -> str:
    """Turn "the yellow plate" into "Yellow Plate"; articles in front go, small words inside stay small."""
    words = _ARTICLE.sub("", phrase.strip(" .,;!?'\"")).split()
    titled = [
        word.lower() if index and word.lower() in _SMALL_WORDS else word[:1].upper() + word[1:].lower()
        for index, word in enumerate(words)
    ]
    return " ".join(titled) or "Object"
