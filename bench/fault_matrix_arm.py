"""Rows of `fault_matrix.py` about the arm itself: the driver's real child process and the vendor's double.

One episode each. Where the client dies or sleeps, the time to hold is when the motors were last told where to go.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from arm_bench import ArmBench, wait_until
from client_fakes import ScriptedPolicy, ScriptedVerifier, WallCamera
from fault_matrix import Case, Row, observe
from robot_fakes import limits
from soak_twin_episode import TwinDesk, problems_in
from soak_twin_faults import HOLD_S, Faults, Lateness
from soak_twin_monitor import MonitoredRobot

from vlm2vla_client.errors import RobotError
from vlm2vla_client.physical import PhysicalRun, run_on_arm
from vlm2vla_client.progress import SilentProgress

PROCESS_EXIT_S, HEARTBEAT_S = 0.1, 0.3
OVERLOAD = 0x20
MOVING_GOALS = 6
ROWS = [[0.0, 0.05, 0.0, 1.0], [0.0, -0.05, 0.0, 1.0]]
SPEED = 0.2
START_S, END_S, SLEEPS_S = 30.0, 30.0, 1.5
WOKEN = (7, 4)  # whichever it looks at first: its arm, or the policy of which it has heard nothing either
CLIENT = (
    "import sys; sys.path[:0] = sys.argv[2:]; from pathlib import Path; from fault_matrix_arm import *\n"
    "folder = Path(sys.argv[1]); bench = ArmBench(folder, 'ros1')\n"
    "sys.exit(episode(MonitoredRobot(bench.robot, Faults(), SPEED), folder / 'episode'))\n"
)


def episode(robot: MonitoredRobot, folder: Path) -> int:
    """To and fro once; the exit code."""
    request = PhysicalRun("go", speed=SPEED, max_cycles=1)
    policy, verifier = ScriptedPolicy(["go"], [ROWS]), ScriptedVerifier([True])
    return run_on_arm(request, robot, WallCamera(), policy, verifier, limits(), folder, SilentProgress()).exit_code


@contextmanager
def struck(bench: ArmBench, strike: Callable[[], object]) -> Iterator[list[float]]:
    """Strikes once the arm moves; the moment is in the list afterwards."""
    at_s: list[float] = []

    def wait_and_strike() -> None:
        wait_until(lambda: len(bench.logged("group")) >= MOVING_GOALS, START_S)
        at_s.append(time.monotonic())
        strike()

    thread = threading.Thread(target=wait_and_strike, daemon=True)
    thread.start()
    yield at_s
    thread.join(END_S)


def last_goal_s(bench: ArmBench, from_s: float) -> float:
    """When the motors were last told anything, from a moment on; 0 when never after it."""
    return max([line["t_s"] - from_s for line in bench.logged("group") if line["t_s"] >= from_s], default=0.0)


def of_process(name: str, limit_s: float | None, strike: Callable[[ArmBench], object]) -> Case:
    """A fault below the client's driver while the arm moves."""

    def case(_: TwinDesk, lateness: Lateness, folder: Path) -> Row:
        folder.mkdir()
        bench, row = ArmBench(folder, "ros1"), Row(name, "moving", limit_s=limit_s)
        robot = MonitoredRobot(bench.robot, Faults(), SPEED)
        with struck(bench, lambda: strike(bench)) as at_s:
            row.exit_code = episode(robot, folder / "episode")
        observe(row, folder / "episode", at_s[0])
        if row.limit_s is None:  # counted from when the driver says so
            row.counted_from, row.limit_s = "what the client was given", HOLD_S + (row.observed_s or 0.0)
        holds = [wall - at_s[0] for what, wall, _ in robot.seen.times if what == "hold" and wall >= at_s[0]]
        row.hold_s = round(holds[0], 3)
        row.lateness_s = round(lateness.worst_s(at_s[0], at_s[0] + row.hold_s), 3)
        row.problems += robot.seen.complaints + problems_in(folder / "episode", False)
        row.judge((7,))
        return row

    return case


def stopped_for_good(bench: ArmBench) -> None:
    """Silent until the client gives it up; what it may still do when it wakes is part of the test."""
    pid = bench.process_id
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (pid, signal.SIGCONT)).start()


def second_client(_: TwinDesk, lateness: Lateness, folder: Path) -> Row:
    """Refused, and the first one not disturbed."""
    folder.mkdir()
    bench, row, refused = ArmBench(folder, "ros1"), Row("second client", "moving"), []

    def connect() -> None:
        try:
            bench.another().connect()
        except RobotError as error:
            refused.append((time.monotonic(), error))

    robot = MonitoredRobot(bench.robot, Faults(), SPEED)
    with struck(bench, connect) as at_s:
        row.exit_code = episode(robot, folder / "episode")
    row.outcome = "verified; the second: 7"
    if refused and refused[0][1].exit_code == 7:
        row.observed_s = round(refused[0][0] - at_s[0], 3)
    else:
        row.problems.append("the second client was not refused")
    row.problems += robot.seen.complaints + problems_in(folder / "episode", False)
    row.judge((0,))
    return row


def struck_client(
    name: str, number: signal.Signals, exits: Sequence[int], _: TwinDesk, lateness: Lateness, folder: Path
) -> Row:
    """A whole client that is killed, or sleeps until the arm's process has held by itself."""
    folder.mkdir()
    bench, row = ArmBench(folder, "ros1"), Row(name, "moving", limit_s=HEARTBEAT_S + HOLD_S)
    with subprocess.Popen([sys.executable, "-c", CLIENT, str(folder), *sys.path]) as client:
        wait_until(lambda: len(bench.logged("group")) >= MOVING_GOALS or client.poll() is not None, START_S)
        struck_s = time.monotonic()
        client.send_signal(number)
        time.sleep(SLEEPS_S)
        row.hold_s = round(last_goal_s(bench, struck_s), 3)
        client.send_signal(signal.SIGCONT)
        row.exit_code = client.wait(END_S)
    row.lateness_s = round(lateness.worst_s(struck_s, struck_s + row.hold_s), 3)
    killed = number == signal.SIGKILL
    row.outcome = "killed; the arm's process holds" if killed else ""
    if not killed:
        observe(row, folder / "episode", struck_s)
    row.problems += problems_in(folder / "episode", killed)
    row.judge(exits)
    return row


ARM: dict[str, Case] = {
    "arm process killed": of_process(
        "arm process killed", PROCESS_EXIT_S + HOLD_S, lambda bench: bench.signal(signal.SIGKILL)
    ),
    "arm process silent": of_process("arm process silent", HEARTBEAT_S + HOLD_S, stopped_for_good),
    "heartbeat lost": partial(struck_client, "heartbeat lost (the client sleeps)", signal.SIGSTOP, WOKEN),
    "motor overload": of_process("motor overload", None, lambda bench: bench.set(hardware_error=OVERLOAD)),
    "second client": second_client,
    "client killed": partial(struck_client, "client killed (kill -9)", signal.SIGKILL, (-signal.SIGKILL,)),
}
