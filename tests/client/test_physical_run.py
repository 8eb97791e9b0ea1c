"""`run --robot widowx` from the command line to the motors: the arm's double, a scripted server, a fake camera."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from arm_bench import STARVED, ArmBench, patiently
from client_fakes import (
    FakeServer,
    ScriptedPolicy,
    ScriptedVerifier,
    WallCamera,
    body_of,
    cycle_lines,
    info_body,
    ndjson,
    stage,
)
from robot_fakes import limits

from vlm2vla_client import commands
from vlm2vla_client.cli import main
from vlm2vla_client.commissioning import STEPS, is_commissioned, restrain, write_record
from vlm2vla_client.config import ClientConfig, load_config
from vlm2vla_client.errors import ConfigurationError, RobotError
from vlm2vla_client.physical import PhysicalRun, make_robot, physical_limits, run_on_arm
from vlm2vla_client.progress import SilentProgress


def server(rows: list[list[float]], **info: Any) -> FakeServer:
    """Answers one subtask and the same rows every time."""

    def cycle(request: httpx.Request) -> httpx.Response:
        body = ndjson(cycle_lines(body_of(request), rows))
        return httpx.Response(200, headers={"content-type": "application/x-ndjson"}, content=body)

    return FakeServer(
        info=lambda _: httpx.Response(200, json=info_body(**info)),
        readyz=lambda _: httpx.Response(200, json={"status": "ready"}),
        subtasks=lambda request: httpx.Response(200, json=stage(body_of(request), subtasks=["Move to Carrot"])),
        cycle=cycle,
    )


class Desk:
    """A robot PC: its config folder, its arm's double, its keyboard."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, keys: str = "y\n" * 5) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.bench = ArmBench(folder, "ros1")
        settings = self.bench.settings
        variables = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.environment.items())
        home = folder / "vlm2vla"
        home.mkdir()
        (home / "client.toml").write_text(
            "[limits]\ncounter_z_m = 0.0\nwall_x_m = 0.56\n"
            f"[widowx]\npython = {json.dumps(sys.executable)}\nname = \"test-{folder.name}\"\n"
            f"[widowx.environment]\n{variables}\n"
        )
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
        monkeypatch.setattr(commands, "open_camera", lambda *_: WallCamera())
        monkeypatch.setattr(sys, "stdin", io.StringIO(keys))

    def commission(self) -> None:
        """As ``doctor --commission`` leaves it."""
        write_record("widowx", f"test-{self.folder.name}", limits(), {})

    def run(self, server: FakeServer, *arguments: str) -> int:
        """The command line."""
        self.monkeypatch.setattr(commands, "connect", lambda *_: server.connection())
        record = str(self.folder / "runs")
        code = main(["run", "--task", "pick up the carrot", "--verifier", "none", "--record", record, *arguments])
        if code == 7 and any(words in self.events()[-1]["message"] for words in STARVED):
            raise RobotError(self.events()[-1]["message"])
        return code

    def events(self) -> list[dict[str, Any]]:
        """Of the only episode."""
        (episode,) = (self.folder / "runs").iterdir()
        return [json.loads(line) for line in (episode / "events.jsonl").read_text().splitlines()]


ROWS = [[0.02, 0.0, -0.01, 1.0], [0.0, 0.01, 0.0, 1.0]]


@patiently
def test_an_arm_that_was_never_commissioned_is_confirmed_and_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path, monkeypatch)
    assert desk.run(server(ROWS)) == 0
    assert "never commissioned: --confirm --speed 0.1 apply" in capsys.readouterr().err
    durations = [event["duration_s"] for event in desk.events() if event["event"] == "substep"]
    assert len(desk.bench.logged("group")) >= len(durations) >= 9
    assert pytest.approx(sum(durations[:-4]), rel=0.1) == 0.022 / (0.25 * 0.1)
    assert not desk.bench.logged("torque")


@patiently
def test_without_a_yes_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch, keys="q\n")
    assert desk.run(server(ROWS)) == 130
    assert not desk.bench.logged("group")


@patiently
def test_a_commissioned_arm_runs_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path, monkeypatch, keys="")
    desk.commission()
    assert desk.run(server(ROWS), "--speed", "0.5") == 0
    assert "commissioned" not in capsys.readouterr().err


