"""One episode of the client on the twin's arm in real time, as for a physical one, with a fault at a chosen moment.

Shared by `soak_twin.py` and `fault_matrix.py`. The policy is the scripted expert behind a real HTTP server, the
operator sits at a terminal of his own, and the monitor stands between client and arm.
"""

from __future__ import annotations

import contextlib
import os
import pty
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from soak_twin_faults import (
    DrivenCamera,
    Faults,
    FaultyRobot,
    FaultyVerifier,
    full_disk,
    press_ctrl_c,
    roomy_disk,
)
from soak_twin_monitor import MonitoredRobot, Seen
from soak_twin_server import PolicyServer

from vlm2vla_client.errors import RecordingError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.keys import TerminalKeys
from vlm2vla_client.operator_keys import SpaceHolds
from vlm2vla_client.physical import PhysicalRun, run_on_arm
from vlm2vla_client.policies.server import ServerPolicy
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import MIN_FREE_BYTES, RecordedEpisode, Recorder, read_episode
from vlm2vla_client.robots.twin import TwinClock, TwinRobot
from vlm2vla_client.scenes import choose_scene
from vlm2vla_client.sim import sim_limits
from vlm2vla_client.verifiers.base import Verifier
from vlm2vla_client.verifiers.chain import ChainVerifier
from vlm2vla_twin.expert import Expert
from vlm2vla_twin.physics import World

MAX_ANSWER_AGE_S = 4.0
LATE_S = 5.0
RESUME_AFTER_S = 0.8

When = Callable[[Seen], bool]


@dataclass(frozen=True)
class Script:
    """What an episode is to be.

    when: says at which moment its fault strikes; asked every few milliseconds by a thread.
    verifier: instead of the twin's.
    """

    task: str
    seed: int
    execute: Literal["whole", "streamed"] = "whole"
    speed: float = 1.0
    kind: str | None = None
    when: When = lambda seen: False
    verifier: Verifier | None = None
    verify_deadline_s: float = 60.0
    max_cycles: int = 12


@dataclass(frozen=True)
class Played:
    """How an episode went; times are (wall, bench's clock)."""

    exit_code: int
    message: str
    seen: Seen
    began_s: float
    ended: tuple[float, float]


def after(seconds: float) -> When:
    """So long after it is asked for the first time."""
    due_s: list[float] = []

    def ready(_: Seen) -> bool:
        due_s.append(time.monotonic() + seconds)
        return time.monotonic() >= due_s[0]

    return ready


class Strike(threading.Thread):
    """Injects a fault at its moment, unless the episode has ended before."""

    def __init__(self, desk: TwinDesk, script: Script, seen: Seen, folder: Path, press: Callable[[], None]) -> None:
        super().__init__(name="strike", daemon=True)
        self._desk, self._script, self._seen, self._folder, self._press = desk, script, seen, folder, press
        self._over = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        kind, events = self._script.kind, self._folder / "events.jsonl"
        while not events.stat().st_size or not self._script.when(self._seen):  # until its first event it is no episode
            if self._over.wait(0.004):
                return
        assert kind is not None
        if kind == "server killed":
            self._desk.server.kill()
        with self._lock:  # an episode that has just ended must not be interrupted any more
            if self._over.is_set():
                return
            if kind == "disk full":
                full_disk(events)
            self._desk.faults.inject(kind)
            if kind == "operator's Ctrl-C":
                press_ctrl_c()
            elif kind == "operator's key":
                self._press()

    def cancel(self) -> None:
        self._over.set()
        with self._lock:
            pass
        self.join()


