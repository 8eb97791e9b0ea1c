"""The operator's keys on pseudo-terminals: SPACE holds within a substep, hold to run, and the terminal given back."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client_fakes import ScriptedPolicy, ScriptedVerifier
from operator_terminal import Seat
from robot_fakes import FakeArm, ManualClock, limits
from test_loop import Bench

from vlm2vla_client import operator_keys
from vlm2vla_client.cli import main
from vlm2vla_client.errors import ConfigurationError, SafetyStop
from vlm2vla_client.executor import Executor, Monitors, NoMonitor, Outcome
from vlm2vla_client.keys import TerminalKeys, require_terminal, terminal_of_operator
from vlm2vla_client.operator_keys import HoldToRun, NoOperator, SpaceHolds, operator_of_run
from vlm2vla_client.safety import SafetyContext

HOLD_S = 0.25
#: What a loaded test machine may add to any time that is asserted.
SLACK_S = 0.15
SUBSTEP_S = 0.1


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends: the operator's and the program's."""
    operator, program = pty.openpty()
    yield operator, program
    for end in (operator, program):
        os.close(end)


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_keys_come_without_enter_and_the_terminal_is_given_back(terminal: tuple[int, int]) -> None:
    operator, program = terminal
    before = termios.tcgetattr(program)
    keys = TerminalKeys(program)
    with keys:
        mode = termios.tcgetattr(program)[3]
        assert not mode & (termios.ICANON | termios.ECHO) and mode & termios.ISIG, "Ctrl-C stays a signal"
        with keys:
            assert keys.wait(0.01) is None
            os.write(operator, b"dd")
            assert keys.wait(1.0) == "d"
        assert termios.tcgetattr(program)[3] == mode, "only the outermost exit restores"
        assert keys.pending() == "d" and keys.pending() == ""
    assert termios.tcgetattr(program) == before


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), SystemExit(3)])
def test_whatever_is_raised_the_terminal_is_given_back(terminal: tuple[int, int], error: BaseException) -> None:
    _, program = terminal
    before = termios.tcgetattr(program)
    with pytest.raises(type(error)), TerminalKeys(program):
        raise error
    assert termios.tcgetattr(program) == before


def test_what_was_typed_before_listening_is_not_lost(terminal: tuple[int, int]) -> None:
    operator, program = terminal
    os.write(operator, b"x ")
    time.sleep(0.05)
    with TerminalKeys(program) as keys:
        assert keys.pending() == "x "


def test_a_terminal_that_is_gone_is_a_safety_stop() -> None:
    operator, program = pty.openpty()
    with TerminalKeys(program) as keys:
        os.close(operator)
        with pytest.raises(SafetyStop, match="terminal is gone"):
            keys.pending()
    os.close(program)


def test_a_pipe_a_file_and_the_background_are_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    assert terminal_of_operator(reader) is None
    operator, program = pty.openpty()
    assert terminal_of_operator(program) is None, "a terminal that is not ours to control"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert terminal_of_operator() is None
    with pytest.raises(ConfigurationError, match="no terminal"):
        require_terminal("calibrate")
    assert isinstance(operator_of_run(False), NoOperator)
    for end in (reader, writer, operator, program):
        os.close(end)


def test_hold_to_run_without_a_terminal_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    arguments = ["--sim", "--policy", "expert", "--verifier", "twin"]
    assert main(["run", "--task", "pick up the carrot", "--hold-to-run", *arguments]) == 2
    assert "--hold-to-run needs an operator's keys" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# --- the executor on an ideal arm ----------------------------------------------------------------------------------


class ScriptedKeys:
    """Keys that are pending at the n-th look; entering and leaving are counted."""

    def __init__(self, looks: dict[int, str], waits: str = "") -> None:
        self._looks, self._waits = looks, list(waits)
        self.looked = self.entered = 0

    def __enter__(self) -> ScriptedKeys:
        self.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.entered -= 1

    def pending(self) -> str:
        self.looked += 1
        return self._looks.get(self.looked, "")

    def wait(self, timeout_s: float) -> str | None:
        key = self._waits.pop(0) if self._waits else None
        return None if key == "-" else key


def chunk(operator: SpaceHolds) -> tuple[FakeArm, Outcome, list[tuple[str, float]]]:
    """Three long rows on an ideal arm, and what was commanded when."""
    clock = ManualClock()
    arm = FakeArm(clock)
    executor = Executor(arm, clock, limits(), Monitors(operator, NoMonitor()))
    with operator.moving():
        result = executor.run_chunk([[0.0, 0.05, 0.0, 1.0]] * 3, SafetyContext("e", "e", None, None, source="operator"))
    return arm, result.outcome, arm.holds


