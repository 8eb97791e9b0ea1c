"""The loop with typed doubles: order of the stages, verdicts, budgets, faults and exit codes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from client_fakes import (
    EPISODE,
    FakeCamera,
    FakeClock,
    FakeExecutor,
    FakeRobot,
    ScriptedPolicy,
    ScriptedVerifier,
)

from vlm2vla_client import errors, recorder
from vlm2vla_client.confirm import Edit, Proposal
from vlm2vla_client.executor import Outcome
from vlm2vla_client.loop import EpisodeResult, LoopConfig, Parts, run_episode
from vlm2vla_client.moves import Moves
from vlm2vla_client.operator_keys import NoOperator, Operator
from vlm2vla_client.policies.base import Answered, Asked, CycleEvent, PolicyInfo, RowArrived
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import RecordedEpisode, Recorder, read_episode
from vlm2vla_client.safety import Limits
from vlm2vla_client.shadow import Shadow
from vlm2vla_client.verifiers.base import Verifier
from vlm2vla_client.verifiers.chain import ChainVerifier
from vlm2vla_client.verifiers.none import NoVerifier
from vlm2vla_client.watch import Watch
from vlm2vla_schema.types import Frame

ROWS = [[0.01, 0.0, -0.02, 1.0], [0.0, 0.0, -0.03, 0.0]]
OTHER = [[0.0, 0.0, 0.04, 1.0]]
SUBTASKS = ["Move to Carrot", "Grasp Carrot", "Lift Carrot"]
LIMITS = Limits(counter_z_m=0.0, wall_x_m=0.56, max_joint_speed_rad_s=3.14)


@dataclass
class Bench:
    """One episode's doubles and what came of them."""

    folder: Path
    policy: Any
    verifier: Verifier
    script: list[Outcome | BaseException] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    confirm: Any = None
    judge: Any = None
    operator: Operator = field(default_factory=NoOperator)
    shadow: Shadow | None = None
    free_bytes: Any = lambda folder: 1 << 40

    def run(self) -> EpisodeResult:
        self.clock = FakeClock()
        self.robot, self.camera = FakeRobot(self.clock), FakeCamera(self.clock)
        tape, progress = Recorder(self.folder, free_bytes=self.free_bytes), SilentProgress()
        moves = Moves(tape, progress, self.robot, self.camera, LIMITS)
        self.executor = FakeExecutor(self.robot, moves, self.script)
        parts = Parts(
            policy=self.policy,
            robot=self.robot,
            camera=self.camera,
            verifier=self.verifier,
            executor=self.executor,
            moves=moves,
            watch=Watch(self.policy),
            clock=self.clock,
            recorder=tape,
            progress=progress,
            confirm=self.confirm,
            judge=self.judge,
            operator=self.operator,
            shadow=self.shadow,
        )
        try:
            return run_episode(parts, LoopConfig(task="pick up the carrot", episode_id=EPISODE, **self.config))
        finally:
            tape.close()

    def recording(self) -> RecordedEpisode:
        return read_episode(self.folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "episode"


def test_every_subtask_once_in_order_when_all_succeed(folder: Path) -> None:
    verifier = ScriptedVerifier([True])
    bench = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), verifier)
    result = bench.run()
    assert (result.exit_code, result.outcome, result.cycles, result.subtasks_done) == (0, "verified", 3, 3)
    assert result.verified and result.success
    assert len(bench.policy.asked_subtasks) == 1
    assert [subtask for _, subtask in bench.policy.asked_cycles] == SUBTASKS
    # (the frame the chunk was computed from, a fresh frame, l_i, l_i+1 or null)
    befores = [frame for frame, _ in bench.policy.asked_cycles]
    assert [(before, subtask, after_next) for before, _, subtask, after_next in verifier.calls] == [
        (befores[0], SUBTASKS[0], SUBTASKS[1]),
        (befores[1], SUBTASKS[1], SUBTASKS[2]),
        (befores[2], SUBTASKS[2], None),
    ]
    assert all(before != after for before, after, _, _ in verifier.calls)
    assert bench.executor.chunks == [ROWS] * 3


