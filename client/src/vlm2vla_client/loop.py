"""The loop of section 3.1 and appendix D.5, readable from top to bottom.

    subtasks, once, from the first frame
    for each subtask:   frame -> motion plan -> rows -> execute -> settle -> fresh frame -> verify
                        success: the next subtask; failure: the same one, with a new frame, plan and rows

A policy of single steps (a baseline) is judged after ``steps_per_verdict`` cycles without a verification in between.

It knows Protocols only. Whatever goes wrong, the arm is held before anything else is done about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.answer import Answer
from vlm2vla_client.arrivals import Arrivals
from vlm2vla_client.confirm import Edit, Proposal
from vlm2vla_client.episode import EpisodeResult, LoopConfig, Parts
from vlm2vla_client.errors import (
    AnswerUnusableError,
    ClientError,
    NotCompletedError,
    PolicyError,
    RecordingStoppedError,
    SafetyStop,
    ServerBusyError,
    VerifierError,
)
from vlm2vla_client.executor import ChunkResult, MotionStart, Outcome
from vlm2vla_client.moves import state_of
from vlm2vla_client.policies.base import Asked, SubtasksAnswer
from vlm2vla_client.recorder import FORMAT
from vlm2vla_client.safety_types import RobotState
from vlm2vla_client.shadow import Forecast
from vlm2vla_client.verifiers.base import Notes
from vlm2vla_client.verifiers.chain import ChainVerifier
from vlm2vla_schema.types import Frame, Verdict

__all__ = ["EpisodeResult", "LoopConfig", "Parts", "run_episode"]

MAX_FRAME_AGE_S = 0.5
FRAME_TIMEOUT_S = 3.0
MAX_BUSY_ANSWERS = 5
MAX_SUBTASKS_ATTEMPTS = 3
MAX_REFUSED_CHUNKS = 3
DEFAULT_BUSY_WAIT_S = 1.0


OUTCOMES = {2: "usage", 3: "not_completed", 4: "server", 5: "safety_stop", 6: "camera", 7: "robot", 130: "interrupted"}


def run_episode(parts: Parts, config: LoopConfig) -> EpisodeResult:
    """Runs one episode to its end and records it. Blocks for as long as the task takes; raises nothing of its own.

    Returns:
        The result; ``exit_code`` is 0 only when every subtask was verified (or executed, with verifier ``none``).
    """
    return _Episode(parts, config).run()


class _Episode:
    def __init__(self, parts: Parts, config: LoopConfig) -> None:
        self.parts, self.config = parts, config
        self.subtasks: list[str] = []
        self.done = 0
        self.cycles = 0
        self.held = 0
        self.refused_in_a_row = 0
        self.plans: list[str] = []
        self.edit: Edit | None = None
        self.unjudged: list[tuple[Frame, int]] = []  # the frames acted on since the last verdict, with their numbers
        self.back: int | None = None
        self.began_s = time.monotonic()

    # --- the whole episode ----------------------------------------------------------------------------------------

    def run(self) -> EpisodeResult:
        parts = self.parts
        if isinstance(parts.verifier, ChainVerifier):
            parts.verifier.on_failure(self._verifier_failed)
            recorder = parts.recorder
            parts.verifier.note_in(
                Notes(self._record, lambda frame: recorder.path_of(recorder.frame(frame)), parts.progress.quiet)
            )
        try:
            self._write_header()
            self._all_subtasks()
        except KeyboardInterrupt:
            return self._fault(KeyboardInterrupt("stopped by the operator"), 130)
        except ClientError as error:
            return self._fault(error, error.exit_code)
        except Exception as error:  # the arm must be held and the recording closed, whatever it was
            return self._fault(error, NotCompletedError.exit_code, "failed")
        if self.config.dry_run:
            return self._finish(0, "dry_run", "Nothing moved: this was a dry run.")
        if parts.verifier.checks:
            return self._finish(0, "verified", f"All {len(self.subtasks)} subtasks verified.")
        return self._finish(0, "executed", f"All {len(self.subtasks)} subtasks executed; nothing was verified.")

    def _all_subtasks(self) -> None:
        self.subtasks = self._ask_subtasks()
        self.parts.progress.subtasks(self.subtasks)
        while self.done < len(self.subtasks):
            self._one_subtask(self.done)
            if self.config.dry_run:
                return
            self.done, self.back = (self.done + 1 if self.back is None else self.back), None

    def _one_subtask(self, index: int) -> None:
        tries = 0
        while True:
            self._check_budget(index, tries)
            tries += 1
            self.cycles += 1
            if self._one_cycle(index) or self.config.dry_run or self.back is not None:
                return
            if self.parts.operator.held:
                self._wait_for_operator()
                tries -= 1  # a person's pause is no failure of the policy's

    def _check_budget(self, index: int, tries: int) -> None:
        config = self.config
        if config.max_cycles == 0:
            return
        if self.cycles - self.held >= config.max_cycles * self.parts.policy.info().steps_per_verdict:
            raise NotCompletedError(f"not completed after {self.cycles} cycles (--max-cycles)")
        names_subtasks = "subtasks" in self.parts.policy.info().stages and self.subtasks != [config.task]
        if names_subtasks and 0 < config.max_cycles_per_subtask <= tries:
            raise NotCompletedError(f"subtask {index + 1} ({self.subtasks[index]}) not done after {tries} cycles")

    # --- the three stages -----------------------------------------------------------------------------------------

    def _ask_subtasks(self) -> list[str]:
        """Once, from the first frame; a policy without that stage gets the task as its only subtask."""
        parts, config = self.parts, self.config
        if "subtasks" not in parts.policy.info().stages:
            self._record("subtasks", subtasks=[config.task], source="task")
            return [config.task]
        parts.progress.waiting("asking for the subtasks")
        for attempt in range(1, MAX_SUBTASKS_ATTEMPTS + 1):
            frame, number = self._frame()
            self._record("request", stage="subtasks", frame=number, frame_id=frame.frame_id, attempt=attempt)
            asked_s = time.monotonic()
            try:
                answer = self._patiently(
                    lambda frame=frame: parts.policy.subtasks(  # type: ignore[misc]  # mypy infers no lambda's default
                        frame, config.task, config.scenario, self._asked(config.subtasks_deadline_s)
                    )
                )
            except AnswerUnusableError as error:
                self._record_error("subtasks", error)
                if attempt == MAX_SUBTASKS_ATTEMPTS:
                    raise
                continue
            seconds = time.monotonic() - asked_s
            self._record("subtasks", subtasks=answer.subtasks, answer=answer.raw, seconds=seconds, source="policy")
            return answer.subtasks
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _one_cycle(self, index: int) -> bool:
        """Frame, plan, rows, execution, verdict. True when the subtask is done."""
        parts, subtask = self.parts, self.subtasks[index]
        given, self.edit = self.edit, None
        began_s = time.monotonic()
        parts.moves.begin(self.cycles, index, f"{index + 1}/{len(self.subtasks)}  {subtask}")
        parts.progress.cycle(self.cycles, index + 1, len(self.subtasks), subtask)
        parts.progress.waiting("planning")
        before = parts.camera.latest(MAX_FRAME_AGE_S, FRAME_TIMEOUT_S)
        state = parts.robot.state()
        captured_m = np.array(state.ee_position_m, dtype=np.float64)
        sent_s = parts.clock.now_s()
        frame_age_s = sent_s - before.stamp_s
        arrivals = Arrivals(
            parts.policy.cycle(before, subtask, self._asked(self.config.max_answer_age_s, given, state)),
            parts.clock,
            self.config.max_answer_age_s,
            parts.watch.check,
        )
        parts.moves.look(before)
        number = parts.recorder.frame(before)  # while the request is on its way: a slow disk must not age the frame
        self._record(
            "request",
            stage="cycle",
            subtask=subtask,
            frame=number,
            frame_id=before.frame_id,
            frame_age_s=frame_age_s,
            position_m=captured_m,
        )
        answer = Answer(arrivals, parts, self.config, self._record, sent_s, frame_age_s)
        try:
            result = self._act(index, answer, captured_m)
            self.plans += [answer.plan] if answer.plan else []
        except AnswerUnusableError as error:
            self.edit = given  # the operator's words were not answered: they are asked with again
            self._record_error("cycle", error)
            parts.progress.note(str(error))
            return False
        except ServerBusyError as error:
            self.edit = given
            self._record_error("cycle", error)
            self._wait_for_server(error)
            return False
        finally:
            arrivals.give_up()
        if result is None or result.outcome in (Outcome.NOT_STARTED, Outcome.FAULT):
            return False
        return self._judged(index, before, number, result, began_s)

    def _judged(self, index: int, before: Frame, number: int, result: ChunkResult, began_s: float) -> bool:
        """The verdict, if it is time for one: against the first frame since the last."""
        steps = self.parts.policy.info().steps_per_verdict
        self.unjudged.append((before, number))
        if len(self.unjudged) < steps:
            return False
        first, first_number = self.unjudged[0]
        self.unjudged = []
        if steps > 1 and not self.parts.verifier.checks:
            return False  # nobody says that it is done, and one step is never all: it goes on until --max-cycles
        return self._verify(index, first, first_number, result, began_s)

    def _act(self, index: int, answer: Answer, captured_m: NDArray[np.float64]) -> ChunkResult | None:
        """Executes the rows; None when nothing was to be executed (dry run, operator declined or edited).

        An outcome FAULT is the operator's hold; every other fault is raised.
        """
        parts, config = self.parts, self.config

        def start() -> MotionStart:
            newest = parts.camera.latest(MAX_FRAME_AGE_S, FRAME_TIMEOUT_S)
            return MotionStart(newest_frame_s=newest.stamp_s, captured_position_m=captured_m)

        rows: Iterable[Sequence[float]]
        streaming = config.execute == "streamed" and not config.dry_run and parts.confirm is None
        if streaming:
            rows = answer.rows()
            first = next(iter(rows), None)
            if first is None:
                return None
            rows = _chained(first, rows)
        else:
            rows = list(answer.rows())
        forecast = None if streaming else self._foreseen(list(rows), answer)
        if config.dry_run:
            parts.moves.preview(rows, answer.context(), parts.robot.state())
            return None
        if parts.confirm is not None:
            if not self._confirmed(index, Proposal(self.subtasks[index], answer.plan, list(rows), forecast)):
                return None
        elif forecast is not None and forecast.forbidden:
            self._refused_by_shadow(forecast)
            return None
        return self._execute(rows, answer, start)

    def _foreseen(self, rows: Sequence[Sequence[float]], answer: Answer) -> Forecast | None:
        """How the chunk goes in the twin, recorded and shown; None without a shadow."""
        parts = self.parts
        if parts.shadow is None or not rows:
            return None
        forecast = parts.shadow.rehearse(rows, answer.context(), parts.robot.state())
        self._record("forecast", forbidden=forecast.forbidden, **vars(forecast))
        if parts.confirm is None:  # else it is shown with the chunk, beside the question
            parts.progress.forecast(forecast.lines(), forecast.forbidden)
        return forecast

    def _refused_by_shadow(self, forecast: Forecast) -> None:
        """Nobody is asked, so the chunk is dropped; as with the filter's refusals, three in a row end the episode."""
        why = f"the twin foresees: {forecast.lines()[0]}"
        self._record("dropped", reason=why)
        self.parts.progress.note(f"chunk dropped: {why}")
        self._count_refusals(True, why)

    def _confirmed(self, index: int, proposal: Proposal) -> bool:
        """Asks the operator. Edited words are kept for the next cycle, which starts from a fresh frame.

        The name of a subtask that was done before goes back to it: what came after it is to be done again.
        """
        assert self.parts.confirm is not None
        self.parts.progress.quiet()
        choice, plan = self.parts.confirm(proposal), proposal.motion_plan
        if isinstance(choice, Edit):
            done = [subtask.casefold() for subtask in self.subtasks[:index]]
            place = done.index(choice.subtask.casefold()) if choice.subtask.casefold() in done else index
            self._record(
                "correction",
                subtask_index=place,
                subtask={"from": self.subtasks[index], "to": choice.subtask},
                motion_plan={"from": plan, "to": choice.motion_plan},
                rows=proposal.rows,
            )
            self.subtasks[place], self.edit = choice.subtask, choice
            self.back = place if place < index else None
            return False
        if not choice:
            self._record("dropped", reason="declined by the operator")
        return choice

    def _execute(
        self, rows: Iterable[Sequence[float]], answer: Answer, start: Callable[[], MotionStart]
    ) -> ChunkResult:
        parts = self.parts
        parts.progress.quiet()  # the operator may be told to hold a key, or asked to go on
        with parts.operator.moving(), parts.watch.moving(answer.failed):
            result = parts.executor.run_chunk(rows, answer.context(), start)
        state = parts.robot.state()
        self._record(
            "chunk",
            outcome=result.outcome,
            reason=result.reason,
            rows=len(result.rows),
            moved=result.moved,
            state=state_of(state),
            position_m=state.ee_position_m,
        )
        if result.outcome is Outcome.FAULT and not parts.operator.held:
            raise parts.watch.error or SafetyStop(result.reason)
        if result.outcome is not Outcome.COMPLETED:
            parts.progress.note(f"chunk {result.outcome.replace('_', ' ')}: {result.reason}")
        self._count_refusals(result.outcome is Outcome.REFUSED and not result.moved, result.reason)
        return result

    def _wait_for_operator(self) -> None:
        """The arm holds until the operator lets it go on: from a fresh frame, for the rows saw what was before."""
        self.held += 1
        began_s = time.monotonic()
        self.parts.operator.resume()
        self._record("resumed", seconds=time.monotonic() - began_s)

    def _count_refusals(self, refused: bool, why: str) -> None:
        self.refused_in_a_row = self.refused_in_a_row + 1 if refused else 0
        if self.refused_in_a_row >= MAX_REFUSED_CHUNKS:
            raise SafetyStop(f"{self.refused_in_a_row} chunks in a row were refused: {why}")

    def _verify(self, index: int, before: Frame, before_number: int, result: ChunkResult, began_s: float) -> bool:
        """Settle, fresh frame, verdict. A verifier that errs is never a success."""
        parts = self.parts
        parts.progress.waiting("verifying")
        parts.clock.sleep_s(self.config.settle_s)
        after = parts.camera.after(parts.clock.now_s(), FRAME_TIMEOUT_S)
        parts.moves.look(after)
        after_number = parts.recorder.frame(after)
        next_subtask = self.subtasks[index + 1] if index + 1 < len(self.subtasks) else None
        asked_s = time.monotonic()
        if not parts.verifier.checks and not result.rows:
            verdict = Verdict(success=False, confidence="Low", reasoning="No row was executed.")
        else:
            try:
                verdict = parts.verifier.verify(
                    before, after, self.subtasks[index], next_subtask, self.config.verify_deadline_s
                )
            except VerifierError as error:
                self._verifier_failed(parts.verifier.name, error)
                raise
            except Exception as error:
                raise VerifierError(f"{parts.verifier.name}: {type(error).__name__}: {error}") from error
        now_s = time.monotonic()
        self._record(
            "verdict",
            subtask=self.subtasks[index],
            next_subtask=next_subtask,
            success=verdict.success,
            confidence=verdict.confidence,
            reasoning=verdict.reasoning,
            verifier=parts.verifier.name,
            before=before_number,
            after=after_number,
            seconds=now_s - asked_s,
            cycle_seconds=now_s - began_s,
        )
        parts.progress.verdict(verdict, parts.verifier.checks)
        return verdict.success is True

    # --- waiting and asking ---------------------------------------------------------------------------------------

    def _frame(self) -> tuple[Frame, int]:
        frame = self.parts.camera.latest(MAX_FRAME_AGE_S, FRAME_TIMEOUT_S)
        return frame, self.parts.recorder.frame(frame)

    def _asked(self, deadline_s: float, edit: Edit | None = None, state: RobotState | None = None) -> Asked:
        seed = None if self.config.seed is None else (self.config.seed * 1009 + self.cycles) % 2**31
        plan = edit.motion_plan if edit is not None else None
        return Asked(self.config.episode_id, deadline_s, seed, plan, state)

    def _patiently(self, ask: Callable[[], SubtasksAnswer]) -> SubtasksAnswer:
        """Asks again, a few times, when the server is only busy."""
        for _ in range(MAX_BUSY_ANSWERS - 1):
            try:
                return ask()
            except ServerBusyError as error:
                self._record_error("busy", error)
                self._wait_for_server(error)
        return ask()

    def _wait_for_server(self, error: ServerBusyError) -> None:
        wait_s = DEFAULT_BUSY_WAIT_S if error.retry_after_s is None else error.retry_after_s
        self.parts.progress.note(f"the server is busy, asking again in {wait_s:g} s")
        time.sleep(wait_s)

    def _verifier_failed(self, name: str, error: VerifierError) -> None:
        self.parts.executor.hold(f"verifier {name} gave no verdict")
        self._record_error(f"verifier {name}", error)
        self.parts.progress.note(f"verifier {name}: {error}")

    # --- recording and the end ------------------------------------------------------------------------------------

    def _record(self, kind: str, **fields: Any) -> None:
        if self.cycles:
            fields = {"cycle": self.cycles, "subtask_index": min(self.done, max(len(self.subtasks) - 1, 0)), **fields}
        self.parts.recorder.event(kind, **fields)

    def _record_error(self, where: str, error: BaseException) -> None:
        more = {"code": error.code, "details": error.details} if isinstance(error, PolicyError) else {}
        self._record("error", where=where, type=type(error).__name__, message=str(error), **more)

    def _write_header(self) -> None:
        parts, config = self.parts, self.config
        self.parts.recorder.event(
            "episode",
            format=FORMAT,
            episode_id=config.episode_id,
            task=config.task,
            started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            config={
                "scenario": config.scenario,
                "execute": config.execute,
                "max_cycles": config.max_cycles,
                "verifier": parts.verifier.name,
                **config.recorded,
            },
            policy=parts.policy.info(),
        )

    def _fault(self, error: BaseException, exit_code: int, outcome: str | None = None) -> EpisodeResult:
        """Hold first; then record and report."""
        try:
            self.parts.executor.hold(f"{type(error).__name__}: {error}")
        except Exception as hold_error:
            self._record_error("hold", hold_error)
        self._record_error("episode", error)
        return self._finish(exit_code, outcome or OUTCOMES.get(exit_code, "failed"), str(error) or type(error).__name__)

    def _finish(self, exit_code: int, outcome: str, message: str) -> EpisodeResult:
        parts = self.parts
        counts, stages = parts.moves.counts, parts.policy.info().stages
        words = "\n".join([*(self.subtasks if "subtasks" in stages else []), *self.plans])
        physics = parts.judge(words) if parts.judge is not None else None
        verified = outcome == "verified"
        result = EpisodeResult(
            exit_code=exit_code,
            outcome=outcome,
            message=message,
            subtasks=self.subtasks,
            subtasks_done=self.done,
            cycles=self.cycles,
            rows_executed=counts["executed"],
            rows_changed=counts["changed"],
            rows_refused=counts["refused"],
            seconds=round(time.monotonic() - self.began_s, 3),
            verified=verified,
            success=bool(physics["success"]) if physics is not None else verified,
            plans=self.plans,
            physics=physics,
        )
        self._record("end", outcome=outcome, exit_code=exit_code, message=message)
        try:
            parts.recorder.summary({"episode_id": self.config.episode_id, "task": self.config.task, **vars(result)})
        except RecordingStoppedError as error:  # the arm is at rest, and the result is known all the same
            parts.progress.note(str(error))
        parts.progress.finished(exit_code == 0, message)
        return result


def _chained(first: Sequence[float], rest: Iterable[Sequence[float]]) -> Iterator[Sequence[float]]:
    yield first
    yield from rest
