"""What an annotated episode is (D_lan, the schema of appendix B.1) and what an annotator does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.errors import DataError


@dataclass(frozen=True)
class AnnotatedStep:
    """One subtask of a trajectory. `first` and `last` are inclusive original step numbers; `actions` are the rows
    [dx_m, dy_m, dz_m, gripper] of that range, cut from the log and never from the annotator's text. `missed` marks a
    step that did not reach what it describes, as its consequences in the log show: a failure for the verifier to learn
    from, not to be imitated. `author` is "human" where a person wrote the words and a verifier agreed that they were
    done. `cut` marks what such a step left of another one: its words are about more rows than it has, so it gives no
    example.
    """

    step_description: str
    reasoning: str
    main_movements: str
    first: int
    last: int
    actions: list[list[float]]
    missed: bool = False
    author: str = ""
    cut: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of contracts; `author` and `cut` only where they say something."""
        return {name: value for name, value in vars(self).items() if value or name not in ("author", "cut")}


@dataclass(frozen=True)
class AnnotatedEpisode:
    """One line of the annotated dataset."""

    episode_key: str
    instruction: str
    annotator: str
    steps: list[AnnotatedStep]
    audit: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON-lines object of contracts."""
        return {
            "episode_key": self.episode_key,
            "instruction": self.instruction,
            "annotator": self.annotator,
            "steps": [step.to_json() for step in self.steps],
            "audit": self.audit,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AnnotatedEpisode:
        """Read one object.

        Raises:
            DataError: a field is missing or has another type.
        """
        try:
            steps = [
                AnnotatedStep(
                    step_description=str(step["step_description"]),
                    reasoning=str(step["reasoning"]),
                    main_movements=str(step["main_movements"]),
                    first=int(step["first"]),
                    last=int(step["last"]),
                    actions=[[float(number) for number in row] for row in step["actions"]],
                    missed=bool(step.get("missed", False)),
                    author=str(step.get("author", "")),
                    cut=bool(step.get("cut", False)),
                )
                for step in value["steps"]
            ]
            return cls(
                str(value["episode_key"]), str(value["instruction"]), str(value["annotator"]), steps, value["audit"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"annotated episode {value.get('episode_key')!r} is broken: {error!r}") from error


class Annotator(Protocol):
    """Splits a trajectory into steps and says each in words."""

    name: str

    def annotate(self, episode: Episode) -> AnnotatedEpisode:
        """Annotate one episode; may block on the network. It sees only what a robot log holds.

        Raises:
            TrainingError: the episode cannot be annotated; the caller counts and names it.
        """
        ...


def step_from_log(
    episode: Episode,
    description: str,
    reasoning: str,
    main_movements: str,
    begin: int,
    end: int,
    missed: bool = False,
) -> AnnotatedStep:
    """Build a step over the half-open row range [begin, end) of the episode; actions are copied from the log."""
    rows = [[float(row[0]), float(row[1]), float(row[2]), float(row[6])] for row in episode.actions[begin:end]]
    first = episode.first_step + begin
    return AnnotatedStep(description, reasoning, main_movements, first, first + len(rows) - 1, rows, missed)
