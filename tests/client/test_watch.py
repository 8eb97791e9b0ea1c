"""The monitor of server and camera, and answers that arrive while the arm waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from client_fakes import FakeCamera, FakeClock, ScriptedPolicy

from vlm2vla_client.arrivals import Arrivals
from vlm2vla_client.errors import CameraError, ServerUnreachableError
from vlm2vla_client.policies.base import Answered, CycleEvent, RowArrived
from vlm2vla_client.watch import LIVENESS_LIMIT_S, Watch

HOLD_S = 0.25


def wait_for_fault(watch: Watch, limit_s: float) -> float:
    began_s = time.monotonic()
    while watch.fault() is None and time.monotonic() - began_s < limit_s:
        time.sleep(0.02)
    return time.monotonic() - began_s


def test_a_policy_that_falls_silent_is_a_fault_after_one_second() -> None:
    policy = ScriptedPolicy(["Lift"], [[[0.0, 0.0, 0.0, 1.0]]])
    watch = Watch(policy)
    with watch.moving():
        time.sleep(0.3)
        assert watch.fault() is None
        policy.alive_now = False
        waited_s = wait_for_fault(watch, 3.0)
        assert LIVENESS_LIMIT_S - 0.4 <= waited_s <= LIVENESS_LIMIT_S + HOLD_S
        assert isinstance(watch.error, ServerUnreachableError)
        with pytest.raises(ServerUnreachableError):
            watch.check()
    assert watch.fault() is None


def test_nothing_is_polled_and_nothing_is_a_fault_while_the_arm_rests() -> None:
    policy = ScriptedPolicy(["Lift"], [[[0.0, 0.0, 0.0, 1.0]]])
    watch = Watch(policy)
    policy.alive_now = False
    time.sleep(0.05)
    assert watch.fault() is None
    policy.alive_now = True
    with watch.moving():
        assert watch.fault() is None
    watch.check()


def test_a_camera_that_goes_dark_is_a_fault() -> None:
    camera = FakeCamera(FakeClock())
    watch = Watch(ScriptedPolicy(["Lift"], [[[0.0, 0.0, 0.0, 1.0]]]), camera)
    with watch.moving():
        assert watch.fault() is None
        camera.errors = [CameraError("dark")] * 3
        assert wait_for_fault(watch, 3.0) < 0.8
        assert isinstance(watch.error, CameraError)


def test_a_slow_sign_of_life_is_one() -> None:
    class Slow(ScriptedPolicy):
        def alive(self, timeout_s: float) -> bool:
            time.sleep(0.8 * timeout_s)
            return True

    watch = Watch(Slow(["Lift"], [[[0.0, 0.0, 0.0, 1.0]]]))
    with watch.moving():
        assert wait_for_fault(watch, 1.6) >= 1.6


def endless(release: threading.Event) -> Iterator[CycleEvent]:
    yield RowArrived(0, [0.0, 0.0, 0.01, 1.0], "e")
    release.wait(10.0)


def test_waiting_for_the_next_row_ends_when_the_check_raises() -> None:
    release, clock = threading.Event(), FakeClock()
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ServerUnreachableError("silent", code="liveness")

    arrivals = iter(Arrivals(endless(release), clock, 5.0, check))
    assert isinstance(next(arrivals)[0], RowArrived)
    began_s = time.monotonic()
    with pytest.raises(ServerUnreachableError):
        next(arrivals)
    assert time.monotonic() - began_s < 1.0
    release.set()


def test_an_answer_that_stops_without_an_end_is_a_lost_server() -> None:
    def cut() -> Iterator[CycleEvent]:
        yield RowArrived(0, [0.0, 0.0, 0.01, 1.0], "e")

    with pytest.raises(ServerUnreachableError):
        list(Arrivals(cut(), FakeClock(), 5.0))


def test_events_after_the_end_are_not_read() -> None:
    def talkative() -> Iterator[CycleEvent]:
        yield Answered([[0.0, 0.0, 0.01, 1.0]], None, "e")
        raise AssertionError("read on")

    assert len(list(Arrivals(talkative(), FakeClock(), 5.0))) == 1


def test_an_answer_that_ends_badly_while_its_rows_move_is_a_fault_at_once() -> None:
    watch = Watch(ScriptedPolicy(["Lift"], [[[0.0, 0.0, 0.0, 1.0]]]))
    cut = ServerUnreachableError("cut", code="stream_cut")
    ended: list[ServerUnreachableError] = []
    with watch.moving(lambda: ended[0] if ended else None):
        assert watch.fault() is None
        ended.append(cut)
        assert watch.fault() == "cut" and watch.error is cut
    with watch.moving():
        assert watch.fault() is None
