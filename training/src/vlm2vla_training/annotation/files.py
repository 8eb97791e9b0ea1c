"""annotated.jsonl: reading it, and what summary.json tells of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.jsonio import read_jsonl

ANNOTATED_FILE = "annotated.jsonl"


def read_annotated(path: Path) -> dict[str, AnnotatedEpisode]:
    """Read annotated.jsonl, or the one in a folder; for a key that occurs twice the last line counts."""
    file = path / ANNOTATED_FILE if path.is_dir() else path
    found = (AnnotatedEpisode.from_json(line) for line in read_jsonl(file))
    return {episode.episode_key: episode for episode in found}


def describe(path: Path) -> dict[str, Any]:
    """Count episodes, steps and what the audit found."""
    steps: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    episodes = read_annotated(path)
    for annotated in episodes.values():
        steps.update(step.step_description for step in annotated.steps)
        for name in ("covered", "actions_match", "begins_with_move", "first_action_zero"):
            flags[name] += bool(annotated.audit.get(name))
        flags["with_notes"] += bool(annotated.audit.get("notes"))
        flags["quarantined"] += bool(annotated.audit.get("quarantine"))
        findings.update(str(finding["check"]) for finding in annotated.audit.get("findings", []))
    audit = {**flags, "findings": dict(findings)}
    return {"episodes": len(episodes), "steps": dict(steps.most_common(200)), "audit": audit}


def what_became_of_corrections(path: Path) -> dict[str, Any]:
    """Count an operator's corrections: how many became steps, and why the others, which are named, did not."""
    told = [
        {"episode_key": key, **one}
        for key, annotated in read_annotated(path).items()
        for one in annotated.audit.get("corrections", [])
    ]
    unused = [one for one in told if one["problem"] is not None]
    reasons = Counter(str(one["problem"]) for one in unused)
    return {"met": len(told), "used": len(told) - len(unused), "not_used": dict(reasons), "named": unused}
