"""``vlm2vla-client home``: the arm to the pose in which episodes begin, through the same filter, slowly."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from vlm2vla_client import physical
from vlm2vla_client.commissioning import is_commissioned, restrain
from vlm2vla_client.config import PHYSICAL_ROBOTS, ClientConfig, load_config
from vlm2vla_client.errors import ConfigurationError, NotBuiltError
from vlm2vla_client.keys import TerminalKeys, terminal_of_operator
from vlm2vla_client.operator_arm import Bench, OperatorArm, twin_limits
from vlm2vla_client.operator_keys import NoOperator, Operator, SpaceHolds
from vlm2vla_client.recorder import plain
from vlm2vla_twin.kinematics import DOWN

DEFAULT_SPEED = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; those shared with ``run`` mean the same."""
    add_bench_arguments(parser)
    parser.add_argument("--speed", type=speed, default=DEFAULT_SPEED, metavar="F", help=f"default {DEFAULT_SPEED}")
    parser.add_argument("--confirm", action="store_true", help="show where it goes and ask first")


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Which arm, which settings, where it is recorded."""
    parser.add_argument("--sim", action="store_true", help="rehearse on the twin")
    parser.add_argument("--realtime", action="store_true", help="twin: let simulated seconds take as long as they say")
    parser.add_argument("--config", type=Path, metavar="FILE", help="client.toml (default: the user's config folder)")
    parser.add_argument("--robot", choices=PHYSICAL_ROBOTS, help="default widowx, or client.toml")
    parser.add_argument("--record", type=Path, default=Path("runs"), metavar="DIR", help="default ./runs")


def speed(text: str) -> float:
    """A share of the speed limits. Raises ArgumentTypeError outside 0..1."""
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected above 0 to 1, received {value}")
    return value


def robot_of(arguments: argparse.Namespace, config: ClientConfig) -> str:
    """The robot that is asked for. Raises ConfigurationError for one that nobody can command."""
    name = "twin" if arguments.sim else arguments.robot or config.robot
    if arguments.sim and arguments.robot:
        raise ConfigurationError("--sim is the twin: leave out --robot")
    if name == "replay":
        raise NotBuiltError("the robot 'replay' only repeats recordings: give --robot or --sim")
    return str(name)


def find_bench(arguments: argparse.Namespace) -> Bench:
    """The bench with its measured limits.

    Raises:
        ConfigurationError: a physical arm whose bench was never measured, or settings that cannot be right.
    """
    config = load_config(arguments.config)
    name = robot_of(arguments, config)
    if name == "twin":
        return Bench("twin", "twin", twin_limits(), config, arguments.realtime)
    limits = physical.physical_limits(config.limits)
    return Bench(name, physical.make_robot(name, config)[1], limits, config)


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