def test_a_failed_verdict_repeats_the_subtask_with_a_new_frame(folder: Path) -> None:
    bench = Bench(folder, ScriptedPolicy(SUBTASKS[:2], [ROWS]), ScriptedVerifier([False, False, True, True]))
    result = bench.run()
    assert (result.exit_code, result.cycles) == (0, 4)
    assert [subtask for _, subtask in bench.policy.asked_cycles] == [SUBTASKS[0]] * 3 + [SUBTASKS[1]]
    assert len({frame for frame, _ in bench.policy.asked_cycles}) == 4
    assert len(bench.policy.asked_subtasks) == 1


@pytest.mark.parametrize(
    ("config", "cycles"),
    [({}, 5), ({"max_cycles": 3}, 3), ({"max_cycles_per_subtask": 2}, 2), ({"max_cycles_per_subtask": 0}, 30)],
)
def test_budgets_end_in_exit_3(folder: Path, config: dict[str, Any], cycles: int) -> None:
    bench = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), ScriptedVerifier([False]), config=config)
    result = bench.run()
    assert (result.exit_code, result.outcome, result.cycles) == (3, "not_completed", cycles)
    assert not result.verified and bench.robot.holds


def test_until_done_has_no_budget(folder: Path) -> None:
    verdicts: list[bool | Exception] = [*[False] * 40, True]
    bench = Bench(folder, ScriptedPolicy(["Lift"], [ROWS]), ScriptedVerifier(verdicts), config={"max_cycles": 0})
    assert (bench.run().cycles, bench.recording().of("end")[0]["exit_code"]) == (41, 0)


def test_a_policy_with_actions_only_takes_the_task_as_its_only_subtask(folder: Path) -> None:
    info = PolicyInfo(name="nr", trained_to_act=True, stages=("actions",))
    bench = Bench(folder, ScriptedPolicy(["never asked"], [ROWS], info), ScriptedVerifier([*[False] * 11, True]))
    result = bench.run()
    assert result.exit_code == 0 and result.subtasks == ["pick up the carrot"]
    assert result.cycles == 12 and result.plans == []
    assert bench.policy.asked_subtasks == []


def test_with_no_verifier_everything_is_executed_and_said_to_be_unverified(folder: Path) -> None:
    result = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), NoVerifier()).run()
    assert (result.exit_code, result.outcome, result.verified, result.success) == (0, "executed", False, False)
    assert "nothing was verified" in result.message


def test_with_no_verifier_a_chunk_that_was_refused_is_not_done(folder: Path) -> None:
    bench = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), NoVerifier(), script=[Outcome.NOT_STARTED])
    assert bench.run().cycles == 4


@pytest.mark.parametrize("fault", [errors.VerifierError("timeout"), ValueError("a bug"), TimeoutError()])
def test_a_verifier_that_errs_is_never_a_success(folder: Path, fault: Exception) -> None:
    bench = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), ScriptedVerifier([fault]))
    result = bench.run()
    assert (result.exit_code, result.subtasks_done, result.cycles) == (3, 0, 1)
    assert bench.robot.holds


def test_the_chain_holds_retries_and_turns_to_the_next(folder: Path) -> None:
    first, second = ScriptedVerifier([errors.VerifierError("down")], "first"), ScriptedVerifier([True], "second")
    bench = Bench(folder, ScriptedPolicy(["Lift"], [ROWS]), ChainVerifier([first, second]))
    assert bench.run().exit_code == 0
    assert (len(first.calls), len(second.calls)) == (2, 1)
    assert len(bench.robot.holds) == 2
    recorded = [event["where"] for event in bench.recording().of("error")]
    assert recorded == ["verifier first", "verifier first"]


