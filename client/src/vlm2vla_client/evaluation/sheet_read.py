"""A filled trial sheet, read strictly: every problem is named with its line, and none is guessed away."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm2vla_client.errors import ConfigurationError, RecordingError
from vlm2vla_client.evaluation.sheet import FAULTS, FILLED, KEY, SHEET, Planned, read_json, read_plan, stages_of
from vlm2vla_client.evaluation.trial import cycle_seconds, failure_of
from vlm2vla_client.evaluation.trials import Override, Trial
from vlm2vla_client.recorder import read_episode
from vlm2vla_twin.tasks import SUITES, decomposed, score_of

_NEEDS = {"grasped": "contact", "placed": "grasped", "lifted": "contact"}
"""A stage and the one of the same object that must have come before it."""
_YES_NO = {"yes": True, "y": True, "no": False, "n": False, "": None, "-": None}
MAX_CYCLES = 1000


class SheetError(ConfigurationError):
    """The sheet cannot be read as it is; ``problems`` has one line each."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}; nothing was written")
        self.problems = problems


@dataclass
class Filled:
    """What a sheet says about one policy.

    Attributes:
        trials: with the keywords' verdict on plans where a recording was named, else the person's.
        overrides: the person's verdicts on plans.
    """

    policy: str
    trials: list[Trial] = field(default_factory=list)
    overrides: dict[tuple[str, int], Override] = field(default_factory=dict)
    left_out: int = 0


def read_sheet(
    folder: Path, *, key: Path | None = None, sheet: Path | None = None, partial: bool = False
) -> list[Filled]:
    """The trials of a filled sheet by policy.

    Args:
        key: who is who; default ``key.json`` of the folder.
        sheet: the filled table, default ``sheet.csv`` of the folder; commas, semicolons or tabs between columns.
        partial: leave out lines that nobody filled; else they are a problem.

    Raises:
        SheetError: with every problem by line.
        ConfigurationError: a file is missing.
    """
    planned, mode = read_plan(folder)
    path = sheet or folder / SHEET
    who = _who(key or folder / KEY, {line.policy for line in planned})
    problems: list[str] = []
    rows = _rows(path, planned, problems)
    found = {label: Filled(str(facts["policy"])) for label, facts in who.items()}
    for number, line, row in rows:
        mine = found[line.policy]
        if partial and not any(row[name] for name in FILLED):
            mine.left_out += 1
            continue
        reader = _Line(line, row, mode, mine.policy, bool(who[line.policy]["planning"]), path.parent)
        try:
            trial, override = reader.read()
        except ValueError as error:
            problems += [f"line {number}: {problem}" for problem in error.args[0]]
            continue
        mine.trials.append(trial)
        if override is not None:
            mine.overrides[trial.key] = override
    if problems:
        raise SheetError(path, problems)
    return list(found.values())


def _who(path: Path, wanted: set[str]) -> Mapping[str, Mapping[str, Any]]:
    labels = read_json(path).get("labels")
    good = isinstance(labels, dict) and all(
        isinstance(item, dict) and isinstance(item.get("policy"), str) and isinstance(item.get("planning"), bool)
        for item in labels.values()
    )
    if not isinstance(labels, dict) or not good or set(labels) != wanted:
        raise ConfigurationError(f"{path} is not the key of this sheet: it must name {', '.join(sorted(wanted))}")
    return labels


