"""The rule-based annotator: splits a log at gripper events and at vertical descents and ascents.

It sees what a robot log holds (actions, states, instruction) and nothing of the simulator, and produces the schema of
appendix B.1. For clean pick and place logs it stands in for the paper's Gemini pass; it is free and deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.annotation.audit import audit_steps
from vlm2vla_training.annotation.base import AnnotatedEpisode, AnnotatedStep, step_from_log
from vlm2vla_training.annotation.instruction import Goal, parse_instruction
from vlm2vla_training.curation.motion import motion_sentence
from vlm2vla_training.episodes.base import Episode, binary_gripper
from vlm2vla_training.errors import DataError

# Sideways motion counts this many times against height; the rest must be at least so much to be a descent or ascent.
_SIDEWAYS_COST = 1.0
_VERTICAL_MIN_M = 0.015
# The first row of a descent goes down by at least this.
_DESCENDING_M = 0.002
# Net motion below this after a gripper event is waiting for the fingers.
_STILL_M = 0.006
# A hold that never gets farther than this is a failed grasp, not a transport.
_RETRY_TRAVEL_M = 0.03
# Only the last part of a long vertical descent is the grasp: what comes before brings the gripper above the object.
_GRASP_DESCENT_M = 0.065
# This many rows at rest, then sideways at least so far: the aim was wrong and is corrected, or the first part stopped
# short. After a rest nearer to where the motion ends it only settles there.
_PAUSE_ROWS = 2
_REST_M = 0.0005
_CORRECTED_M = 0.018
# When a grasp failed and the one that held was farther than this from where the gripper had moved to, that move missed.
_MISSED_M = 0.015

_WHY = {
    "move": "The gripper must first be right above the {object}.",
    "grasp": "The gripper is above the {object} and must take hold of it.",
    "lift": "The {object} is held and must be raised clear of the surface.",
    "carry": "The {object} is held and must be brought over the {target}.",
    "lower": "The {object} is over the {target} and must be lowered onto it.",
    "release": "The {object} is in place and must be let go, then the gripper retreats.",
}


@dataclass(frozen=True)
class _Piece:
    """A named row range [begin, end) before it becomes a step."""

    kind: str
    goal: Goal
    begin: int
    end: int
    missed: bool = False

    def title(self) -> str:
        name, target = self.goal.object, self.goal.target or "Target"
        return {
            "move": f"Move to {name}",
            "grasp": f"Grasp {name}",
            "lift": f"Lift {name}",
            "carry": f"Move {name} to {target}",
            "lower": f"Lower {name} to {target}",
            "release": f"Release {name}",
        }[self.kind]


class RulesAnnotator:
    """Annotator by rules; see the module text.

    `means` says of instructions in words that the rules do not read (another language, a lab's own phrase) what they
    are in English; case and outer spaces do not count. The episode keeps its own words. With `plain_names` subtasks
    name things as a sentence does ("Move to the carrot"), not as a title ("Move to Carrot").
    """

    def __init__(self, means: Mapping[str, str] | None = None, plain_names: bool = False) -> None:
        """Keep the meanings and how things are named."""
        self._means = {_canonical(text): english for text, english in (means or {}).items()}
        self._plain_names = plain_names
        self.name = "rules-3-plain" if plain_names else "rules-3"

    def annotate(self, episode: Episode) -> AnnotatedEpisode:
        """Split and describe one episode.

        Raises:
            DataError: the episode has no rows.
        """
        if not len(episode):
            raise DataError(f"episode {episode.key} has no rows")
        goals = parse_instruction(self._means.get(_canonical(episode.instruction), episode.instruction))
        if self._plain_names:
            goals = [_plainly(goal) for goal in goals]
        gripper = binary_gripper(episode.actions[:, 6])
        motion = episode.actions[:, :3]
        grasps, notes = _grasps(gripper, motion)
        pieces: list[_Piece] = []
        start = 0
        for index, goal in enumerate(goals):
            if index >= len(grasps):
                notes.append(f"no grasp in the log for goal {index}: {goal.object}")
                break
            following = grasps[index + 1] if index + 1 < len(grasps) else None
            pieces += _pieces_of_goal(goal, grasps[index], following, motion, start)
            start = pieces[-1].end
        if start < len(episode):
            pieces = _tail(pieces, goals[min(len(grasps), len(goals) - 1)], start, len(episode))
        steps = [_step(episode, piece, gripper) for piece in pieces]
        return AnnotatedEpisode(
            episode.key, episode.instruction, self.name, steps, {**audit_steps(episode, steps), "notes": notes}
        )


def _plainly(goal: Goal) -> Goal:
    """The same goal with its things named as in a sentence."""
    target = None if goal.target is None else f"the {goal.target.lower()}"
    return replace(goal, object=f"the {goal.object.lower()}", target=target)


def _canonical(text: str) -> str:
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class _Grasp:
    """Row numbers of one object's handling: every closing (the last one holds), and the opening, if any."""

    closes: list[int]
    opens: list[int]
    release: int | None


def _grasps(gripper: NDArray[np.float64], motion: NDArray[np.float64]) -> tuple[list[_Grasp], list[str]]:
    """Pair closings with openings; a short hold without travel is a failed attempt at the following grasp."""
    changes = [index for index in range(1, len(gripper)) if gripper[index] != gripper[index - 1]]
    closes = [index for index in changes if gripper[index] < 0.5]
    holds = [(close, next((c for c in changes if c > close), None)) for close in closes]
    grasps: list[_Grasp] = []
    notes: list[str] = []
    failed_closes: list[int] = []
    failed_opens: list[int] = []
    for position, (close, opening) in enumerate(holds):
        is_last = position == len(holds) - 1
        if opening is not None and not is_last and _travel_m(motion[close:opening]) < _RETRY_TRAVEL_M:
            failed_closes.append(close)
            failed_opens.append(opening)
            notes.append(f"failed grasp at row {close}, opened again at row {opening}")
            continue
        grasps.append(_Grasp([*failed_closes, close], failed_opens, opening))
        failed_closes, failed_opens = [], []
    return grasps, notes


def _travel_m(rows: NDArray[np.float64]) -> float:
    """Largest distance from the start of a path, metres."""
    return float(np.linalg.norm(np.cumsum(rows, axis=0), axis=1).max()) if len(rows) else 0.0


def _pieces_of_goal(
    goal: Goal, grasp: _Grasp, following: _Grasp | None, motion: NDArray[np.float64], start: int
) -> list[_Piece]:
    """Cut the rows of one object: move, grasp (again after a failed attempt), then lift, carry, lower, release."""
    limit = following.closes[0] if following else len(motion)
    pieces: list[_Piece] = []
    descent = _descent_start(motion, start, grasp.closes[0], _GRASP_DESCENT_M)
    pieces += _corrected("move", goal, motion, start, descent)
    beside_m = float(np.linalg.norm(motion[descent : grasp.closes[-1], :2].sum(axis=0)))
    if pieces and grasp.opens and beside_m > _MISSED_M:
        pieces[-1] = replace(pieces[-1], missed=True)
    begin = descent
    for close, reopen in zip(grasp.closes, [*grasp.opens, None], strict=True):
        end = reopen if reopen is not None else _still_end(motion, close, grasp.release or limit)
        pieces.append(_Piece("grasp", goal, begin, end))
        begin = end
    if grasp.release is None:
        # Nothing opens again: all that follows is the lift, unless another object is approached.
        end = limit if following is None else _ascent_end(motion, begin, limit)
        return pieces if end <= begin else [*pieces, _Piece("lift", goal, begin, end)]
    lifted = _ascent_end(motion, begin, grasp.release)
    if lifted > begin:
        pieces.append(_Piece("lift", goal, begin, lifted))
    lowering = _descent_start(motion, lifted, grasp.release)
    pieces += _corrected("carry", goal, motion, lifted, lowering)
    if grasp.release > lowering:
        pieces.append(_Piece("lower", goal, lowering, grasp.release))
    still = _still_end(motion, grasp.release, limit)
    end = limit if following is None else max(grasp.release + 1, _ascent_end(motion, still, limit))
    return [*pieces, _Piece("release", goal, grasp.release, end)]


def _corrected(kind: str, goal: Goal, motion: NDArray[np.float64], begin: int, end: int) -> list[_Piece]:
    """Split a motion where it rests away from its end and goes on: each part but the last missed its aim."""
    resting = np.linalg.norm(motion[begin:end], axis=1) < _REST_M
    pieces: list[_Piece] = []
    start = begin
    for index in range(begin + _PAUSE_ROWS, end):
        here = index - begin
        paused = resting[here - _PAUSE_ROWS : here].all() and not resting[here]
        left_m = float(np.linalg.norm(motion[index:end, :2].sum(axis=0)))
        if paused and motion[start:index].any() and left_m > _CORRECTED_M:
            pieces.append(_Piece(kind, goal, start, index))
            start = index
    return [*pieces, _Piece(kind, goal, start, end)] if end > start else pieces


def _tail(pieces: list[_Piece], goal: Goal, start: int, end: int) -> list[_Piece]:
    """Rows after the last understood event: part of the last piece, or one approach when there was no event."""
    if pieces:
        last = pieces[-1]
        return [*pieces[:-1], _Piece(last.kind, last.goal, last.begin, end)]
    return [_Piece("move", goal, start, end)]


def _descent_start(motion: NDArray[np.float64], begin: int, end: int, longest_m: float = np.inf) -> int:
    """First row of the mostly vertical descent that ends at `end`; `end` itself when there is none.

    The start that maximises (height lost - cost of moving sideways) until `end`: single jittery rows do not matter.
    Of a longer descent only the last `longest_m` metres count.
    """
    if end <= begin:
        return end
    suffix = np.cumsum(motion[begin:end][::-1], axis=0)[::-1]
    lost = -suffix[:, 2]
    score = lost - _SIDEWAYS_COST * np.linalg.norm(suffix[:, :2], axis=1)
    score[lost > longest_m] = -np.inf
    best = int(np.argmax(score))
    while best + 1 < end - begin and motion[begin + best, 2] > -_DESCENDING_M:
        best += 1
    return begin + best if score[best] >= _VERTICAL_MIN_M else end


def _ascent_end(motion: NDArray[np.float64], begin: int, end: int) -> int:
    """Row behind the mostly vertical ascent that starts at `begin`; `begin` itself when there is none."""
    if end <= begin:
        return begin
    prefix = np.cumsum(motion[begin:end], axis=0)
    score = prefix[:, 2] - _SIDEWAYS_COST * np.linalg.norm(prefix[:, :2], axis=1)
    best = int(np.argmax(score))
    return begin + best + 1 if score[best] >= _VERTICAL_MIN_M else begin


def _still_end(motion: NDArray[np.float64], event: int, limit: int) -> int:
    """Row behind a gripper event and the rows that wait for the fingers."""
    end = event + 1
    while end < limit and float(np.linalg.norm(motion[event + 1 : end + 1].sum(axis=0))) < _STILL_M:
        end += 1
    return end


def _step(episode: Episode, piece: _Piece, gripper: NDArray[np.float64]) -> AnnotatedStep:
    inside = slice(piece.begin, piece.end)
    rows = np.concatenate([episode.actions[inside, :3], gripper[inside, None]], axis=1)
    before = float(gripper[piece.begin - 1]) if piece.begin else None
    sentence = motion_sentence(rows.tolist(), before)
    told = {"object": piece.goal.object, "target": piece.goal.target or "target"}
    names = {key: name.lower().removeprefix("the ") for key, name in told.items()}
    reasoning = f"{_WHY[piece.kind].format(**names)} {sentence}"
    return step_from_log(episode, piece.title(), reasoning, sentence, piece.begin, piece.end, piece.missed)
