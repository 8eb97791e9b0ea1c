"""Trials on disk: ``trials.jsonl``, one JSON object a trial, append-only and synced line by line."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from vlm2vla_client.errors import ConfigurationError, RecordingError
from vlm2vla_client.recorder import plain

TRIALS = "trials.jsonl"
OVERRIDES = "overrides.jsonl"


@dataclass(frozen=True)
class Trial:
    """One trial, as measured.

    Attributes:
        suite: name of the suite; ``task`` is what the robot was told.
        policy: server, expert, random or swapped; ``model`` is the name that the policy gave itself.
        planning: which rubric of D.1 ``score`` follows; both results are kept.
        success: full score by physics, whatever the verifier said.
        verified: every subtask was confirmed by a verifier that checks.
        failure: None after a success; a fault's name, or what was still missing, such as ``not_lifted``.
        outcome, message: how the episode ended, as the loop says it.
        cycle_seconds: wall time of each inference cycle (plan and rows, D.6), failed answers included.
        retried_cycles: cycles in which the server sampled more than once, or gave no usable answer.
        refusals: rows that the safety filter refused, by reason. ``stale_frame`` and ``stale_answer`` are of older
            files: a trial's clock counts simulated time only.
        chunks: how the chunks ended, by outcome.
        retries: how often the whole trial was started again after a fault of server, arm or camera.
    """

    suite: str
    task: str
    seed: int
    mode: str
    policy: str
    model: str
    verifier: str
    planning: bool
    score: int
    max_score: int
    planning_score: int
    non_planning_score: int
    plan_credit: bool | None
    success: bool
    verified: bool
    failure: str | None
    flags: dict[str, bool]
    outcome: str
    message: str
    cycles: int
    seconds: float
    subtasks: list[str]
    plans: list[str]
    subtasks_done: int
    rows_executed: int
    rows_changed: int
    rows_refused: int
    cycle_seconds: list[float]
    verify_seconds: list[float]
    retried_cycles: int
    retries: int
    commit: str | None
    finished_utc: str
    start: dict[str, Any] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    chunks: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """What makes a trial one of its kind within a folder."""
        return (self.suite, self.seed)


@dataclass(frozen=True)
class Override:
    """A person's verdict on a plan, which replaces the keywords of D.3 ("manually checked")."""

    suite: str
    seed: int
    plan_credit: bool
    by: str
    why: str


Line = TypeVar("Line", Trial, Override)


def read_trials(folder: Path) -> list[Trial]:
    """All whole trials of a folder, in the order written; a line torn by a crash is left out.

    Raises:
        RecordingError: a line before the last one is damaged.
    """
    return [_typed(Trial, value, folder / TRIALS) for value in _lines(folder / TRIALS)]


def read_overrides(folder: Path) -> dict[tuple[str, int], Override]:
    """The latest override of each trial.

    Raises:
        RecordingError: a damaged line.
    """
    found = (_typed(Override, value, folder / OVERRIDES) for value in _lines(folder / OVERRIDES))
    return {(item.suite, item.seed): item for item in found}


def add_override(folder: Path, override: Override) -> None:
    """Appends a person's verdict; the trial itself stays as it was measured.

    Raises:
        ConfigurationError: the folder has no such trial.
    """
    if (override.suite, override.seed) not in {trial.key for trial in read_trials(folder)}:
        raise ConfigurationError(f"{folder} has no trial of {override.suite} with seed {override.seed}")
    _append(folder / OVERRIDES, plain(override))


class TrialLog:
    """The trials of one folder, open for appending by this process alone, from any of its threads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / TRIALS
        self._writing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")
        except OSError as error:
            raise ConfigurationError(f"cannot write into {folder}: {error.strerror}; give another --out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigurationError(f"another evaluation is writing into {folder}; give another --out") from None
        self._cut_torn_line()

    def append(self, trial: Trial) -> None:
        """Writes one line and waits until it is on the disk."""
        with self._writing:
            _append(self._path, plain(trial))

    def __enter__(self) -> TrialLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def _cut_torn_line(self) -> None:
        if not self._path.is_file():
            return
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)


def _append(path: Path, value: Any) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    lines.pop()  # empty, or a line that a crash cut
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise RecordingError(f"{path}, line {number} is damaged")
        yield value


def _typed(kind: type[Line], value: dict[str, Any], path: Path) -> Line:
    known = {item.name for item in fields(kind)}
    try:
        return kind(**{name: item for name, item in value.items() if name in known})
    except TypeError as error:
        raise RecordingError(f"{path}: a line is not a {kind.__name__.lower()}: {error}") from None
