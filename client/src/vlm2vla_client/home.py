"""``vlm2vla-client home``: the arm to the pose in which episodes begin, through the same filter, slowly."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from vlm2vla_client.commissioning import is_commissioned, restrain
from vlm2vla_client.keys import TerminalKeys, terminal_of_operator
from vlm2vla_client.operator_arm import OperatorArm
from vlm2vla_client.operator_bench import add_bench_arguments, find_bench, speed
from vlm2vla_client.operator_keys import NoOperator, Operator, SpaceHolds
from vlm2vla_client.recorder import plain
from vlm2vla_twin.kinematics import DOWN

DEFAULT_SPEED = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; those shared with ``run`` mean the same."""
    add_bench_arguments(parser)
    parser.add_argument("--speed", type=speed, default=DEFAULT_SPEED, metavar="F", help=f"default {DEFAULT_SPEED}")
    parser.add_argument("--confirm", action="store_true", help="show where it goes and ask first")


def home(arguments: argparse.Namespace) -> int:
    """Moves there; 0 when it arrived.

    Raises:
        ConfigurationError: nothing was started (no calibration, wrong settings).
        SafetyStop, RobotError, KeyboardInterrupt: the arm holds.
    """
    bench = find_bench(arguments)
    confirm, share = arguments.confirm, arguments.speed
    if bench.is_physical:
        confirm, share = restrain(confirm, share, is_commissioned(bench.robot, bench.arm, bench.limits))
        if (confirm, share) != (arguments.confirm, arguments.speed):
            print(f"{bench.robot} {bench.arm} was never commissioned: --confirm --speed {share:g} apply",
                  file=sys.stderr)  # fmt: skip
    goal = np.array(bench.config.home.position_m, dtype=np.float64)
    descriptor = terminal_of_operator()
    operator: Operator = NoOperator() if descriptor is None else SpaceHolds(TerminalKeys(descriptor))
    with bench.open("home", arguments.record, share, operator) as arm:
        if confirm and not _agreed(arm, goal):
            raise KeyboardInterrupt
        with operator.moving():
            arm.go(goal, DOWN if bench.robot != "bridge" else None)
        reached = plain(np.round(arm.position(), 4))
        arm.recorder.summary({"task": "home", "outcome": "executed", "exit_code": 0, "position_m": reached})
    print(f"home: {reached} m; the arm holds")
    return 0


def _agreed(arm: OperatorArm, goal: np.ndarray) -> bool:
    here = ", ".join(f"{v:.3f}" for v in arm.position())
    there = ", ".join(f"{v:.3f}" for v in goal)
    print(f"  from ({here}) m up to the goal's height, across, down to ({there}) m, gripper down; the grip stays",
          file=sys.stderr)  # fmt: skip
    print("  move? [y]es, anything else no: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