@pytest.mark.parametrize("look", [2, 3, 5, 8])
@pytest.mark.parametrize("key", [" ", "x", "\r", "\x1b[A"])
def test_any_key_holds_within_a_substep_at_any_moment(look: int, key: str) -> None:
    keys = ScriptedKeys({look: key})
    arm, outcome, holds = chunk(SpaceHolds(keys))
    assert outcome is Outcome.FAULT and len(holds) == 1 and "operator" in holds[0][0]
    assert holds[0][1] - arm.commands[-1][2] <= SUBSTEP_S + 1e-6 if arm.commands else holds[0][1] == 100.0
    assert keys.entered == 0


def test_before_the_motion_only_space_holds() -> None:
    assert chunk(SpaceHolds(ScriptedKeys({1: "\n\ny"})))[1] is Outcome.COMPLETED
    arm, outcome, _ = chunk(SpaceHolds(ScriptedKeys({1: "y "})))
    assert outcome is Outcome.FAULT and not arm.commands


def test_a_lost_terminal_holds_and_cannot_resume() -> None:
    class Gone(ScriptedKeys):
        def pending(self) -> str:
            if super().pending() == "gone":
                raise SafetyStop("the operator's terminal is gone")
            return ""

    operator = SpaceHolds(Gone({3: "gone"}))
    _, outcome, holds = chunk(operator)
    assert outcome is Outcome.FAULT and "terminal is gone" in holds[0][0] and operator.held


def test_nothing_is_heard_while_the_arm_rests() -> None:
    operator = SpaceHolds(ScriptedKeys({1: " ", 2: " "}))
    assert operator.fault() is None and not operator.held


@pytest.mark.parametrize("key", [" ", "\r", "\n"])
def test_resuming_takes_a_fresh_press(key: str) -> None:
    said: list[str] = []
    keys = ScriptedKeys({2: " "}, waits=f"  -x{key}")  # two more of the same press, quiet, another key, the answer
    operator = SpaceHolds(keys, said.append)
    assert chunk(operator)[1] is Outcome.FAULT and operator.held
    operator.resume()
    assert not operator.held and "planned anew" in said[0] and not keys._waits and keys.entered == 0


def test_q_ends_and_silence_is_a_safety_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        SpaceHolds(ScriptedKeys({}, waits="-q"), lambda _: None).resume()
    monkeypatch.setattr(operator_keys, "RESUME_DEADLINE_S", 0.2)
    with pytest.raises(SafetyStop, match="nobody went on"):
        SpaceHolds(ScriptedKeys({}), lambda _: None).resume()
    with pytest.raises(SafetyStop, match="nobody held"), HoldToRun(ScriptedKeys({}), lambda _: None).moving():
        raise AssertionError("moved")


def test_hold_to_run_begins_with_repeats_not_with_a_press() -> None:
    keys = ScriptedKeys({}, waits=" - -   -    ")
    with HoldToRun(keys, lambda _: None).moving():
        assert not keys._waits


def test_hold_to_run_holds_on_release_and_at_once_on_another_key() -> None:
    class Held(ScriptedKeys):
        def wait(self, timeout_s: float) -> str | None:
            return " "

    operator = HoldToRun(Held({}), lambda _: None)
    with operator.moving():
        assert operator.fault() is None
        time.sleep(operator_keys.RELEASED_S + 0.02)
        assert "let go" in str(operator.fault()) and operator.held
    keys = Held({})
    operator = HoldToRun(keys, lambda _: None)
    with operator.moving():
        keys._looks[keys.looked + 1] = "  x"
        assert "another key" in str(operator.fault())


# --- the loop ---------------------------------------------------------------------------------------------------------


class PausingOperator(NoOperator):
    """Holds the chunks whose numbers it is given, as the executor's outcome says, and lets each go on."""

    def __init__(self, pauses: int) -> None:
        self.left, self.resumed = pauses, 0

    @property
    def held(self) -> bool:  # type: ignore[override]  # NoOperator's is a constant
        return self.left > 0

    def resume(self) -> None:
        self.left, self.resumed = self.left - 1, self.resumed + 1


