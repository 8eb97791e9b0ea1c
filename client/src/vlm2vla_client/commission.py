"""``vlm2vla-client doctor --commission``: the arm does four things, a person says of each whether it did.

    axis_signs      up, forward and left by 2 cm each
    stop            a slow move that the operator's key stops
    contact_plane   the finger tips 1 cm above where the filter believes the counter
    gripper         opens, closes, closes on an object

What can be measured is measured too. One no, from the person or from a measurement, ends it: the arm holds and nothing
is written. ``commissioned.json`` is written when all four have passed, and counts for this arm and these limits only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.commissioning import UNCOMMISSIONED_SPEED, write_record
from vlm2vla_client.errors import ConfigurationError, NotCompletedError, SafetyStop
from vlm2vla_client.keys import Keys, require_terminal
from vlm2vla_client.operator_arm import OperatorArm, OperatorHeld
from vlm2vla_client.operator_bench import find_bench
from vlm2vla_client.operator_keys import Say, SpaceHolds, key_of_operator, say_to_operator

FloatArray = NDArray[np.float64]

AXIS_M: Final = 0.02
AXES: Final[tuple[tuple[str, tuple[float, float, float]], ...]] = (
    ("up", (0.0, 0.0, AXIS_M)),
    ("forward, away from its base", (AXIS_M, 0.0, 0.0)),
    ("to the left, seen from its base", (0.0, AXIS_M, 0.0)),
)
MAX_AXIS_ERROR_M: Final = 0.005
STOP_MOVE_M: Final = 0.10
STOP_TRIES: Final = 3
#: From the key being read: the contract's quarter of a second to stand, and what the arm may travel in it.
MAX_STOP_S: Final = 0.25
MAX_OVERSHOOT_M: Final = 0.010
STILL_M: Final = 0.0005
WATCH_S: Final = 0.6
ABOVE_M: Final = 0.01
OPENED: Final = 0.9
CLOSED: Final = 0.1
SETTLE_S: Final = 0.3


class MeasuredStop(SpaceHolds):
    """Any key holds; when it was read, and where the arm was then, is kept."""

    def __init__(self, keys: Keys, say: Say) -> None:
        super().__init__(keys, say)
        self.arm: OperatorArm | None = None
        self.seen: tuple[float, FloatArray] | None = None

    def _look(self, pressed: str) -> str | None:
        if pressed and self.arm is not None:
            self.seen = (self.arm.clock.now_s(), self.arm.position())
        return super()._look(pressed)


def commission(arguments: argparse.Namespace) -> int:
    """Walks through the four steps; 0 when all passed.

    Raises:
        ConfigurationError: no terminal, no calibration, --json, or wrong settings; nothing was connected.
        NotCompletedError: a step did not pass; the arm holds, nothing was written.
        RobotError, SafetyStop, KeyboardInterrupt: likewise.
    """
    if arguments.json:
        raise ConfigurationError("--commission talks to a person: leave out --json")
    bench = find_bench(arguments)
    keys = require_terminal("doctor --commission")
    stop = MeasuredStop(keys, say_to_operator)
    with keys, bench.open("commission", arguments.record, UNCOMMISSIONED_SPEED, stop) as arm:
        stop.arm = arm
        walk = Walk(arm, keys, stop, say_to_operator)
        measured = walk.all_steps()
        arm.recorder.summary({"task": "commission", "outcome": "executed", "exit_code": 0, **measured})
    if not bench.is_physical:
        print("rehearsed on the twin, nothing was written")
        return 0
    measured["passed_utc"] = datetime.now(UTC).isoformat(timespec="seconds")
    print(f"wrote {write_record(bench.robot, bench.arm, bench.limits, measured)}")
    return 0


class Walk:
    """One commissioning in progress."""

    def __init__(self, arm: OperatorArm, keys: Keys, stop: MeasuredStop, say: Say) -> None:
        self._arm, self._keys, self._stop, self._say = arm, keys, stop, say

    def all_steps(self) -> dict[str, Any]:
        """What the steps measured, by step. Raises as ``commission`` does."""
        name = self._arm.robot.capabilities.name
        self._say(f"commission: {name}, at a tenth of the speed. Keep the arm's reach clear")
        self._say("  and a hand at the power switch; support the arm before you cut its power. Any key holds the arm")
        self._say("  and ends this; so does a no. Nothing is written before all four steps have passed.")
        return {
            "axis_signs": self.axis_signs(),
            "stop": self.stop(),
            "contact_plane": self.contact_plane(),
            "gripper": self.gripper(),
        }

    # --- the steps ------------------------------------------------------------------------------------------------

    def axis_signs(self) -> dict[str, float]:
        """Each axis alone, then back the same way."""
        self._say("\n1 of 4  axis signs")
        errors: dict[str, float] = {}
        for words, shift in AXES:
            self._ready(f"  the gripper will move 2 cm {words}")
            errors[words.split(",")[0]] = self._moved(shift)
            self._confirm("axis_signs", f"did it move 2 cm {words}, and nowhere else?")
        for _, shift in reversed(AXES):
            self._move([-v for v in shift])
        return errors

    def stop(self) -> dict[str, float]:
        """A slow move that a key stops; how long and how far it took, from the key being read."""
        self._say("\n2 of 4  stop")
        start = self._arm.position()
        way_m = STOP_MOVE_M if start[1] <= 0.0 else -STOP_MOVE_M
        for _ in range(STOP_TRIES):
            self._ready(f"  the arm will move {100 * abs(way_m):.0f} cm sideways, 4 s: press SPACE on its way")
            self._stop.seen = None
            try:
                self._move([0.0, way_m, 0.0])
            except OperatorHeld:
                found = self._after_stop()
                self._confirm("stop", "did it stop at once, and stay?")
                self._back_to(start)
                return found
            self._say("  no key was read on the way")
            self._back_to(start)
        raise self._no("stop", "no key stopped the arm")

    def contact_plane(self) -> dict[str, float]:
        """The finger tips 1 cm above the filter's counter."""
        self._say("\n3 of 4  contact plane")
        start = self._arm.position()
        self._ready("  the gripper will go down to 1 cm above the counter: nothing may lie under it")
        down_m = float(self._arm.tips()[:, 2].min()) - (self._arm.limits.counter_z_m + ABOVE_M)
        self._move([0.0, 0.0, -down_m])
        self._arm.clock.sleep_s(SETTLE_S)
        above_m = float(self._arm.tips()[:, 2].min()) - self._arm.limits.counter_z_m
        self._confirm("contact_plane", "is the gap under the fingers about 1 cm (a finger's thickness; 0.5 to 1.5 cm)?")
        self._back_to(start)
        return {"above_counter_m": round(above_m, 4)}

    def gripper(self) -> dict[str, float]:
        """Open, closed on nothing, closed on something."""
        self._say("\n4 of 4  gripper")
        self._ready("  the fingers will open: hands away from them")
        opened = self._gripped(True)
        self._measured("gripper", opened >= OPENED, f"the fingers are {opened:.2f} open (1 is open)")
        self._confirm("gripper", "are they open?")
        self._ready("  the fingers will close on nothing: hands away from them")
        closed = self._gripped(False)
        self._measured("gripper", closed <= CLOSED, f"the fingers are {closed:.2f} open (0 is closed)")
        self._confirm("gripper", "are they closed?")
        self._gripped(True)
        if not self._arm.robot.capabilities.physical:  # a rehearsal: nobody can reach into the twin
            return {"open": round(opened, 3), "closed": round(closed, 3)}
        self._ready("  stand something soft, 2 to 5 cm wide, between the fingers; hands away; they will close on it")
        held = self._gripped(False)
        self._measured("gripper", held > CLOSED, f"the fingers are {held:.2f} open: they closed on nothing")
        self._confirm("gripper", "do they hold it, without crushing it?")
        self._ready("  the fingers will open: take it when they have")
        self._gripped(True)
        return {"open": round(opened, 3), "closed": round(closed, 3), "on_object": round(held, 3)}

    # --- motion and measurement -----------------------------------------------------------------------------------

    def _move(self, shift: Sequence[float]) -> None:
        with self._stop.moving():
            result = self._arm.shift(shift)
        if result.reasons:
            raise SafetyStop(f"the filter changed the motion ({', '.join(result.reasons)}): give the arm more room")

    def _back_to(self, start: FloatArray) -> None:
        with self._stop.moving():
            self._arm.go(start)

    def _moved(self, shift: Sequence[float]) -> float:
        """Moves by it; how far off the measured displacement was. Raises NotCompletedError beyond 5 mm."""
        before = self._arm.position()
        self._move(shift)
        self._arm.clock.sleep_s(SETTLE_S)
        error_m = float(np.linalg.norm(self._arm.position() - before - np.asarray(shift)))
        moved = ", ".join(f"{1000 * v:+.0f}" for v in self._arm.position() - before)
        self._measured("axis_signs", error_m <= MAX_AXIS_ERROR_M, f"measured ({moved}) mm in x, y, z")
        return round(error_m, 4)

    def _after_stop(self) -> dict[str, float]:
        """Watches the arm come to rest. Raises NotCompletedError when it took longer or went farther than it may."""
        assert self._stop.seen is not None
        clock, (seen_s, seen_m) = self._arm.clock, self._stop.seen
        track = [(clock.now_s(), self._arm.position())]
        while track[-1][0] - track[0][0] < WATCH_S:
            clock.sleep_s(0.01)
            track.append((clock.now_s(), self._arm.position()))
        end_m = track[-1][1]
        moving = [at_s for at_s, place in track if float(np.linalg.norm(place - end_m)) > STILL_M]
        stood_s = (moving[-1] if moving else track[0][0]) - seen_s
        overshoot_m = float(np.linalg.norm(end_m - seen_m))
        found = f"stood {1000 * stood_s:.0f} ms after the key was read, {1000 * overshoot_m:.1f} mm on"
        self._measured("stop", stood_s <= MAX_STOP_S and overshoot_m <= MAX_OVERSHOOT_M, found)
        return {"stood_after_s": round(stood_s, 3), "overshoot_m": round(overshoot_m, 4)}

    def _gripped(self, open_: bool) -> float:
        with self._stop.moving():
            self._arm.grip(open_)
        return float(self._arm.state().gripper)

    # --- the person -----------------------------------------------------------------------------------------------

    def _measured(self, step: str, good: bool, found: str) -> None:
        self._say(f"  {'' if good else 'NOT GOOD: '}{found}")
        if not good:
            raise self._no(step, found)

    def _ready(self, what: str) -> None:
        key = self._asked(f"{what}. Enter: go; q: end")
        while key not in ("\r", "\n"):
            key = self._asked("  Enter or q, please")

    def _confirm(self, step: str, question: str) -> None:
        """One key. Raises NotCompletedError unless it is yes."""
        key = self._asked(f"  {question} [y]es, [n]o").lower()
        while key not in ("y", "n"):
            key = self._asked("  y or n, please").lower()
        self._arm.recorder.event("confirmed", step=step, question=question, yes=key == "y")
        if key == "n":
            raise self._no(step, f"not confirmed: {question}")

    def _asked(self, question: str) -> str:
        """The key that answers: what was pressed before the question is dropped before it is shown, not after, or a
        quick answer would be lost with it.
        """
        self._keys.pending()
        self._say(question)
        return key_of_operator(self._keys)

    def _no(self, step: str, found: str) -> NotCompletedError:
        return NotCompletedError(f"{step}: {found}; the arm holds, nothing was written, it stays uncommissioned")
