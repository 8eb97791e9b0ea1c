"""Task decomposition as appendix D.3 scores it: does a plan's text name the things that the task is about?"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

KEYWORDS: dict[str, tuple[str, ...]] = {
    "eggplant": ("eggplant", "purple", "aubergine"),
    "carrot": ("carrot", "orange", "gajar"),
    "pan": ("pan",),
    "fish": ("fish",),
}
"""The words and synonyms of D.3, in lower case."""


@cache
def _pattern(concept: str) -> re.Pattern[str]:
    # Whole words (with a plural), so that "expand" does not name the pan.
    return re.compile(r"\b(?:" + "|".join(KEYWORDS[concept]) + r")(?:s|es)?\b", re.IGNORECASE)


def mentions(concept: str, text: str) -> bool:
    """Whether ``text`` holds the word for ``concept`` or a synonym, in upper or lower case."""
    return _pattern(concept).search(text) is not None


def decomposed(concepts: Iterable[str], text: str | None) -> bool:
    """Whether every concept is present at once, as D.3 asks of the eggplant task."""
    return text is not None and all(mentions(concept, text) for concept in concepts)