@pytest.mark.parametrize(
    ("fault", "exit_code"),
    [
        (errors.ServerUnreachableError("gone", code="connect"), 4),
        (errors.ProtocolMismatchError("odd", code="bad_answer"), 4),
        (errors.EngineFailedError("engine", code="engine_failure"), 4),
        (errors.RequestRefusedError("no", code="unauthorized"), 4),
        (errors.AnswerCancelledError("newer", code="cancelled"), 4),
        (errors.CameraError("dark"), 6),
        (errors.RobotError("stuck"), 7),
        (errors.SafetyStop("stop"), 5),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a bug"), 3),
    ],
)
@pytest.mark.parametrize("where", ["subtasks", "cycle", "execute"])
def test_every_fault_holds_and_has_its_exit_code(
    folder: Path, fault: BaseException, exit_code: int, where: str
) -> None:
    policy: Any = ScriptedPolicy(SUBTASKS, [ROWS])
    bench = Bench(folder, policy, ScriptedVerifier([True]))
    if where == "subtasks":
        policy._subtasks = fault
        policy.subtasks = _raiser(fault)
    elif where == "cycle":
        policy._chunks = [fault]
        policy.cycle = _raiser(fault)
    else:
        bench.script = [fault]
    result = bench.run()
    assert result.exit_code == exit_code
    assert bench.robot.holds
    recording = bench.recording()
    assert recording.summary is not None and recording.summary["exit_code"] == exit_code
    assert recording.of("error") and recording.of("end")


def _raiser(fault: BaseException) -> Any:
    def call(*_: Any) -> Any:
        raise fault

    return call


def test_a_camera_that_fails_before_planning_ends_in_exit_6(folder: Path) -> None:
    bench = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), ScriptedVerifier([True]))

    class Blind(ScriptedPolicy):
        def subtasks(self, *arguments: Any) -> Any:
            bench.camera.errors.append(errors.CameraError("no frame within 0.5 s"))
            return super().subtasks(*arguments)

    bench.policy = Blind(SUBTASKS, [ROWS])
    assert bench.run().exit_code == 6


def test_an_unusable_answer_costs_a_cycle_and_a_new_frame_is_tried(folder: Path) -> None:
    unusable = errors.AnswerUnusableError("never parsed", code="unparseable_output", details={"attempts": ["["]})
    bench = Bench(folder, ScriptedPolicy(["Lift"], [unusable, unusable, ROWS]), ScriptedVerifier([True]))
    result = bench.run()
    assert (result.exit_code, result.cycles) == (0, 3)
    assert bench.executor.chunks == [ROWS]
    assert bench.recording().of("error")[0]["details"] == {"attempts": ["["]}


def test_unusable_subtasks_are_asked_for_three_times(folder: Path) -> None:
    unusable = errors.AnswerUnusableError("never parsed", code="unparseable_output")
    bench = Bench(folder, ScriptedPolicy(unusable, [ROWS]), ScriptedVerifier([True]))
    assert bench.run().exit_code == 4
    assert len(bench.policy.asked_subtasks) == 3


def test_a_busy_server_is_given_the_time_it_asks_for(folder: Path) -> None:
    busy = errors.ServerBusyError("overloaded", code="overloaded", retry_after_s=0.01)
    bench = Bench(folder, ScriptedPolicy(["Lift"], [busy, ROWS]), ScriptedVerifier([True]))
    assert bench.run().exit_code == 0
    always = Bench(folder.with_name("b"), ScriptedPolicy(busy, [ROWS]), ScriptedVerifier([True]))
    assert always.run().exit_code == 4


def test_a_chunk_that_may_not_start_is_planned_anew_without_a_verdict(folder: Path) -> None:
    verifier = ScriptedVerifier([True])
    bench = Bench(folder, ScriptedPolicy(["Lift"], [ROWS]), verifier, script=[Outcome.NOT_STARTED])
    assert bench.run().cycles == 2
    assert len(verifier.calls) == 1


