"""The command line in the twin, without a server: whole episodes, their folders, interruptions and replays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_fakes import FakeServer, body_of, cycle_lines, ndjson, stage, stream_response
from httpx import Request, Response
from operator_terminal import Seat

from vlm2vla_client import commands
from vlm2vla_client.cli import main
from vlm2vla_client.errors import ConfigurationError, RecordingError, VerifierError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import plain, read_episode
from vlm2vla_client.replay import RecordedPolicy, RecordedVerifier
from vlm2vla_client.scenes import choose_scene, scene_from_json
from vlm2vla_client.sim import SimRequest, run_in_twin, swapped_image
from vlm2vla_schema.images import decode_image, from_base64

SEED = "500021"
RUN = ["run", "--sim", "--policy", "expert", "--verifier", "twin", "--seed", SEED]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main([*RUN, "--json", *arguments])
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1, captured
    value = json.loads(captured.out)
    assert value["exit_code"] == code
    assert isinstance(value, dict)
    return value


def test_the_expert_picks_the_carrot_and_leaves_a_complete_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(capsys, "--task", "pick up the carrot")
    assert (result["exit_code"], result["outcome"], result["success"]) == (0, "verified", True)
    assert (result["physics"]["score"], result["physics"]["suite"]) == (2, "pick_carrot")
    folder = Path(result["folder"])
    assert folder.resolve().parent == tmp_path / "runs"
    names = {path.name for path in folder.iterdir()}
    assert {"events.jsonl", "summary.json", "limits.json", "frames", "view.html", "episode.gif"} <= names
    episode = read_episode(folder)
    assert episode.header["config"]["scenario"] == "in_distribution" and episode.header["config"]["seed"] == int(SEED)
    assert episode.summary is not None and episode.summary["physics"]["success"] is True
    spec = scene_from_json(episode.header["config"]["scene_spec"])
    assert plain(spec) == episode.header["config"]["scene_spec"]


def test_a_task_of_no_suite_gets_the_kitchen_and_nobody_judges_it(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "--task", "lift the banana", "--max-cycles", "1")
    assert result["exit_code"] == 3 and result["physics"] is None and not result["success"]
    episode = read_episode(Path(result["folder"]))
    assert episode.header["config"]["scene"] == "kitchen"
    assert episode.header["config"]["scenario"] == "out_of_distribution"
    assert len(episode.header["config"]["objects"]) == 6


def test_scene_and_scenario_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--scene", "carrot_on_plate", "--scenario", "out_of_distribution", "--dry-run"]
    result = run_json(capsys, "--task", "pick up the carrot", *given)
    assert (result["outcome"], result["rows_executed"]) == ("dry_run", 0)
    config = read_episode(Path(result["folder"])).header["config"]
    assert (config["scene"], config["suite"], config["scenario"]) == (
        "carrot_on_plate",
        "pick_carrot",
        "out_of_distribution",
    )
    assert main([*RUN, "--task", "t", "--scene", "nowhere"]) == 2
    assert "kitchen" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_scene_and_another_another() -> None:
    one, same, other = (choose_scene("pick up the item above the cat", None, seed) for seed in (7, 7, 8))
    assert one == same and one.spec != other.spec
    assert one.suite is not None and any(card.name == "cat" for card in one.spec.cards)


def test_chance_does_not_complete_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "--task", "pick up the carrot", "--policy", "random", "--max-cycles", "3")
    assert result["exit_code"] in (3, 5) and not result["verified"]


def test_the_expert_at_half_speed_and_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "--task", "pick up the carrot", "--speed", "0.5", "--execute", "streamed")
    assert result["exit_code"] == 0 and result["success"]


def test_with_verifier_none_everything_is_executed(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, "--task", "pick up the carrot", "--verifier", "none")
    assert (result["exit_code"], result["outcome"]) == (0, "executed")
    assert not result["verified"] and result["success"]


def test_the_live_display_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--task", "pick up the carrot"]) == 0
    text = capsys.readouterr().out
    for expected in ("subtask 1 of 3", "plan ", "row 0", "pass", "done (High)", "All 3 subtasks verified", "physics: "):
        assert expected in text


def test_confirmed_on_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(commands, "confirm_on_terminal", lambda proposal: True)
    assert run_json(capsys, "--task", "pick up the carrot", "--confirm")["exit_code"] == 0


def test_a_server_that_is_not_there_is_exit_4_and_leaves_no_folder(tmp_path: Path) -> None:
    code = main(["run", "--sim", "--task", "pick up the carrot", "--server", "http://127.0.0.1:1"])
    assert code == 4
    assert list((tmp_path / "runs").iterdir()) == []


# --- replay ----------------------------------------------------------------------------------------------------------


def test_a_replay_moves_the_same_way(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recorded = run_json(capsys, "--task", "put the carrot on the yellow plate")
    assert main(["replay", recorded["folder"], "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["same_decisions"] and replayed["largest_gap_m"] < 0.001
    assert replayed["rows_executed"] == recorded["rows_executed"]
    assert replayed["physics"] == recorded["physics"]
    assert main(["view", replayed["folder"], "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()


def test_a_replay_of_a_failure_ends_where_the_recording_did(capsys: pytest.CaptureFixture[str]) -> None:
    recorded = run_json(capsys, "--task", "pick up the carrot", "--max-cycles", "2")
    assert main(["replay", recorded["folder"], "--json"]) == 3
    replayed = json.loads(capsys.readouterr().out)
    assert replayed["same_decisions"] and replayed["subtasks_done"] == 2


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    folder.mkdir()
    header = {"event": "episode", "task": "t", "config": {"robot": "widowx"}}
    (folder / "events.jsonl").write_text(json.dumps(header) + "\n")
    assert main(["replay", str(folder)]) == 2
    header["config"] = {"robot": "twin"}
    (folder / "events.jsonl").write_text(json.dumps(header) + "\n")
    assert main(["replay", str(folder)]) == 2
    assert list((tmp_path / "runs").iterdir()) == []
    episode = read_episode(folder)
    with pytest.raises(RecordingError):
        RecordedPolicy(episode)
    frame: Any = None
    with pytest.raises(VerifierError):
        RecordedVerifier(episode).verify(frame, frame, "a", None, 1.0)
    scenes: list[Any] = [None, [], {"seed": 1, "objects": [{"name": 3}]}, {"objects": 4}]
    for broken in scenes:
        with pytest.raises(RecordingError):
            scene_from_json(broken)


# --- the control with the wrong picture ------------------------------------------------------------------------------


def test_the_swapped_control_shows_another_seeds_picture(tmp_path: Path) -> None:
    images: list[Any] = []

    def cycle(request: Request) -> Response:
        images.append(decode_image(from_base64(body_of(request)["image"])))
        return stream_response([ndjson(cycle_lines(body_of(request), [[0.0, 0.0, 0.01, 1.0]]))])

    server = FakeServer(
        readyz=lambda _: Response(200, json={"ready": True}),
        subtasks=lambda request: Response(200, json=stage(body_of(request), subtasks=["Move to Carrot"])),
        cycle=cycle,
    )
    choice = choose_scene("pick up the carrot", None, 500_021)
    request = SimRequest(
        task="pick up the carrot",
        choice=choice,
        policy="swapped",
        verifiers=("none",),
        connection=server.connection(),
        animate=False,
    )
    result = run_in_twin(request, tmp_path / "e", SilentProgress())
    assert result.exit_code == 0
    shown = images[0].astype(int)
    other = swapped_image(choice)().astype(int)
    true = decode_image(read_episode(tmp_path / "e").frame_path(0).read_bytes()).astype(int)
    assert np.abs(shown - other).mean() < 2.0 < np.abs(shown - true).mean()


def test_what_needs_a_server_says_so(tmp_path: Path) -> None:
    choice = choose_scene("pick up the carrot", None, 1)
    for policy, verifier in (("server", "none"), ("swapped", "none"), ("expert", "server"), ("expert", "human")):
        request = SimRequest(task="t", choice=choice, policy=policy, verifiers=(verifier,))
        with pytest.raises(ConfigurationError):
            run_in_twin(request, tmp_path / "e", SilentProgress())


# --- interruptions ---------------------------------------------------------------------------------------------------


def start_slow_run(folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A run in real time in a process of its own, already moving."""
    code = "import sys; from vlm2vla_client.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*RUN, "--task", "pick up the carrot", "--realtime", "--speed", "0.1", "--record", str(folder)]
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    ends_s = time.monotonic() + 60.0
    while time.monotonic() < ends_s and child.poll() is None:
        for events in folder.glob("*/events.jsonl"):
            if b'"event": "substep"' in events.read_bytes():
                return child, events.parent
        time.sleep(0.05)
    child.kill()
    raise AssertionError("the run never began to move")


