"""Which annotated episodes may be trained on: the audit's quarantine, and a person's decisions on top of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm2vla_training.annotation.audit import HARD_CHECKS
from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_json

FORMAT = "vlm2vla-decisions-1"
QUARANTINED = "quarantined by the audit"
REJECTED = "rejected by a person"
_VERDICTS = ("accept", "reject")


@dataclass
class Choice:
    """The episodes to train on, and what was left out.

    Attributes:
        kept: by key.
        left_out: (episode key, kind of reason, detail).
        accepted: keys that a person took out of quarantine.
        stale: decisions about an annotation that has changed since, or is not there: not used.
        refused: accepted by a person, but the ranges or numbers are broken.
    """

    kept: dict[str, AnnotatedEpisode] = field(default_factory=dict)
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what summary.json tells of the decisions."""
        return {
            "accepted_from_quarantine": self.accepted,
            "rejected": [key for key, kind, _ in self.left_out if kind == REJECTED],
            "stale": self.stale,
            "refused": self.refused,
        }


def content_hash(episode: AnnotatedEpisode) -> str:
    """Name what a person looked at: the words and ranges of an episode, without the audit's opinion."""
    shown = {**episode.to_json(), "audit": None}
    text = json.dumps(shown, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_decisions(path: Path) -> dict[str, tuple[str, str]]:
    """Read a file saved from the audit page: episode key -> (verdict, content hash); the last entry of a key counts.

    Raises:
        DataError: it is not such a file.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("decisions"), list):
        raise DataError(f"{path} is not a decisions file ('format' {FORMAT}); save one from the page of `audit`")
    return dict(_entries(path, value["decisions"]))


def _entries(path: Path, entries: list[Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    for number, entry in enumerate(entries):
        found = entry if isinstance(entry, dict) else {}
        key, verdict, content = (found.get(name) for name in ("episode_key", "decision", "content"))
        if not isinstance(key, str) or verdict not in _VERDICTS or not isinstance(content, str):
            raise DataError(f"{path} decision {number}: expected episode_key, decision (accept or reject) and content")
        yield key, (str(verdict), content)


def choose(annotated: dict[str, AnnotatedEpisode], decisions: dict[str, tuple[str, str]]) -> Choice:
    """Leave out what the audit quarantined or a person rejected; an accepted episode leaves quarantine unless its
    ranges or numbers are broken.
    """
    choice = Choice(stale=[key for key in decisions if key not in annotated])
    for key, episode in annotated.items():
        verdict, content = decisions.get(key, ("", ""))
        if verdict and content != content_hash(episode):
            choice.stale.append(key)
            verdict = ""
        reason = episode.audit.get("quarantine")
        if verdict == "reject":
            choice.left_out.append((key, REJECTED, str(reason or "")))
        elif reason and (verdict != "accept" or _broken(episode)):
            if verdict == "accept":
                choice.refused.append(key)
            choice.left_out.append((key, QUARANTINED, str(reason)))
        else:
            if reason:
                choice.accepted.append(key)
            choice.kept[key] = episode
    return choice


def _broken(episode: AnnotatedEpisode) -> bool:
    return any(finding.get("check") in HARD_CHECKS for finding in episode.audit.get("findings", []))