def test_three_refused_chunks_in_a_row_are_a_safety_stop(folder: Path) -> None:
    bench = Bench(folder, ScriptedPolicy(["Lift"], [ROWS]), ScriptedVerifier([False]), script=[Outcome.REFUSED] * 3)
    result = bench.run()
    assert (result.exit_code, result.outcome, result.rows_refused, result.rows_executed) == (5, "safety_stop", 3, 0)


def test_a_fault_of_the_monitor_without_a_cause_of_its_own_is_a_safety_stop(folder: Path) -> None:
    bench = Bench(folder, ScriptedPolicy(["Lift"], [ROWS]), ScriptedVerifier([True]), script=[Outcome.FAULT])
    assert bench.run().exit_code == 5


def test_a_dry_run_asks_and_filters_and_never_moves(folder: Path) -> None:
    bench = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), ScriptedVerifier([True]), config={"dry_run": True})
    result = bench.run()
    assert (result.exit_code, result.outcome, result.cycles) == (0, "dry_run", 1)
    assert bench.executor.chunks == [] and not result.verified
    assert bench.recording().of("decision")[0]["dry_run"] is True


def test_the_operator_is_asked_before_every_chunk_and_no_means_plan_anew(folder: Path) -> None:
    asked_for: list[Proposal] = []

    def confirm(proposal: Proposal) -> bool:
        asked_for.append(proposal)
        return len(asked_for) > 1

    bench = Bench(folder, ScriptedPolicy(["Lift"], [ROWS]), ScriptedVerifier([True]), confirm=confirm)
    assert bench.run().cycles == 2
    assert asked_for[0] == Proposal("Lift", "move down", ROWS)
    assert bench.recording().of("dropped")[0]["reason"] == "declined by the operator"


@pytest.mark.parametrize(
    ("edit", "plan"), [(Edit("Lift", "move up"), "move up"), (Edit("Lift higher"), "move down")]
)
def test_an_operators_words_replace_the_policys_from_a_fresh_frame_on(folder: Path, edit: Edit, plan: str) -> None:
    answers: list[Proposal] = []

    def confirm(proposal: Proposal) -> bool | Edit:
        answers.append(proposal)
        return edit if len(answers) == 1 else True

    bench = Bench(folder, ScriptedPolicy(["Lift"], [ROWS, OTHER]), ScriptedVerifier([True]), confirm=confirm)
    assert bench.run().exit_code == 0
    assert answers == [Proposal("Lift", "move down", ROWS), Proposal(edit.subtask, plan, OTHER)]
    recording = bench.recording()
    (correction,) = recording.of("correction")
    assert correction["subtask"] == {"from": "Lift", "to": edit.subtask}
    assert correction["motion_plan"] == {"from": "move down", "to": edit.motion_plan} and correction["rows"] == ROWS
    frames = [event["frame"] for event in recording.of("request") if event["stage"] == "cycle"]
    assert len(frames) == 2 and frames[1] > frames[0]
    assert len(bench.executor.chunks) == 1 and recording.of("verdict")[0]["subtask"] == edit.subtask


def test_the_name_of_a_subtask_that_was_done_goes_back_to_it(folder: Path) -> None:
    """The carrot slipped: what is needed is another grasp, and after it the lift once more."""
    answers: list[str] = []

    def confirm(proposal: Proposal) -> bool | Edit:
        answers.append(proposal.subtask)
        return Edit("grasp carrot") if len(answers) == 3 else True

    bench = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), ScriptedVerifier([True]), confirm=confirm)
    result = bench.run()
    assert (result.exit_code, result.cycles, result.subtasks_done) == (0, 5, 3)
    assert answers == [*SUBTASKS, "grasp carrot", SUBTASKS[2]]
    verdicts = bench.recording().of("verdict")
    assert [event["subtask_index"] for event in verdicts] == [0, 1, 1, 2]
    assert bench.recording().of("correction")[0]["subtask_index"] == 1, "where the words are followed"


