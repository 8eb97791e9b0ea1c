"""Shadow mode: what the twin foresees of a chunk, and what the loop, the operator and the arm's double make of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from arm_bench import patiently
from client_fakes import ScriptedPolicy, ScriptedVerifier
from robot_fakes import limits, policy_context, state_at
from test_loop import Bench
from test_physical_run import Desk, server

from vlm2vla_client.cli import main
from vlm2vla_client.confirm import Proposal, confirm_on_terminal
from vlm2vla_client.executor import Outcome
from vlm2vla_client.recorder import read_episode
from vlm2vla_client.safety import Limits, Reason
from vlm2vla_client.shadow import BLIND, Forecast, Touch, open_shadow
from vlm2vla_client.view import render

AHEAD = [[0.03, 0.0, 0.0, 1.0]] * 2
#: Where the hand comes when the fingers go forward from (0.32, 0, 0.05): the filter sees the finger tips pass below it.
IN_THE_WAY = (((0.36, -0.1, 0.12), (0.42, 0.1, 0.3)),)


def foreseen(rows: list[list[float]], position_m: tuple[float, float, float], **changes: Any) -> Forecast:
    return open_shadow(limits(**changes), 1.0).rehearse(rows, policy_context(), state_at(position_m))


def test_free_motion_ends_where_the_rows_say_and_meets_nothing() -> None:
    forecast = foreseen([[0.02, 0.01, -0.01, 1.0]] * 3, (0.30, 0.0, 0.15))
    assert forecast.outcome is Outcome.COMPLETED and not forecast.forbidden and not forecast.touches
    assert forecast.end_m == pytest.approx((0.36, 0.03, 0.12), abs=0.004)
    assert forecast.lines() == ["all 3 rows, completed", BLIND]


def test_pressing_the_fingers_down_is_contact_as_the_paper_has_it_and_not_forbidden() -> None:
    for counter_z_m in (0.0, 0.04):
        forecast = foreseen([[0.0, 0.0, -0.03, 1.0]] * 3, (0.30, 0.0, counter_z_m + 0.05), counter_z_m=counter_z_m)
        assert not forecast.forbidden
        assert "row 1 clip: counter_reached" in forecast.lines() and "row 2 clip: counter_contact" in forecast.lines()
        assert forecast.end_m[2] == pytest.approx(counter_z_m + 0.003, abs=0.003)


def test_a_hand_that_meets_the_wall_is_forbidden_though_the_filter_lets_it_pass() -> None:
    free = foreseen(AHEAD, (0.32, 0.0, 0.10), wall_x_m=0.56)
    assert free.outcome is Outcome.COMPLETED and not free.forbidden
    near = foreseen(AHEAD, (0.32, 0.0, 0.10), wall_x_m=0.40)
    assert near.forbidden and {(touch.link, touch.thing) for touch in near.touches if touch.forbidden} >= {
        ("gripper_link", "wall")
    }
    assert Reason.WALL_REACHED not in near.reasons and near.lines()[0].startswith("forbidden: gripper link")
    # A row that stops 6 mm before it has not touched, but came nearer than a real arm's sag allows.
    close = foreseen([[0.03, 0.0, 0.0, 1.0]], (0.32, 0.0, 0.10), wall_x_m=0.374)
    assert close.outcome is Outcome.COMPLETED and close.forbidden
    assert 0.0 < min(touch.gap_m for touch in close.touches) < 0.010


def test_links_that_the_filter_does_not_know_meet_a_forbidden_box() -> None:
    forecast = foreseen([[0.04, 0.0, 0.0, 1.0]], (0.32, 0.0, 0.05), forbidden_boxes=IN_THE_WAY)
    assert {touch.link for touch in forecast.touches if touch.forbidden} >= {"gripper_link", "wrist_link"}
    assert all(touch.thing == "box_0" and touch.row == 0 for touch in forecast.touches)
    raised = foreseen([[0.04, 0.0, 0.0, 1.0]], (0.32, 0.0, 0.09), forbidden_boxes=IN_THE_WAY, counter_z_m=0.04)
    assert raised.forbidden, "a box's heights count from the counter"


def test_an_arm_that_starts_too_near_may_leave_but_not_come_nearer() -> None:
    away = foreseen([[-0.02, 0.0, 0.0, 1.0]], (0.365, 0.0, 0.10), wall_x_m=0.390)
    assert away.outcome is Outcome.COMPLETED and not away.forbidden
    assert foreseen([[0.01, 0.0, 0.0, 1.0]], (0.365, 0.0, 0.10), wall_x_m=0.390).forbidden


def test_what_the_filter_would_refuse_is_foreseen_with_its_row() -> None:
    forecast = foreseen([[0.0, 0.0, 0.04, 1.0]] * 2 + [[0.0, 0.0, 0.2, 1.0]], (0.30, 0.0, 0.15))
    assert (forecast.outcome, forecast.rows, forecast.asked) == (Outcome.REFUSED, 3, 3)
    assert "row 2 refuse: axis_far_over_limit" in forecast.lines() and not forecast.forbidden
    assert foreseen([[0.05, 0.0, 0.0, 1.0]] * 5, (0.40, 0.0, 0.20)).reasons == (Reason.UNREACHABLE,)


def test_each_rehearsal_begins_where_the_arm_is() -> None:
    shadow = open_shadow(limits(forbidden_boxes=IN_THE_WAY), 0.5)
    rows, state = [[0.02, 0.0, 0.0, 0.0]], state_at((0.30, 0.05, 0.15))
    first = shadow.rehearse(rows, policy_context(), state)
    assert shadow.rehearse([[0.04, 0.0, 0.0, 1.0]], policy_context(), state_at((0.32, 0.0, 0.05))).forbidden
    assert shadow.rehearse(rows, policy_context(), state) == first


class Foreteller:
    """A shadow that foresees what it is told."""

    def __init__(self, *forbidden: bool) -> None:
        self.script, self.asked = list(forbidden), 0

    def rehearse(self, rows: Any, context: Any, state: Any) -> Forecast:
        self.asked += 1
        return forecast(self.script.pop(0) if len(self.script) > 1 else self.script[0], len(rows))


def forecast(forbidden: bool, rows: int = 1) -> Forecast:
    touches = (Touch("wrist_link", "wall", 0, -0.001, True),) if forbidden else ()
    return Forecast(Outcome.COMPLETED, "", (), rows, rows, (), (0.3, 0.0, 0.1), touches)


def bench(folder: Path, shadow: Foreteller, confirm: Any = None, **config: Any) -> Bench:
    policy = ScriptedPolicy(["Lift"], [[[0.0, 0.0, 0.04, 1.0]]])
    return Bench(folder, policy, ScriptedVerifier([True]), confirm=confirm, shadow=shadow, config=config)


def test_with_nobody_to_ask_a_forbidden_chunk_is_planned_anew_and_three_stop_the_run(tmp_path: Path) -> None:
    run = bench(tmp_path / "once", Foreteller(True, False))
    result = run.run()
    assert (result.exit_code, result.cycles, len(run.executor.chunks)) == (0, 2, 1)
    recording = run.recording()
    assert [event["forbidden"] for event in recording.of("forecast")] == [True, False]
    assert "wrist link on the wall" in recording.of("dropped")[0]["reason"]
    assert "the twin foresaw: wrist_link and wall" in render(recording)
    stopped = bench(tmp_path / "always", Foreteller(True)).run()
    assert (stopped.exit_code, stopped.outcome, stopped.cycles) == (5, "safety_stop", 3)


def test_the_operator_is_shown_the_forecast_and_decides(tmp_path: Path) -> None:
    asked: list[Proposal] = []

    def confirm(proposal: Proposal) -> bool:
        asked.append(proposal)
        return True

    run = bench(tmp_path / "e", Foreteller(True), confirm)
    assert run.run().exit_code == 0 and len(run.executor.chunks) == 1
    assert asked[0].forecast is not None and asked[0].forecast.forbidden


@pytest.mark.parametrize(("forbidden", "typed", "moves"), [
    (False, "y\n", True), (True, "y\n", False), (True, "yes\n", True), (True, "YES\n", True), (False, "n\n", False),
])  # fmt: skip
def test_y_is_not_enough_where_the_twin_met_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forbidden: bool, typed: str, moves: bool
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert confirm_on_terminal(Proposal("Lift", "Up.", [[0.0, 0.0, 0.04, 1.0]], forecast(forbidden))) is moves
    shown = capsys.readouterr().err
    assert ("forbidden: wrist link on the wall (row 0)" in shown) is forbidden and BLIND in shown


def test_a_dry_run_foretells_too(tmp_path: Path) -> None:
    shadow = Foreteller(True)
    assert bench(tmp_path / "e", shadow, dry_run=True).run().outcome == "dry_run" and shadow.asked == 1


@patiently
def test_a_physical_arm_does_not_begin_what_the_twin_could_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path, monkeypatch, keys="")
    desk.commission()
    file = tmp_path / "vlm2vla" / "client.toml"
    box = "forbidden_boxes = [[[0.335, -0.1, 0.20], [0.40, 0.1, 0.32]]]\n"
    file.write_text(file.read_text().replace("[widowx]", box + "[widowx]", 1))
    rows = [[0.03, 0.0, 0.0, 1.0]]
    assert desk.run(server(rows), "--shadow") == 5
    assert not desk.bench.logged("group"), "nothing was commanded"
    kinds = [event["event"] for event in desk.events()]
    assert kinds.count("forecast") == 3 and "decision" not in kinds
    assert "3 chunks in a row were refused: the twin foresees: forbidden:" in desk.events()[-1]["message"]


@patiently
def test_a_physical_arm_goes_where_the_twin_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch, keys="")
    desk.commission()
    assert desk.run(server([[0.02, 0.0, -0.01, 1.0], [0.0, 0.01, 0.0, 1.0]]), "--shadow", "--speed", "0.5") == 0
    events = desk.events()
    (foretold,) = [event for event in events if event["event"] == "forecast"]
    (chunk,) = [event for event in events if event["event"] == "chunk"]
    assert not foretold["forbidden"]
    assert foretold["end_m"] == pytest.approx(chunk["position_m"], abs=0.006)


def test_a_whole_task_in_the_twin_under_its_own_shadow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    arguments = ["run", "--sim", "--policy", "expert", "--verifier", "twin", "--seed", "500021", "--shadow", "--json"]
    assert main([*arguments, "--task", "pick up the carrot", "--record", str(tmp_path / "runs")]) == 0
    episode = read_episode(Path(json.loads(capsys.readouterr().out)["folder"]))
    foretold, chunks = episode.of("forecast"), episode.of("chunk")
    assert episode.header["config"]["shadow"] is True
    assert len(foretold) == len(chunks) > 1 and not any(event["forbidden"] for event in foretold)
    for before, after in zip(foretold, chunks, strict=True):
        assert before["end_m"] == pytest.approx(after["position_m"], abs=0.01)


def test_streamed_rows_cannot_be_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["run", "--sim", "--task", "t", "--shadow", "--execute", "streamed"]) == 2
    assert "--shadow needs --execute whole" in capsys.readouterr().err


WITHOUT_SIMULATOR = """
import sys
sys.modules["mujoco"] = None
from vlm2vla_client.cli import main
sys.exit(main(["run", "--robot", "widowx", "--camera", "v4l2", "--verifier", "none", "--task", "t", "--shadow"]))
"""


def test_a_robot_pc_without_the_simulator_is_told_which_extra_it_lacks(tmp_path: Path) -> None:
    home = tmp_path / "vlm2vla"
    home.mkdir()
    (home / "limits.toml").write_text("counter_z_m = 0.0\nwall_x_m = 0.5\n")
    done = subprocess.run([sys.executable, "-c", WITHOUT_SIMULATOR], capture_output=True, text=True, timeout=60,
                          env={"XDG_CONFIG_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}, cwd=tmp_path,
                          check=False)  # fmt: skip
    assert done.returncode == 2 and "pip install 'vlm2vla-client[sim]'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_limits_of_the_run_are_the_bench_of_the_shadow() -> None:
    here = Limits(counter_z_m=0.03, wall_x_m=0.5, max_joint_speed_rad_s=3.14)
    forecast = open_shadow(here, 1.0).rehearse([[0.0, 0.0, -0.05, 1.0]], policy_context(), state_at((0.30, 0.0, 0.06)))
    assert forecast.end_m[2] == pytest.approx(0.033, abs=0.003)
