"""Raw Bridge folders as episodes: .../2022-01-01_00-00-00/raw/traj_group0/traj0/ with obs_dict.pkl, policy_out.pkl,
lang.txt and images0/im_0.jpg. Source of the layout: the converters of https://github.com/rail-berkeley/bridge_data_v2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.intake import IntakeOptions, IntakeReport, RawEpisode, rows_of
from vlm2vla_training.episodes.plain_data import read_plain
from vlm2vla_training.episodes.taking_in import take_in
from vlm2vla_training.errors import DataError

_POLICY_FILE, _STATE_FILE, _WORDS_FILE = "policy_out.pkl", "obs_dict.pkl", "lang.txt"
_DATE = re.compile(r"^\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d$")
# Frames of older recordings arrived one step late.
_LATE_UNTIL = datetime(2021, 7, 23)


class BridgeRawSource:
    """Every trajectory below a folder; an EpisodeSource. `report` fills while reading."""

    def __init__(self, root: Path, options: IntakeOptions) -> None:
        """List the trajectories.

        Raises:
            DataError: there is none.
        """
        self.report = IntakeReport()
        self._root = root
        self._options = options
        self._camera = options.camera or "images0"
        self._folders = sorted(path.parent for path in root.rglob(_POLICY_FILE))
        if not self._folders:
            raise DataError(f"{root} holds no {_POLICY_FILE}; expected raw Bridge folders, .../raw/traj_group0/traj0/")

    def count(self) -> int:
        """Return the number of trajectories."""
        return len(self._folders)

    def episodes(self, skip: frozenset[str] = frozenset()) -> Iterator[Episode]:
        """Yield the episodes whose key is not in `skip`; unreadable ones are left out and named."""
        for folder in self._folders:
            self.report.records += 1
            key = f"bridge/{folder.relative_to(self._root).as_posix()}"
            try:
                raw = self._raw(folder, key)
            except (DataError, OSError) as error:
                self.report.leave_out(key, "unreadable folder", str(error))
                continue
            episode = take_in(raw, self._options, self.report)
            if episode is not None and episode.key not in skip:
                yield episode

    def _raw(self, folder: Path, key: str) -> RawEpisode:
        actions = _actions(read_plain(folder / _POLICY_FILE))
        observed = read_plain(folder / _STATE_FILE)
        if not isinstance(observed, dict) or "full_state" not in observed:
            raise DataError(f"{folder / _STATE_FILE} has no 'full_state'")
        states = rows_of(observed["full_state"], 7, f"{folder / _STATE_FILE} full_state")
        images = _images(folder / self._camera)
        first_step = 0
        if len(images) == len(actions) + 1:
            images = images[:-1]  # the frame behind the last action
        if _recorded_before(folder, _LATE_UNTIL):
            # Observation t+1 shows what action t was chosen from.
            self.report.traps["late_frames_shifted"] += 1
            images, states, actions, first_step = images[1:], states[1:], actions[:-1], 1
        facts: dict[str, Any] = {"folder": key.removeprefix("bridge/"), "camera": self._camera}
        return RawEpisode(key, self._words(folder), "bridge", images, actions, states, first_step, facts)

    def _words(self, folder: Path) -> str:
        path = folder / _WORDS_FILE
        if not path.exists():
            return ""
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        words = [line for line in lines if line and not line.lower().startswith("confidence")]
        if len(words) > 1:
            self.report.traps["several_instructions"] += 1
        return words[0] if words else ""


def _actions(found: Any) -> NDArray[np.float64]:
    """policy_out is a list of rows, or of dicts that hold one as 'actions'."""
    if not isinstance(found, list) or not found:
        raise DataError(f"{_POLICY_FILE} holds {type(found).__name__}; expected a list of actions")
    rows = [row.get("actions") if isinstance(row, dict) else row for row in found]
    return rows_of(rows, 7, f"{_POLICY_FILE} actions")


def _images(folder: Path) -> list[bytes]:
    """im_0.jpg, im_1.jpg, ... in the order of their numbers; a gap ends in an error."""
    numbers = sorted(int(path.stem.removeprefix("im_")) for path in folder.glob("im_*.jpg") if path.stem[3:].isdigit())
    if numbers != list(range(len(numbers))) or not numbers:
        raise DataError(f"{folder} holds {len(numbers)} im_*.jpg; expected im_0.jpg and on without a gap")
    return [(folder / f"im_{number}.jpg").read_bytes() for number in numbers]


def _recorded_before(folder: Path, bound: datetime) -> bool:
    date = next((parent.name for parent in folder.parents if _DATE.match(parent.name)), None)
    return date is not None and datetime.strptime(date, "%Y-%m-%d_%H-%M-%S") < bound
