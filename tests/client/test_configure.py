"""``configure`` and what ``load_config`` makes of its files: flags, questions, refusals, and nothing lost."""

from __future__ import annotations

import os
import pty
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_client.cli import main
from vlm2vla_client.config import ClientConfig, load_config
from vlm2vla_client.configure import toml_text
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.verifiers.gemini_settings import has_consented


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's config folder, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("VLM2VLA_API_KEY", raising=False)
    return tmp_path / "vlm2vla"


def configure(*arguments: str) -> int:
    return main(["configure", "--no-input", *arguments])


def test_without_flags_the_defaults_of_a_robot_pc_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert configure() == 0
    config = load_config(None)
    assert (config.robot, config.camera, config.verifier) == ("widowx", "realsense", "gemini")
    assert config.path == folder / "client.toml" and config.limits == {}
    printed = capsys.readouterr().out
    assert "to Google" in printed and "counter_z_m is not measured" in printed and "doctor" in printed
    assert not has_consented(folder)


def test_flags_are_written_read_back_and_kept_by_the_next_call(folder: Path) -> None:
    assert configure("--server", "http://gpu-box:8000/", "--verifier", "gemini, human", "--robot", "bridge",
                     "--counter-z-m", "0.012", "--wall-x-m", "0.52", "--gemini-model", "gemini-2.5-flash",
                     "--gemini-consent") == 0  # fmt: skip
    config = load_config(None)
    assert (config.server, config.verifier, config.robot) == ("http://gpu-box:8000", "gemini,human", "bridge")
    assert config.limits == {"counter_z_m": 0.012, "wall_x_m": 0.52} and config.gemini.model == "gemini-2.5-flash"
    assert has_consented(folder)
    with (folder / "client.toml").open("a") as file:
        file.write('[gemini.prices."gemini-2.5-flash"]\ninput_usd = 0.3\noutput_usd = 2.5\n')
    assert configure("--wall-x-m", "0.5") == 0
    again = load_config(None)
    assert again.limits == {"counter_z_m": 0.012, "wall_x_m": 0.5} and again.server == config.server
    assert again.gemini.prices["gemini-2.5-flash"].output_usd == 2.5
    assert "0.52" in (folder / "limits.toml.old").read_text()
    assert stat.S_IMODE((folder / "client.toml").stat().st_mode) == 0o600


def test_a_measurement_moves_from_client_toml_to_limits_toml(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "client.toml").write_text("[limits]\ncounter_z_m = 0.01\nmax_axis_m = 0.04\n")
    assert configure("--counter-z-m", "0.02", "--wall-x-m", "0.5") == 0
    assert load_config(None).limits == {"counter_z_m": 0.02, "wall_x_m": 0.5, "max_axis_m": 0.04}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server", "gpu-box"], "http://"),
        (["--robot", "arm"], "expected one of twin, widowx"),
        (["--camera", "eye"], "realsense"),
        (["--verifier", "gemini,nobody"], "unknown verifier 'nobody'"),
        (["--counter-z-m", "12"], "another unit"),
        (["--counter-z-m", "nan"], "metres"),
        (["--wall-x-m", "near"], "near"),
        (["--gemini-project", "lab"], "location"),
    ],
)
def test_a_wrong_value_is_refused_and_nothing_is_written(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert configure(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not folder.exists()


def test_a_damaged_file_is_not_written_over(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "client.toml").write_text("servr = 'x'\n")
    assert configure() == 2
    assert (folder / "client.toml").read_text() == "servr = 'x'\n"


@pytest.mark.parametrize(
    ("client", "limits", "words"),
    [
        ('servr = "x"', "", ["unknown key 'servr'", "server", "verifier"]),
        ('path = "x"', "", ["unknown key 'path'"]),
        ("server = 3", "", ["server", "string"]),
        ('robot = "arm"', "", ["robot", "widowx"]),
        ('verifier = "gemini,nobody"', "", ["verifier", "human"]),
        ('[gemini]\nmodell = "x"', "", ["unknown key 'modell' in [gemini]", "location, max_output_tokens, model"]),
        ('[gemini]\nlocation = "x"', "", ["project"]),
        ('[gemini.prices."m"]\ninput = 1.0', "", ["gemini.prices.m"]),
        ('[gemini.prices."m"]\ninput_usd = -1.0\noutput_usd = 1.0', "", ["gemini.prices.m.input_usd"]),
        ("", "max_axis = 0.1", ["limits.toml", "unknown limit 'max_axis'", "max_axis_m"]),
        ("", "max_axis_m = 0.5", ["limits.toml", "max_axis_m"]),
        ("", 'counter_z_m = "low"', ["limits.toml", "counter_z_m"]),
        ("", "box_min_m = 3", ["limits.toml"]),
        ("[limits]\ncounter_z_m = 0.1", "counter_z_m = 0.2", ["counter_z_m", "keep one"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(folder: Path, client: str, limits: str, words: list[str]) -> None:
    folder.mkdir(parents=True)
    (folder / "client.toml").write_text(client)
    (folder / "limits.toml").write_text(limits)
    with pytest.raises(ConfigurationError) as caught:
        load_config(None)
    for word in words:
        assert word in str(caught.value)


def test_a_key_with_a_wrong_type_is_not_repeated_in_the_error(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "client.toml").write_text('api_key = ["secret"]')
    with pytest.raises(ConfigurationError) as caught:
        load_config(None)
    assert "secret" not in str(caught.value)


def test_an_arms_own_table_is_handed_on_and_kept(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "client.toml").write_text('[widowx]\nsetup = ["/opt/ros/noetic/setup.bash"]\nstart_timeout_s = 30\n')
    table = {"setup": ["/opt/ros/noetic/setup.bash"], "start_timeout_s": 30}
    assert load_config(None).arms == {"widowx": table}
    assert configure("--server", "http://box:8000") == 0
    assert load_config(None).arms == {"widowx": table}


def test_limits_count_even_without_a_client_toml(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "limits.toml").write_text("counter_z_m = 0.01\n")
    assert load_config(None) == ClientConfig(limits={"counter_z_m": 0.01})
    assert load_config(None).folder == folder


KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
LEAVES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=12),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.floats(-1, 1), max_size=3),
)
TABLES = st.dictionaries(KEYS, st.one_of(LEAVES, st.dictionaries(KEYS, LEAVES, min_size=1, max_size=3)), max_size=5)


@given(TABLES)
def test_every_table_that_is_written_is_read_back_the_same(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(table)) == table


def test_on_a_terminal_it_asks_offers_defaults_and_asks_again(folder: Path) -> None:
    operator, program = pty.openpty()
    environment = {**os.environ, "XDG_CONFIG_HOME": str(folder.parent)}
    command = [sys.executable, "-m", "vlm2vla_client.cli", "configure", "--camera", "realsense"]
    process = subprocess.Popen(command, stdin=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    os.close(program)
    # server, robot twice (the first is none), verifier, counter, wall (left out), consent
    os.write(operator, b"http://box:8000\narm\n\ngemini,human\n0.015\n\ny\n")
    out, err = process.communicate(timeout=90)
    os.close(operator)
    assert process.returncode == 0, err.decode()
    assert b"expected one of" in err and b"to Google" in out and b"wall_x_m is not measured" in out
    config = load_config(None)
    assert (config.server, config.robot, config.verifier) == ("http://box:8000", "widowx", "gemini,human")
    assert config.limits == {"counter_z_m": 0.015} and has_consented(folder)