def _rows(path: Path, planned: list[Planned], problems: list[str]) -> list[tuple[int, Planned, dict[str, str]]]:
    """Line number, what was planned and what stands there, for every line that is one of the plan's."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigurationError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not readable as UTF-8 text ({error}); save it as CSV UTF-8") from None
    names = [*(item.name for item in fields(Planned)), *FILLED]
    separator = next((one for one in (",", ";", "\t") if text.startswith(f"trial{one}")), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines = {line.trial: line for line in planned}
    seen: dict[int, int] = {}
    rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        if header != names:
            raise SheetError(path, [f"line 1: expected the columns {', '.join(names)}; found {', '.join(header)}"])
        for cells in reader:
            number = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                problems.append(f"line {number}: expected {len(names)} columns, found {len(cells)}")
                continue
            row = dict(zip(names, (cell.strip() for cell in cells), strict=True))
            line = lines.get(int(row["trial"])) if row["trial"].isdecimal() else None
            if line is None:
                problems.append(f"line {number}: trial {row['trial']!r} is not in the plan (1 to {len(lines)})")
            elif line.trial in seen:
                problems.append(f"line {number}: trial {line.trial} stands on line {seen[line.trial]} already")
            elif changed := [name for name, value in asdict(line).items() if row[name] != str(value)]:
                was = ", ".join(f"{name} {asdict(line)[name]!r}" for name in changed)
                problems.append(f"line {number}: what was printed was changed; expected {was}")
                seen[line.trial] = number
            else:
                seen[line.trial] = number
                rows.append((number, line, row))
    except csv.Error as error:
        raise SheetError(path, [f"line {reader.line_num}: {error}"]) from None
    if missing := sorted(lines.keys() - seen.keys()):
        problems.append(f"trials missing: {_numbers(missing)}")
    return rows


def _numbers(values: Iterable[int]) -> str:
    some = list(values)
    return ", ".join(map(str, some[:20])) + (f" and {len(some) - 20} more" if len(some) > 20 else "")


@dataclass
class _Line:
    """One filled line on its way to a trial; ``read`` raises ValueError with a list of problems."""

    line: Planned
    row: Mapping[str, str]
    mode: str
    policy: str
    planning: bool
    folder: Path
    problems: list[str] = field(default_factory=list)

    def read(self) -> tuple[Trial, Override | None]:
        flags, hand = self._flags(), self._plan()
        cycles, fault, recorded = self._cycles(), self._fault(), self._recorded()
        if not self.row["by"]:
            self.problems.append("by: who scored it?")
        suite = SUITES[self.line.suite]
        words = [*recorded.subtasks, *recorded.plans]
        keywords: bool | None = None
        if suite.plan_counts and self.planning:
            keywords = self._by_keywords(words) if recorded.known else hand
            if keywords is None:
                self.problems.append("plan: expected yes or no, or the recording to look the words up")
        if self.problems:
            raise ValueError(self.problems)
        override = None
        if suite.plan_counts and hand is not None:
            override = Override(self.line.suite, self.line.start, hand, self.row["by"], self.row["notes"])
        return self._trial(flags, keywords, cycles, fault, recorded), override

    def _trial(
        self, flags: dict[str, bool], credit: bool | None, cycles: int | None, fault: str, recorded: _Recorded
    ) -> Trial:
        line, outcome = self.line, fault or "executed"
        score = score_of(SUITES[line.suite], flags, credit, self.planning)
        return Trial(
            suite=line.suite, task=line.task, seed=line.start, mode=self.mode, policy=self.policy, model=self.policy,
            verifier="person", planning=self.planning, score=score.score, max_score=score.max_score,
            planning_score=score.planning_score, non_planning_score=score.non_planning_score, plan_credit=credit,
            success=score.success, verified=recorded.verified, failure=failure_of(score.success, flags, outcome),
            flags=flags, outcome=outcome, message=self.row["notes"],
            cycles=recorded.cycles if cycles is None else cycles, seconds=recorded.seconds, subtasks=recorded.subtasks,
            plans=recorded.plans, subtasks_done=0, rows_executed=0, rows_changed=0, rows_refused=0,
            cycle_seconds=recorded.cycle_seconds, verify_seconds=[], retried_cycles=recorded.retried, retries=0,
            commit=None, finished_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip

    def _flags(self) -> dict[str, bool]:
        stages = stages_of(self.line.suite)
        text = self.row["reached"].lower().replace(" ", "").replace(",", "")
        letters = "" if text in ("-", "0") else text
        if not text:
            self.problems.append("reached: empty; write the letters that were seen, or - for none")
        if strange := sorted(set(letters) - set(stages)):
            self.problems.append(f"reached: {', '.join(map(repr, strange))} is no key of this task ({self.line.keys})")
        flags = {stage: letter in letters for letter, stage in stages.items()}
        for stage, reached in flags.items():
            kind, _, thing = stage.partition("_")
            needed = "_".join(filter(None, (_NEEDS.get(kind), thing)))
            if kind == "toward":
                needed = "placed_eggplant"
            if reached and kind in (*_NEEDS, "toward") and not flags[needed]:
                self.problems.append(f"reached: {stage.replace('_', ' ')} without {needed.replace('_', ' ')}")
        if "toward_fish" in flags:  # whoever touches the fish afterwards has moved toward it
            flags["toward_fish"] |= flags["placed_eggplant"] and flags["contact_fish"]
        return flags

    def _plan(self) -> bool | None:
        text = self.row["plan"].lower()
        if text not in _YES_NO:
            self.problems.append(f"plan: expected yes or no, found {self.row['plan']!r}")
            return None
        given = _YES_NO[text]
        if given is not None and not SUITES[self.line.suite].plan_counts:
            self.problems.append("plan: this task gives no credit for one; leave it empty")
        elif given is not None and not self.planning:
            self.problems.append("plan: by the key this policy writes none; leave it empty")
        return given

    def _cycles(self) -> int | None:
        text = self.row["cycles"]
        if not text:
            return None
        if not text.isdecimal() or int(text) > MAX_CYCLES:
            self.problems.append(f"cycles: expected a whole number up to {MAX_CYCLES}, found {text!r}")
            return None
        return int(text)

    def _fault(self) -> str:
        text = self.row["fault"].lower()
        if text in ("", "-"):
            return ""
        if text not in FAULTS:
            self.problems.append(f"fault: expected one of {', '.join(FAULTS)} or nothing, found {self.row['fault']!r}")
        return text

    def _by_keywords(self, words: list[str]) -> bool:
        suite = SUITES[self.line.suite]
        told = self.line.task.casefold().strip()
        own = "\n".join(text for text in words if text.casefold().strip() != told)
        return decomposed(suite.keywords(suite.scene(self.line.start, self.mode)), own)

    def _recorded(self) -> _Recorded:
        name = self.row["recording"]
        if not name:
            return _Recorded()
        try:
            episode = read_episode(self.folder / name)
        except RecordingError as error:
            self.problems.append(f"recording: {error}")
            return _Recorded()
        if episode.task != self.line.task:
            self.problems.append(f"recording: its task is {episode.task!r}, not {self.line.task!r}")
        summary = episode.summary or {}
        seconds, retried = cycle_seconds(episode.events)
        return _Recorded(
            known=True,
            subtasks=[str(item) for item in summary.get("subtasks", [])],
            plans=[str(event.get("motion_plan", "")) for event in episode.of("plan")],
            cycles=int(summary.get("cycles", 0)),
            seconds=float(summary.get("seconds", 0.0)),
            verified=bool(summary.get("verified", False)),
            cycle_seconds=seconds,
            retried=retried,
        )


@dataclass(frozen=True)
class _Recorded:
    """What the recording of a trial adds: words for the keywords of D.3, and times."""

    known: bool = False
    subtasks: list[str] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    cycles: int = 0
    seconds: float = 0.0
    verified: bool = False
    cycle_seconds: list[float] = field(default_factory=list)
    retried: int = 0