def test_a_held_chunk_is_planned_anew_from_a_fresh_frame_and_costs_no_try(tmp_path: Path) -> None:
    policy, operator = ScriptedPolicy(["Lift"], [[[0.0, 0.0, 0.01, 1.0]]]), PausingOperator(3)
    verifier = ScriptedVerifier([True])
    bench = Bench(tmp_path / "e", policy, verifier, [Outcome.FAULT] * 3, {"max_cycles": 1}, operator=operator)
    result = bench.run()
    assert result.exit_code == 0 and operator.resumed == 3 and result.cycles == 4
    frames = [frame for frame, _ in policy.asked_cycles]
    assert len(set(frames)) == 4, "each plan has a picture of its own"
    assert len(verifier.calls) == 1, "a held chunk is not verified"
    assert len(bench.recording().of("resumed")) == 3


# --- a whole run on a terminal ----------------------------------------------------------------------------------------

RUN = ["run", "--task", "pick up the carrot", "--sim", "--policy", "expert", "--verifier", "twin", "--realtime",
       "--speed", "0.1"]  # fmt: skip


def events(folder: Path) -> list[dict[str, Any]]:
    """Of the only episode there; an incomplete last line is left out."""
    for file in folder.glob("*/events.jsonl"):
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return []


def wait_for(folder: Path, condition: Callable[[list[dict[str, Any]]], bool], timeout_s: float = 60.0) -> None:
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        if condition(events(folder)):
            return
        time.sleep(0.02)
    raise AssertionError(f"did not happen: {[event['event'] for event in events(folder)][-5:]}")


def count(kind: str, more_than: int) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda found: sum(event["event"] == kind for event in found) > more_than


def held_within(folder: Path, pressed_s: float, limit_s: float) -> int:
    """Checks the first hold after a press; the number of substeps so far."""
    wait_for(folder, lambda found: any(e["event"] == "hold" and e["t_s"] > pressed_s for e in found), 10.0)
    found = events(folder)
    hold = next(event for event in found if event["event"] == "hold" and event["t_s"] > pressed_s)
    assert "operator" in hold["reason"] and hold["t_s"] - pressed_s < limit_s + SLACK_S
    assert not [event for event in found if event["event"] == "substep" and event["t_s"] > hold["t_s"]]
    return sum(event["event"] == "substep" for event in found)


@pytest.mark.clock
def test_space_holds_a_run_space_resumes_it_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    with Seat([*RUN, "--record", str(tmp_path)]) as seat:
        wait_for(tmp_path, count("substep", 3))
        assert not seat.mode[3] & termios.ICANON
        substeps = held_within(tmp_path, seat.press(" "), SUBSTEP_S + 0.05)
        seat.wait_for("planned anew")
        time.sleep(1.0)
        assert count("substep", substeps - 1)(events(tmp_path)) and not count("substep", substeps)(events(tmp_path))
        seat.press(" ")
        wait_for(tmp_path, count("substep", substeps + 3))
        resumed = next(event for event in events(tmp_path) if event["event"] == "resumed")
        later = [event for event in events(tmp_path) if event["seq"] > resumed["seq"]]
        assert next(event["event"] for event in later if event["event"] in ("request", "decision")) == "request"
        pressed_s = seat.press("\x03")
        assert seat.wait() == 130
        hold = next(event for event in events(tmp_path) if event["event"] == "hold" and event["t_s"] > pressed_s)
        assert hold["t_s"] - pressed_s < HOLD_S + SLACK_S
        assert seat.mode == seat.before


def test_hold_to_run_moves_only_while_space_repeats(tmp_path: Path) -> None:
    with Seat([*RUN, "--hold-to-run", "--record", str(tmp_path)]) as seat:
        seat.wait_for("hold SPACE down")
        time.sleep(0.5)
        seat.press(" ")  # a tap moves nothing
        time.sleep(0.7)
        assert not count("substep", 0)(events(tmp_path))
        hand = threading.Event()
        last_s = [0.0]

        def repeat() -> None:
            while not hand.is_set():
                last_s[0] = seat.press(" ")
                time.sleep(0.03)

        thread = threading.Thread(target=repeat)
        thread.start()
        wait_for(tmp_path, count("substep", 5))
        hand.set()
        thread.join()
        held_within(tmp_path, last_s[0], operator_keys.RELEASED_S + SUBSTEP_S + 0.05)
        seat.wait_for("planned anew")
        time.sleep(0.8)
        seat.press("q")
        assert seat.wait() == 130 and seat.mode == seat.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_motion_gives_the_terminal_back(tmp_path: Path, number: signal.Signals) -> None:
    with Seat([*RUN, "--record", str(tmp_path)]) as seat:
        wait_for(tmp_path, count("substep", 3))
        seat.process.send_signal(number)
        assert seat.wait() == 130 and seat.mode == seat.before