def test_an_untrained_policy_is_refused_before_the_arm_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path, monkeypatch)
    assert desk.run(server(ROWS, policy=False), "--allow-untrained") == 2
    assert "--allow-untrained --confirm" in capsys.readouterr().err
    assert not desk.bench.log_file.exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("policy", ["expert", "swapped"])
def test_policies_of_the_twin_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    assert Desk(tmp_path, monkeypatch).run(server(ROWS), "--policy", policy) == 2


@patiently
def test_a_fault_of_the_arm_is_exit_7_and_the_episode_is_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, monkeypatch)
    desk.commission()
    desk.bench.set(hardware_error=0x20)
    assert desk.run(server(ROWS)) == 7
    end = desk.events()[-1]
    assert end["event"] == "end" and end["outcome"] == "robot" and "hardware error" in end["message"]


def test_limits_of_a_bench_must_be_measured() -> None:
    with pytest.raises(ConfigurationError, match="counter_z_m and wall_x_m"):
        physical_limits({})
    assert physical_limits({"counter_z_m": 0.01, "wall_x_m": 0.5}).counter_z_m == 0.01


def test_robots_are_made_from_their_tables(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text('[widowx]\nname = "left"\n[bridge]\nhost = "pc"\n')
    config = load_config(file)
    assert make_robot("widowx", config)[1] == "left"
    assert make_robot("bridge", config)[1] == "pc:5556"
    assert make_robot("bridge", config)[0].capabilities.physical
    with pytest.raises(ConfigurationError, match="unknown physical robot"):
        make_robot("twin", ClientConfig())
    file.write_text("widowx = 3\n")
    with pytest.raises(ConfigurationError, match="widowx: must be a valid dictionary"):
        load_config(file)


def test_only_a_whole_record_of_this_arm_on_this_bench_counts(tmp_path: Path) -> None:
    file, here = tmp_path / "commissioned.json", limits()
    assert not is_commissioned("widowx", "left", here, file)
    unfinished = {"robot": "widowx", "arm": "left", "counter_z_m": 0.0, "wall_x_m": 0.56, "passed": ["stop"]}
    nowhere = {"robot": "widowx", "arm": "left", "passed": list(STEPS)}
    for text in ("[]", "{", json.dumps(unfinished), json.dumps(nowhere), json.dumps({**nowhere, "counter_z_m": True})):
        file.write_text(text)
        assert not is_commissioned("widowx", "left", here, file)
    assert write_record("widowx", "left", here, {"stop": {"overshoot_m": 0.001}}, file) == file
    assert is_commissioned("widowx", "left", here, file) and not is_commissioned("widowx", "right", here, file)
    assert not is_commissioned("widowx", "left", limits(counter_z_m=0.004), file), "calibrated anew since"
    assert not is_commissioned("widowx", "left", limits(wall_x_m=0.50), file)
    assert restrain(False, 0.5, True) == (False, 0.5)
    assert restrain(False, 0.5, False) == (True, 0.1) and restrain(True, 0.05, False) == (True, 0.05)


def test_an_arm_process_that_dies_while_the_arm_moves_ends_the_episode(tmp_path: Path) -> None:
    bench = ArmBench(tmp_path, "ros2")
    policy = ScriptedPolicy(["go"], [[[0.05, 0.0, 0.0, 1.0]] * 2])
    killer = threading.Thread(target=kill_when_moving, args=(bench,), daemon=True)
    killer.start()
    result = run_on_arm(
        PhysicalRun("go", speed=0.2), bench.robot, WallCamera(), policy, ScriptedVerifier([True]), limits(),
        tmp_path / "episode", SilentProgress(),
    )  # fmt: skip
    killer.join(5.0)
    assert result.exit_code == 7 and "arm process ended" in result.message
    assert (tmp_path / "episode" / "summary.json").is_file()


def kill_when_moving(bench: ArmBench) -> None:
    """Ends the arm process once the arm has been told to move."""
    ends_s = time.monotonic() + 20.0
    while time.monotonic() < ends_s and len(bench.logged("group")) < 2:
        time.sleep(0.01)
    os.kill(bench.process_id, signal.SIGKILL)