@pytest.mark.clock
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_holds_closes_its_recording_and_exits_130(tmp_path: Path, number: signal.Signals) -> None:
    child, folder = start_slow_run(tmp_path / "r")
    child.send_signal(number)
    sent_s = time.monotonic()
    assert child.wait(timeout=20) == 130
    episode = read_episode(folder)
    hold = next(event for event in episode.of("hold") if event["t_s"] >= sent_s - 0.05)
    assert hold["t_s"] - sent_s <= 0.25
    assert [event for event in episode.of("substep") if event["t_s"] > hold["t_s"]] == []
    assert episode.summary is not None and episode.summary["outcome"] == "interrupted"
    assert (folder / "view.html").is_file()


def test_a_run_that_is_killed_leaves_a_readable_folder(tmp_path: Path) -> None:
    child, folder = start_slow_run(tmp_path / "r")
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(timeout=20) == -signal.SIGKILL
    episode = read_episode(folder)
    assert episode.summary is None and episode.of("substep") and episode.limits is not None
    assert main(["view", str(folder)]) == 0
    assert "cut off" in (folder / "view.html").read_text()


def test_waiting_for_a_server_that_is_still_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2vla_client.http.READY_POLL_S", 0.01)
    answers = [503, 503, 200]

    def readyz(_: Request) -> Response:
        code = answers.pop(0)
        error = {"error": {"code": "not_ready", "message": "loading", "details": {}}}
        return Response(code, json={"ready": True} if code == 200 else error)

    connection: ServerConnection = FakeServer(readyz=readyz).connection()
    connection.wait_ready(5.0)
    assert answers == []


