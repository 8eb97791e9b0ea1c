"""A recorded episode moved again: the same rows from the same start, through today's filter and executor.

Nothing is asked of a model: subtasks, plans, rows and verdicts are the recorded ones. In the twin the scene is rebuilt
from the recording, so that a replay shows whether the same words still give the same motion; the summary says how far
the end effector strayed from the recorded path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vla_client.episode import EpisodeResult
from vlm2vla_client.errors import NotCompletedError, RecordingError, VerifierError
from vlm2vla_client.policies.base import (
    ALL_STAGES,
    Answered,
    Asked,
    CycleEvent,
    PlanArrived,
    PolicyInfo,
    RowArrived,
    Scenario,
    SubtasksAnswer,
)
from vlm2vla_client.progress import Progress
from vlm2vla_client.recorder import RecordedEpisode, read_episode
from vlm2vla_schema.types import Frame, Verdict


class RecordedPolicy:
    """Gives the recorded subtasks, plans and rows, cycle by cycle."""

    name = "replay"

    def __init__(self, episode: RecordedEpisode) -> None:
        self._subtasks = [str(name) for event in episode.of("subtasks")[:1] for name in event.get("subtasks", [])]
        if not self._subtasks:
            raise RecordingError(f"{episode.folder} ended before its subtasks were known: there is nothing to replay")
        self._steps_per_verdict = int((episode.header.get("policy") or {}).get("steps_per_verdict", 1))
        self._cycles = _cycles(episode)
        self._next = 0

    def info(self) -> PolicyInfo:
        """All stages; not trained to act."""
        return PolicyInfo(
            name="replay", trained_to_act=False, stages=ALL_STAGES, steps_per_verdict=self._steps_per_verdict
        )

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """The recorded list."""
        return SubtasksAnswer(list(self._subtasks))

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """The next recorded cycle.

        Raises:
            NotCompletedError: the recording holds no more.
        """
        if self._next >= len(self._cycles):
            raise NotCompletedError("the recording ends here")
        plan, rows = self._cycles[self._next]
        self._next += 1
        if plan is not None:
            yield PlanArrived(plan)
        for index, row in enumerate(rows):
            yield RowArrived(index, row, asked.episode_id)
        yield Answered(rows, plan, asked.episode_id)

    def alive(self, timeout_s: float) -> bool:
        """Always there."""
        return True

    def close(self) -> None:
        """Nothing to free."""


class RecordedVerifier:
    """Gives the recorded verdicts in order; where they end, none."""

    name = "replay"
    checks = True

    def __init__(self, episode: RecordedEpisode) -> None:
        self._verdicts = episode.of("verdict")
        self._next = 0

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        """The next recorded verdict."""
        if self._next >= len(self._verdicts):
            raise VerifierError("the recording holds no further verdict")
        event = self._verdicts[self._next]
        self._next += 1
        return Verdict(event.get("success") is True, event.get("confidence", "Low"), str(event.get("reasoning", "")))

    def close(self) -> None:
        """Nothing to free."""


def _cycles(episode: RecordedEpisode) -> list[tuple[str | None, list[list[float]]]]:
    """Plan and rows of every recorded cycle whose rows were taken by the executor."""
    plans: dict[int, str] = {}
    rows: dict[int, dict[int, list[float]]] = {}
    moved = {event["cycle"] for event in episode.of("decision") if isinstance(event.get("cycle"), int)}
    for event in episode.events:
        cycle = event.get("cycle")
        if not isinstance(cycle, int) or cycle not in moved:
            continue
        if event["event"] == "plan":
            plans[cycle] = str(event.get("motion_plan"))
        elif event["event"] == "decision" and isinstance(event.get("row"), list):
            rows.setdefault(cycle, {})[int(event.get("index", 0))] = [float(v) for v in event["row"]]
    return [(plans.get(cycle), [rows[cycle][index] for index in sorted(rows[cycle])]) for cycle in sorted(rows)]


@dataclass(frozen=True)
class ReplayResult:
    """What a replay showed.

    Attributes:
        largest_gap_m: between the arm's positions at the same row of both recordings; None when nothing moved.
        same_decisions: whether the filter decided every row as before.
    """

    result: EpisodeResult
    folder: Path
    steps: int
    largest_gap_m: float | None
    same_decisions: bool


def compare(old: RecordedEpisode, new: RecordedEpisode) -> tuple[int, float | None, bool]:
    """Rows compared, the largest distance between their start positions, and whether the decisions are the same."""
    gaps = []
    for one, other in zip(_steps(old), _steps(new), strict=False):
        gaps.append(float(np.linalg.norm(np.array(one["state"][:3]) - np.array(other["state"][:3]))))
    decided = [[(e.get("verdict"), e.get("reasons")) for e in episode.of("decision")] for episode in (old, new)]
    return len(gaps), max(gaps, default=None), decided[0] == decided[1]


def _steps(episode: RecordedEpisode) -> list[dict[str, Any]]:
    return [event for event in episode.events if event["event"] in ("step", "step_unseen")]


def replay_in_twin(source: Path, folder: Path, progress: Progress, *, realtime: bool = False) -> ReplayResult:
    """Replays an episode of the twin into a new folder.

    Raises:
        RecordingError: not an episode, not one of the twin, or it ended before anything could be replayed.
    """
    from vlm2vla_client.scenes import SceneChoice, choose_scene, scene_from_json
    from vlm2vla_client.sim import SimBench, SimRequest, run_parts

    old = read_episode(source)
    config = old.header.get("config") or {}
    if config.get("robot") != "twin":
        raise RecordingError(f"{source} was recorded on {config.get('robot')!r}: only the twin's episodes are replayed")
    policy, verifier = RecordedPolicy(old), RecordedVerifier(old)
    spec = scene_from_json(config.get("scene_spec"))
    suite = choose_scene(old.task, None, spec.seed).suite
    scenario: Scenario = "in_distribution" if config.get("scenario") == "in_distribution" else "out_of_distribution"
    choice = SceneChoice(str(config.get("scene")), spec, scenario, suite, spec.seed)
    request = SimRequest(
        task=old.task,
        choice=choice,
        policy="replay",
        speed=float(config.get("speed", 1.0)),
        realtime=realtime,
        max_cycles=len(old.of("verdict")) + 1,
        max_cycles_per_subtask=0,
    )
    bench = SimBench.open(choice, old.limits or {}, realtime)
    try:
        result = run_parts(request, bench, policy, verifier, folder, progress)
    finally:
        bench.close()
    steps, gap_m, same = compare(old, read_episode(folder))
    return ReplayResult(result, folder, steps, gap_m, same)