def test_an_operators_words_outlive_an_answer_that_failed(folder: Path) -> None:
    answers: list[Proposal] = []

    def confirm(proposal: Proposal) -> bool | Edit:
        answers.append(proposal)
        return Edit("Lift", "move up") if len(answers) == 1 else True

    lost = errors.AnswerUnusableError("no usable rows", code="unparseable_output")
    bench = Bench(folder, ScriptedPolicy(["Lift"], [ROWS, lost, OTHER]), ScriptedVerifier([True]), confirm=confirm)
    assert bench.run().cycles == 3
    assert answers[1] == Proposal("Lift", "move up", OTHER)


def test_the_filter_is_told_ages_and_episode(folder: Path) -> None:
    class Slow(ScriptedPolicy):
        def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
            bench.clock.time_s += 2.0
            yield from super().cycle(frame, subtask, asked)

    bench = Bench(folder, Slow(["Lift"], [ROWS]), ScriptedVerifier([True]))
    assert bench.run().exit_code == 0
    context = bench.executor.contexts[0]
    assert (context.episode_id, context.row_episode_id) == (EPISODE, EPISODE)
    assert context.frame_age_at_send_s == 0.0
    assert context.answer_age_s == pytest.approx(2.0)


class Streaming(ScriptedPolicy):
    """Lets the test hold back the rest of the answer until the first row was taken."""

    def __init__(self, go_on: threading.Event, end: BaseException | None = None) -> None:
        super().__init__(["Lift"], [ROWS])
        self._go_on, self._end = go_on, end

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        yield RowArrived(0, ROWS[0], asked.episode_id)
        assert self._go_on.wait(5.0)
        if self._end is not None:
            raise self._end
        yield RowArrived(1, ROWS[1], "another episode" if subtask == "foreign" else asked.episode_id)
        yield Answered(ROWS, None, asked.episode_id)


def test_streamed_execution_starts_before_the_answer_is_complete(folder: Path) -> None:
    go_on = threading.Event()
    bench = Bench(folder, Streaming(go_on), ScriptedVerifier([True]), config={"execute": "streamed"})

    def when_moving() -> None:
        while getattr(bench, "executor", None) is None or bench.executor.taken == 0:
            time.sleep(0.005)
        go_on.set()

    watcher = threading.Thread(target=when_moving, daemon=True)
    watcher.start()
    assert bench.run().exit_code == 0
    assert bench.executor.chunks == [ROWS]


def test_whole_execution_waits_for_the_complete_answer(folder: Path) -> None:
    go_on = threading.Event()
    lost = errors.ServerUnreachableError("cut", code="stream_cut")
    bench = Bench(folder, Streaming(go_on, lost), ScriptedVerifier([True]))
    go_on.set()
    assert bench.run().exit_code == 4
    assert bench.executor.taken == 0


def test_a_server_lost_while_streaming_holds_the_arm(folder: Path) -> None:
    go_on = threading.Event()
    go_on.set()
    lost = errors.ServerUnreachableError("cut", code="stream_cut")
    bench = Bench(folder, Streaming(go_on, lost), ScriptedVerifier([True]), config={"execute": "streamed"})
    assert bench.run().exit_code == 4
    assert bench.executor.taken <= 1 and bench.robot.holds