def test_a_question_on_a_terminal_stands_as_it_was_asked_until_it_is_answered(tmp_path: Path) -> None:
    record = ["--record", str(tmp_path / "runs"), "--confirm", "--shadow"]
    with Seat([*RUN, "--task", "pick up the carrot", *record], {"XDG_CONFIG_HOME": str(tmp_path)}) as seat:
        end = seat.wait_for("move? [y]es, [n]o and plan anew, other words for the [s]ubtask or the [p]lan, [q]uit: ")
        time.sleep(0.5)
        assert seat.screen[end:] == "", "a spinner would write over the answer"
        seat.press("y\n")
        end = seat.wait_for("move? [y]es", after=end)
        seat.press("q\n")
        assert seat.wait() == 130
    assert "\x1b[9m" not in seat.screen, "Rich took [s] for strikethrough"


def test_a_person_who_verifies_is_asked_without_a_spinner(tmp_path: Path) -> None:
    given = [*RUN, "--verifier", "human", "--task", "pick up the carrot", "--record", str(tmp_path / "runs")]
    with Seat(given, {"XDG_CONFIG_HOME": str(tmp_path)}) as seat:
        end = seat.wait_for("[y]es, [n]o and try again, [q]uit; within 60 s")
        time.sleep(0.5)
        assert seat.screen[end:].strip() == ""
        seat.press("q")
        assert seat.wait() == 130
