"""Whether a person has confirmed, on this bench, that the arm does what the client thinks it does.

``commissioned.json`` in the client's config folder is the record of it:

    {"robot": "widowx", "arm": "wx250s", "counter_z_m": 0.012, "wall_x_m": 0.52,
     "passed": ["axis_signs", "stop", "contact_plane", "gripper"], ...}

It counts for that arm on that bench: another counter height or wall is another bench. Until all four have passed for
the arm at hand, its runs are confirmed chunk by chunk at a tenth of the speed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vlm2vla_client.config import default_path
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.recorder import write_json_atomic
from vlm2vla_client.safety import Limits

STEPS: Final = ("axis_signs", "stop", "contact_plane", "gripper")
UNCOMMISSIONED_SPEED: Final = 0.1
MEASURED: Final = ("counter_z_m", "wall_x_m")
SAME_M: Final = 0.001


def record_path() -> Path:
    """Where the record lies: beside the user's ``client.toml``."""
    return default_path().with_name("commissioned.json")


def is_commissioned(robot: str, arm: str, limits: Limits, path: Path | None = None) -> bool:
    """Whether every step has passed for this arm with these limits; a missing, damaged or foreign record is a no."""
    try:
        record = json.loads((path or record_path()).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict) or (record.get("robot"), record.get("arm")) != (robot, arm):
        return False
    for key in MEASURED:
        value = record.get(key)
        if type(value) not in (int, float) or not abs(value - getattr(limits, key)) <= SAME_M:
            return False
    passed = record.get("passed")
    return isinstance(passed, list) and set(STEPS) <= {step for step in passed if isinstance(step, str)}


def write_record(robot: str, arm: str, limits: Limits, measured: Mapping[str, Any], path: Path | None = None) -> Path:
    """Writes that every step has passed, whole or not at all; gives the file.

    Args:
        measured: what the steps found, for people who read the record.

    Raises:
        ConfigurationError: it cannot be written.
    """
    file = path or record_path()
    bench = {key: getattr(limits, key) for key in MEASURED}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, {"robot": robot, "arm": arm, **bench, "passed": list(STEPS), "measured": measured})
    except OSError as error:
        raise ConfigurationError(f"cannot write {file}: {error.strerror}; nothing was commissioned") from None
    return file


def restrain(confirm: bool, speed: float, commissioned: bool) -> tuple[bool, float]:
    """``--confirm`` and ``--speed`` as they apply to a physical run."""
    return (confirm, speed) if commissioned else (True, min(speed, UNCOMMISSIONED_SPEED))
