"""The command line without a simulator or a server: usage, vqa, exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from client_fakes import FakeServer, body_of, error_response, stage
from PIL import Image
from rich.console import Console

from vlm2vla_client import commands
from vlm2vla_client.cli import main
from vlm2vla_client.config import ClientConfig, check_server_url, load_config, make_limits, split_verifiers
from vlm2vla_client.confirm import Edit, Proposal, confirm_on_terminal
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.policies.base import PolicyInfo
from vlm2vla_client.progress import ConsoleProgress, printable, row_text
from vlm2vla_schema.types import Verdict


@pytest.fixture(autouse=True)
def _no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("VLM2VLA_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "--task", "t", "--sim", "--max-cycles", "-1"],
        ["run", "--task", "t", "--sim", "--speed", "0"],
        ["run", "--task", "t", "--sim", "--speed", "nan"],
        ["run", "--task", "t", "--sim", "--seed", "-1"],
        ["run", "--task", "t", "--sim", "--execute", "later"],
        ["run", "--task", "t", "--sim", "--robot", "unknown"],
        ["run", "--task", "t", "--sim", "--unknown"],
        ["view"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "t", "--verifier", "none"], "counter_z_m"),
        (["--task", "t", "--robot", "bridge", "--camera", "twin", "--verifier", "none"], "bridge"),
        (["--task", "t", "--robot", "replay", "--camera", "twin"], "replay EPISODE"),
        (["--task", "t", "--sim", "--camera", "v4l2", "--camera-serial", "1"], "--camera-serial"),
        (["--task", "t", "--sim", "--camera", "video"], "--camera-file"),
        (["--task", "t", "--sim", "--camera-lock-exposure"], "--camera"),
        (["--task", "t", "--sim", "--verifier", "gemini,human"], "gemini"),
        (["--task", "t", "--sim", "--verifier", "nobody"], "unknown verifier"),
        (["--task", " ", "--sim"], "--task"),
        (["--task", "t" * 2001, "--sim"], "--task"),
        (["--task", "t", "--sim", "--confirm", "--execute", "streamed"], "--confirm"),
        (["--task", "t", "--sim", "--config", "missing.toml"], "missing.toml"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_made(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists()


def test_an_untrained_policy_moves_a_physical_arm_only_with_both_flags() -> None:
    untrained, trained = PolicyInfo("m", False), PolicyInfo("m", True)
    for allow, confirm in ((False, False), (True, False), (False, True)):
        with pytest.raises(ConfigurationError, match="never trained"):
            commands.refuse_untrained(untrained, True, allow, confirm)
    commands.refuse_untrained(untrained, True, True, True)
    commands.refuse_untrained(untrained, False, False, False)
    commands.refuse_untrained(trained, True, False, False)


def test_help_names_the_exit_codes_and_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "130 interrupted" in text
    for name in ("run", "eval", "replay", "view", "vqa", "home", "calibrate", "configure", "doctor"):
        assert name in text


def test_view_and_replay_of_something_else_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path)]) == 2
    assert "not an episode folder" in capsys.readouterr().err


def test_a_closed_port_is_exit_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vqa", "--server", "http://127.0.0.1:1", "what is this?"]) == 4
    assert "vlm2vla-server serve" in capsys.readouterr().err


# --- vqa -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "frame.png"
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(path)
    return path


def ask(monkeypatch: pytest.MonkeyPatch, server: FakeServer, *arguments: str) -> int:
    monkeypatch.setattr(commands, "connect", lambda *_: server.connection())
    return main(["vqa", *arguments])


def answering() -> FakeServer:
    return FakeServer(vqa=lambda request: httpx.Response(200, json=stage(body_of(request), answer="a carrot")))


def test_vqa_prints_the_answer(
    monkeypatch: pytest.MonkeyPatch, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = answering()
    assert ask(monkeypatch, server, "--image", str(picture), "what is this?") == 0
    assert capsys.readouterr().out == "a carrot\n"
    sent = body_of(server.requests[0])
    assert sent["question"] == "what is this?" and len(sent["images"]) == 1


def test_vqa_works_without_a_picture_and_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = answering()
    assert ask(monkeypatch, server, "--json", "--model", "base", "who?") == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "a carrot"
    assert body_of(server.requests[0]) == {"question": "who?", "model": "base", "deadline_ms": 60000}


def test_vqa_refuses_what_is_no_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no")
    assert ask(monkeypatch, answering(), "--image", str(tmp_path / "text.txt"), "q") == 2
    assert ask(monkeypatch, answering(), "--image", str(tmp_path / "missing.png"), "q") == 2
    assert ask(monkeypatch, answering(), *["--image", "x"] * 9, "q") == 2
    assert ask(monkeypatch, answering(), "") == 2


def test_vqa_maps_errors_of_the_server_to_exit_4(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, FakeServer(vqa=lambda _: error_response("not_ready")), "q") == 4
    assert ask(monkeypatch, FakeServer(vqa=lambda _: httpx.Response(200, json={"answer": 3})), "q") == 4


# --- configuration ---------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_configuration_of_a_robot_pc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'server = "http://gpu:8000"\nverifier = "server"\n'
    text += "[limits]\ncounter_z_m = 0.01\nbox_max_m = [0.4, 0.2, 0.25]\n"
    config = load_config(write(tmp_path / "c.toml", text))
    assert (config.server, config.robot, config.verifier) == ("http://gpu:8000", "widowx", "server")
    limits = make_limits(config.limits, counter_z_m=0.0, wall_x_m=0.5)
    assert limits.counter_z_m == 0.01 and limits.wall_x_m == 0.5 and limits.box_max_m == (0.4, 0.2, 0.25)
    monkeypatch.setenv("VLM2VLA_API_KEY", "secret")
    assert load_config(None) == ClientConfig(api_key="secret")


@pytest.mark.parametrize(
    "text",
    [
        "server = 3",
        'servr = "x"',
        "[limits]\nmax_axis = 0.1",
        "limits = 3",
        "server = ",
        "[limits]\nmax_axis_m = -1.0",
        '[limits]\nmax_axis_m = "x"',
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError):
        config = load_config(write(tmp_path / "c.toml", text))
        make_limits(config.limits, counter_z_m=0.0, wall_x_m=0.5)


def test_servers_and_verifiers_are_checked() -> None:
    assert check_server_url("http://box:8000/") == "http://box:8000"
    assert split_verifiers("gemini, human") == ("gemini", "human")
    for wrong in ("box:8000", "ftp://box", "http://"):
        with pytest.raises(ConfigurationError):
            check_server_url(wrong)
    for wrong in ("", "server,", "x"):
        with pytest.raises(ConfigurationError):
            split_verifiers(wrong)


# --- what the operator sees ------------------------------------------------------------------------------------------


def show(console: Console) -> None:
    progress: Any = ConsoleProgress(console)
    progress.started("pick up \x1b[31m[red]the[/red] carrot", "twin")
    progress.waiting("planning")
    progress.subtasks(["Move to Carrot", "Lift"])
    progress.cycle(1, 1, 2, "Move to Carrot")
    progress.plan("move [bold]down\x07")
    progress.row(0, [0.01, 0.0, -0.02, 1.0])
    progress.decision(0, [0.01, 0.0, -0.02, 1.0], "clip", ["box"])
    progress.note("late")
    progress.verdict(Verdict(True, "High", "it holds it"), True)
    progress.finished(True, "All 2 subtasks verified.")


def test_progress_degrades_to_plain_lines_and_strips_what_a_terminal_would_obey() -> None:
    plain_text = io.StringIO()
    show(Console(file=plain_text, force_terminal=False, width=200))
    text = plain_text.getvalue()
    assert "\x1b" not in text and "\x07" not in text
    for expected in ("[red]the[/red]", "1 of 2", "[bold]down", "clip", "box", "done", "(High)", "All 2 subtasks"):
        assert expected in text
    coloured = io.StringIO()
    show(Console(file=coloured, force_terminal=True, width=200))
    assert "\x1b[" in coloured.getvalue() and "\x1b[31m[red]" not in coloured.getvalue()


def test_rows_are_shown_in_centimetres() -> None:
    assert row_text([0.012, -0.05, 0.0, 0.0]) == "[ +1.2  -5.0  +0.0] cm close"
    assert printable("a\nb\x1b]0;x\x07") == "a b ]0;x"


PROPOSAL = Proposal("Grasp Carrot", "Move down.", [[0.0, 0.0, -0.01, 1.0], [0.01, 0.0, -0.01, 0.0]])


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("y\n", True),
        ("n\n", False),
        ("what\n", False),
        ("s\nLift Carrot\n\n", Edit("Lift Carrot")),
        ("s\nLift Carrot\nMove up.\n", Edit("Lift Carrot", "Move up.")),
        ("p\nMove slightly left, then down.\n", Edit("Grasp Carrot", "Move slightly left, then down.")),
        ("p\n\n", False),
        ("s\n\n", False),
        (f"p\n{'x' * 1501}\n", False),
    ],
)
def test_the_operator_says_yes_no_or_other_words(
    monkeypatch: pytest.MonkeyPatch, typed: str, expected: bool | Edit
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert confirm_on_terminal(PROPOSAL) == expected


def test_a_policy_without_plans_is_given_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("p\nMove up.\n"))
    assert confirm_on_terminal(Proposal("Grasp Carrot", None, PROPOSAL.rows)) is False
    assert "[p]lan" not in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["", "q\n", "p", "s"])
def test_an_end_of_input_ends_the_episode(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(KeyboardInterrupt):
        confirm_on_terminal(PROPOSAL)


def test_the_path_is_shown_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    confirm_on_terminal(PROPOSAL)
    shown = capsys.readouterr().err
    assert "Grasp Carrot" in shown and "then at [ +1.0  +0.0  -2.0] cm close from here" in shown


def test_the_command_line_starts_without_the_simulator() -> None:
    code = (
        "import sys; sys.modules['mujoco'] = None\n"
        "from vlm2vla_client.cli import main\n"
        "sys.exit(main(['run', '--sim', '--task', 'pick up the carrot']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "vlm2vla-client[sim]" in done.stderr and "Traceback" not in done.stderr
