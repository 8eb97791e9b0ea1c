"""Whether a person has confirmed, on this bench, that the arm does what the client thinks it does.

``commissioned.json`` in the client's config folder is the record of it:

    {"robot": "widowx", "arm": "wx250s", "passed": ["axis_signs", "stop", "contact_plane", "gripper"]}

Until all four have passed for the arm at hand, its runs are confirmed chunk by chunk at a tenth of the speed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from vlm2vla_client.config import default_path

STEPS: Final = ("axis_signs", "stop", "contact_plane", "gripper")
UNCOMMISSIONED_SPEED: Final = 0.1


def record_path() -> Path:
    """Where the record lies: beside the user's ``client.toml``."""
    return default_path().with_name("commissioned.json")


def is_commissioned(robot: str, arm: str, path: Path | None = None) -> bool:
    """Whether every step has passed for this arm. A record that is missing, damaged or of another arm counts as no."""
    try:
        record = json.loads((path or record_path()).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict) or (record.get("robot"), record.get("arm")) != (robot, arm):
        return False
    passed = record.get("passed")
    return isinstance(passed, list) and set(STEPS) <= {step for step in passed if isinstance(step, str)}


def restrain(confirm: bool, speed: float, commissioned: bool) -> tuple[bool, float]:
    """``--confirm`` and ``--speed`` as they apply to a physical run."""
    return (confirm, speed) if commissioned else (True, min(speed, UNCOMMISSIONED_SPEED))