def test_no_row_starts_of_an_answer_that_is_known_to_have_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that arrived before the error did are waiting in a queue: they are recorded, and stay there."""
    failed = threading.Event()

    class Cut(ScriptedPolicy):
        def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
            self.asked_cycles.append((frame.frame_id, subtask))
            for index, row in enumerate(ROWS):
                yield RowArrived(index, row, asked.episode_id)
            failed.set()
            raise errors.ServerUnreachableError("cut", code="stream_cut")

    policy = Cut(["Lift"], [ROWS])

    def slow_disk(_: Path) -> int:
        if policy.asked_cycles:
            assert failed.wait(5.0)
            time.sleep(0.05)
        return 1 << 40

    monkeypatch.setattr(recorder, "ROOM_CHECK_S", 0.0)
    bench = Bench(folder, policy, ScriptedVerifier([True]), config={"execute": "streamed"}, free_bytes=slow_disk)
    assert bench.run().exit_code == 4
    assert bench.executor.taken == 0 and bench.robot.holds
    (dropped,) = bench.recording().of("dropped")
    assert dropped["row"] == ROWS[0] and "failed" in dropped["reason"]


def test_an_answer_that_stalls_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2vla_client.arrivals.GRACE_S", 0.05)
    bench = Bench(folder, Streaming(threading.Event()), ScriptedVerifier([True]), config={"max_answer_age_s": 0.1})
    began_s = time.monotonic()
    result = bench.run()
    assert result.exit_code == 4 and "no complete answer" in result.message
    assert time.monotonic() - began_s < 2.0


def test_physics_decides_success_where_there_is_a_judge(folder: Path) -> None:
    seen: list[str] = []

    def judge(plans: str) -> dict[str, Any]:
        seen.append(plans)
        return {"score": 1, "max_score": 2, "success": False}

    result = Bench(folder, ScriptedPolicy(["Lift"], [ROWS]), ScriptedVerifier([True]), judge=judge).run()
    assert (result.exit_code, result.verified, result.success) == (0, True, False)
    assert result.physics == {"score": 1, "max_score": 2, "success": False} and seen == ["Lift\nmove down"]


def test_the_recording_tells_the_whole_story(folder: Path) -> None:
    bench = Bench(folder, ScriptedPolicy(SUBTASKS, [ROWS]), ScriptedVerifier([True]), config={"recorded": {"seed": 5}})
    bench.run()
    recording = bench.recording()
    assert recording.task == "pick up the carrot" and recording.header["config"]["seed"] == 5
    kinds = [event["event"] for event in recording.events if event.get("cycle") == 1]
    assert kinds == [
        "request", "plan", "row", "row", "answer",
        "decision", "step", "substep", "decision", "step", "substep", "chunk", "verdict",
    ]  # fmt: skip
    for event in [*recording.of("step"), *recording.of("request")]:
        assert recording.frame_path(event["frame"]).is_file()
    step = recording.of("step")[0]
    assert step["action"] == [0.01, 0.0, -0.02, 0.0, 0.0, 0.0, 1.0] and len(step["state"]) == 7
    assert recording.summary is not None
    assert recording.summary["subtasks"] == SUBTASKS and recording.summary["outcome"] == "verified"


@pytest.mark.parametrize("looks", range(1, 12))
def test_before_the_disk_is_full_the_arm_is_held_and_the_episode_is_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """Wherever the floor is reached: from the header to the last verdict."""
    monkeypatch.setattr(recorder, "ROOM_CHECK_S", 0.0)
    free = iter([1 << 40] * looks)
    bench = Bench(folder, ScriptedPolicy(SUBTASKS[:1], [ROWS]), ScriptedVerifier([True]))
    bench.free_bytes = lambda _: next(free, 1 << 20)
    result = bench.run()
    assert (result.exit_code, result.outcome) == (3, "not_completed") and "min_free_disk_mb" in result.message
    assert any("RecordingStoppedError" in reason for reason in bench.robot.holds)
    episode = bench.recording()
    kinds = [event["event"] for event in episode.events]
    assert kinds[0] == "episode" and kinds[-1] == "end" and not episode.truncated
    assert episode.of("error")[-1]["type"] == "RecordingStoppedError"
    assert episode.summary is not None and episode.summary["exit_code"] == 3
    assert "substep" not in kinds[kinds.index("error") :]