class TwinDesk:
    """The parts that outlive an episode: the server, and the faults of the episode that runs."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.server = PolicyServer(self.faults, LATE_S)

    def play(self, script: Script, folder: Path) -> Played:
        """One episode to its end. `tidy` afterwards, when the faults have been read."""
        choice = choose_scene(script.task, None, script.seed)
        world = World(choice.spec)
        clock = TwinClock(world, realtime=True)
        self.faults.begin(clock.now_s)
        self.server.expert, self.server.chance = Expert(world), random.Random(script.seed)
        robot = MonitoredRobot(FaultyRobot(TwinRobot(world, clock), self.faults, clock), self.faults, script.speed)
        camera = DrivenCamera(world, clock, self.faults)
        verifier = ChainVerifier([script.verifier or FaultyVerifier(world, camera.truth, self.faults)])
        connection = ServerConnection(self.server.url)
        limits = sim_limits({"max_answer_age_s": MAX_ANSWER_AGE_S})
        recorder = Recorder(folder, free_bytes=self._free_bytes)
        began_s = time.monotonic()
        with operator_at_a_terminal() as (operator, press):
            request = PhysicalRun(
                script.task, choice.scenario, script.seed, script.execute, script.speed, script.max_cycles,
                operator=operator, verify_deadline_s=script.verify_deadline_s,
            )  # fmt: skip
            strike = Strike(self, script, robot.seen, folder, press) if script.kind is not None else None
            try:
                if strike is not None:
                    strike.start()
                result = run_on_arm(
                    request, robot, camera, ServerPolicy(connection), verifier, limits, recorder, SilentProgress(),
                    clock,
                )  # fmt: skip
                exit_code, message = result.exit_code, result.message
            except KeyboardInterrupt:  # in the moment after its last event
                exit_code, message = 130, "interrupted"
            finally:
                if strike is not None:
                    strike.cancel()
                ended = self.faults.now()
                roomy_disk()
                connection.close()
                recorder.close()
        return Played(exit_code, message, robot.seen, began_s, ended)

    def tidy(self) -> None:
        """Ends the fault; the server is there again."""
        self.faults.clear()
        self.server.hang_up()
        self.server.start()

    def _free_bytes(self, _: Path) -> int:
        """Of a disk that only a fault fills: this computer's own may hold less, and is no fault of the client's."""
        return MIN_FREE_BYTES >> 1 if self.faults.meets("disk below the floor") else MIN_FREE_BYTES << 1


@contextlib.contextmanager
def operator_at_a_terminal() -> Iterator[tuple[SpaceHolds, Callable[[], None]]]:
    """An operator with a key, who lets the arm go on some time after he was asked; and what presses his key."""
    hand, program = pty.openpty()
    timers: list[threading.Timer] = []

    def press() -> None:
        os.write(hand, b" ")

    def go_on(_: str) -> None:
        timers.append(threading.Timer(RESUME_AFTER_S, press))
        timers[-1].start()

    try:
        yield SpaceHolds(TerminalKeys(program), go_on), press
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
        os.close(hand)
        os.close(program)


def problems_in(folder: Path, may_lack_end: bool) -> list[str]:
    """What is wrong with the recording in a folder: unreadable, not whole, or motion after its fault."""
    try:
        episode = read_episode(folder)
    except RecordingError as error:
        return [f"the recording: {error}"]
    return problems_of(episode, may_lack_end)


def chunks_done_s(folder: Path) -> list[float]:
    """When (wall) chunks were done, and the arm stood by itself; none of a recording that cannot be read."""
    with contextlib.suppress(RecordingError):
        return [event["t_s"] for event in read_episode(folder).of("chunk") if event["outcome"] == "completed"]
    return []


def problems_of(episode: RecordedEpisode, may_lack_end: bool) -> list[str]:
    """What is wrong with a recording, as a reader sees it."""
    found, kinds = [], [str(event["event"]) for event in episode.events]
    if not may_lack_end and (kinds[-1:] != ["end"] or episode.summary is None or episode.truncated):
        found.append(f"the recording ends in {kinds[-3:]}, summary {'there' if episode.summary else 'missing'}")
    stop = next((n for n, event in enumerate(episode.events)
                 if event["event"] == "fault" or (event["event"] == "error" and event.get("where") == "episode")), None)
    until = kinds.index("request", stop) if stop is not None and "request" in kinds[stop:] else len(kinds)
    if stop is not None and {"substep", "step", "decision"} & set(kinds[stop:until]):
        found.append("the recording shows motion after the fault")
    rows = Counter((event.get("cycle"), event.get("index")) for event in episode.of("decision"))
    if rows and rows.most_common(1)[0][1] > 1:
        found.append(f"row {rows.most_common(1)[0][0]} was executed twice")
    missing = [event["frame"] for event in episode.of("step") if not episode.frame_path(event["frame"]).is_file()]
    if missing:
        found.append(f"frames {missing} are missing")
    return found
