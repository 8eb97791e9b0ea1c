"""The bench that home, calibrate and commissioning are done on: an arm by its name, or the twin, with its limits."""

from __future__ import annotations

import argparse
import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm2vla_client import physical
from vlm2vla_client.clock import Clock, SystemClock
from vlm2vla_client.config import PHYSICAL_ROBOTS, ClientConfig, load_config, refuse_read_only
from vlm2vla_client.errors import ConfigurationError, NotBuiltError, RobotError
from vlm2vla_client.executor import Monitor, NoMonitor
from vlm2vla_client.operator_arm import OperatorArm
from vlm2vla_client.recorder import FORMAT, Recorder, new_episode_folder
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.safety import Limits


@dataclass(frozen=True)
class Bench:
    """What there is to be moved: the arm by its name in client.toml, or the twin; nothing is connected yet."""

    robot: str
    arm: str
    limits: Limits
    config: ClientConfig
    realtime: bool = False

    @property
    def is_physical(self) -> bool:
        """Whether somebody can be hurt."""
        return self.robot != "twin"

    @contextlib.contextmanager
    def open(self, what: str, record: Path, speed: float, monitor: Monitor | None = None) -> Iterator[OperatorArm]:
        """Connects and records; afterwards the arm holds, whatever happened.

        Raises:
            ClientError: no driver, another client has the arm, or the recording cannot be written.
        """
        robot, clock = self._robot()
        folder = new_episode_folder(record, what)
        try:
            robot.connect()
            config = {"robot": self.robot, "arm": self.arm, "speed": speed}
            with Recorder(folder) as recorder, operated(robot, recorder, what, config):
                yield OperatorArm(robot, clock, self.limits, recorder, speed, monitor or NoMonitor())
        finally:
            robot.close()
            with contextlib.suppress(OSError):
                folder.rmdir()  # goes again when nothing was recorded

    def _robot(self) -> tuple[Robot, Clock]:
        if self.is_physical:
            return physical.make_robot(self.robot, self.config)[0], SystemClock()
        try:
            from vlm2vla_client.robots.twin import TwinClock, TwinRobot
            from vlm2vla_twin.physics import World
            from vlm2vla_twin.scene import SceneSpec
        except ImportError as error:
            raise ConfigurationError(
                f"the twin needs its simulator: pip install 'vlm2vla-client[sim]' ({error})"
            ) from None
        world = World(SceneSpec(seed=500_000))  # a bare counter
        clock = TwinClock(world, realtime=self.realtime)
        return TwinRobot(world, clock), clock


@contextlib.contextmanager
def operated(robot: Robot, recorder: Recorder, task: str, config: dict[str, Any]) -> Iterator[None]:
    """The first and the last event of an episode that a person makes; on any error the arm is held first."""
    recorder.event("episode", format=FORMAT, task=task, episode_id=uuid.uuid4().hex,
                   started_utc=datetime.now(UTC).isoformat(timespec="seconds"), config=config)  # fmt: skip
    try:
        yield
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        with contextlib.suppress(RobotError):
            robot.hold(reason)
            recorder.event("hold", reason=reason)
        recorder.event("end", outcome="failed", message=str(error) or type(error).__name__)
        raise
    recorder.event("end", outcome="executed", exit_code=0, message="")


def twin_limits() -> Limits:
    """The twin's own counter and wall. Raises ConfigurationError when the simulator is not installed."""
    try:
        from vlm2vla_client.sim import sim_limits
    except ImportError as error:
        raise ConfigurationError(f"the twin needs its simulator: pip install 'vlm2vla-client[sim]' ({error})") from None
    return sim_limits({})


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
    refuse_read_only(name)
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
        return Bench("twin", "twin", twin_limits(), config, getattr(arguments, "realtime", True))
    limits = physical.physical_limits(config.limits)
    return Bench(name, physical.make_robot(name, config)[1], limits, config)
