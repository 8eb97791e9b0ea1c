"""Displacements as directional words with words of degree (section 3.1: 'move left', 'move down and slightly forward').

One vocabulary serves the annotation of logs, the twin's base model and the scripted demonstrator, so that a phrase
means the same distance everywhere. There are no digits in it: numbers belong to the third stage.
"""

from __future__ import annotations

from collections.abc import Sequence

NAMES = (("forward", "backward"), ("left", "right"), ("up", "down"))
"""The words for a positive and a negative displacement along x, y and z of the robot's base frame."""

IGNORED_BELOW_M = 0.010
DEGREES = ((0.025, "very slightly "), (0.050, "slightly "), (0.100, ""))
"""Upper bounds in metres and the word of degree below each; at or above the last bound the word is 'far'."""


def degree(distance_m: float) -> str:
    """The word of degree, with a trailing space, for a distance of at least :data:`IGNORED_BELOW_M` metres."""
    for bound, word in DEGREES:
        if distance_m < bound:
            return word
    return "far "


def direction_words(delta_m: Sequence[float]) -> list[str]:
    """The words for a displacement [dx, dy, dz] in metres, in that order; empty when every axis stays within 1 cm.

    >>> direction_words([0.12, 0.03, -0.07])
    ['far forward', 'slightly left', 'down']
    """
    words = []
    for value, (positive, negative) in zip(delta_m, NAMES, strict=True):
        if abs(value) >= IGNORED_BELOW_M:
            words.append(degree(abs(value)) + (positive if value > 0.0 else negative))
    return words


def join_words(words: Sequence[str]) -> str:
    """``['forward', 'slightly left', 'down']`` as 'forward, slightly left and down'; 'none' for no words."""
    if not words:
        return "none"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
