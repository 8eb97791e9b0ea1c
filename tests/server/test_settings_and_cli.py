"""Environment, flags and exit codes of `vlm2vla-server`."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_fakes import write_models

from vlm2vla_server import settings as s
from vlm2vla_server.cli import find_checkout, main, parser, read_settings
from vlm2vla_server.errors import ConfigurationError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("VLM2VLA_"):
            monkeypatch.delenv(name)


def test_flags_override_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLM2VLA_PORT", "9001")
    monkeypatch.setenv("VLM2VLA_ADAPTERS", "a=/x,b=/y")
    monkeypatch.setenv("VLM2VLA_API_KEY", "k")
    monkeypatch.setenv("VLM2VLA_MAX_ROW_TRANSLATION_M", "0.05")
    monkeypatch.setenv("VLM2VLA_ALLOW_UNPROVEN", "1")
    monkeypatch.setenv("VLM2VLA_HOST", "0.0.0.0")
    got = read_settings(parser().parse_args(["serve", "--port", "9002", "--engine", "transformers"]))
    assert (got.port, got.host, got.api_key, got.max_row_translation_m) == (9002, "0.0.0.0", "k", 0.05)
    assert got.adapters == (("a", Path("/x")), ("b", Path("/y"))) and got.allow_unproven
    assert "'k'" not in repr(got)
    monkeypatch.setenv("VLM2VLA_DRAIN_S", "2.5")
    monkeypatch.setenv("VLM2VLA_VERIFIER", "b")
    monkeypatch.setenv("VLM2VLA_VERIFY_THRESHOLD", "0.75")
    monkeypatch.setenv("VLM2VLA_LOG_TEXTS", "1")
    got = read_settings(parser().parse_args(["serve", "--log-format", "text"]))
    assert (got.drain_s, got.log_texts, got.log_format) == (2.5, True, "text")
    assert (got.verifier, got.verify_threshold) == ("b", 0.75)
    got = read_settings(parser().parse_args(["serve", "--verifier", "a", "--verify-threshold", "0.9"]))
    assert (got.verifier, got.verify_threshold) == ("a", 0.9)
    monkeypatch.delenv("VLM2VLA_VERIFIER")
    got = read_settings(parser().parse_args(["serve", "--adapter", "c=/z", "--engine-option", "dtype=bfloat16"]))
    assert (
        got.adapters == (("c", Path("/z")),) and got.engine_options == (("dtype", "bfloat16"),) and got.engine == "vllm"
    )


def test_twin_is_short_for_the_embedded_model(tmp_path: Path) -> None:
    got = s.build({"twin": True}, tmp_path)
    assert got.engine == "transformers" and got.model == tmp_path / "models/twin/base"
    folders = tmp_path / "models/twin/adapter", tmp_path / "models/twin/verifier"
    assert (got.adapters, got.verifier) == (tuple(zip(("twin", "verifier"), folders, strict=True)), "verifier")
    assert s.build({"twin": True, "verifier": "twin"}, tmp_path).verifier == "twin"
    assert s.build({"twin": True, "adapters": (("mine", tmp_path),)}, tmp_path).verifier is None
    assert s.build({"twin": True, "engine": "vllm"}, tmp_path).engine == "vllm"
    (tmp_path / "models/twin/base").mkdir(parents=True)
    (tmp_path / "deep/down").mkdir(parents=True)
    assert find_checkout(tmp_path / "deep/down") == tmp_path


@pytest.mark.parametrize(
    "values",
    [
        {"engine": "other"},
        {"port": 70000},
        {"max_concurrency": 0},
        {"max_body_mb": 0},
        {"host": "0.0.0.0"},
        {"host": "example.org"},
        {"api_key": ""},
        {"adapters": (("base", Path("x")),)},
        {"adapters": (("a", Path("x")), ("a", Path("y")))},
        {"adapters": (("a b", Path("x")),)},
        {"max_row_translation_m": 0.0},
        {"drain_s": -1.0},
        {"verifier": "b"},
        {"verify_threshold": 0.4},
        {"verify_threshold": 1.0},
        {"log_format": "xml"},
        {"nonsense": 1},
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        s.build(values, Path("."))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_key(host: str) -> None:
    assert s.build({"host": host}, Path(".")).api_key is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve"], "no model"),
        (["serve", "--model", "BASE"], "pip install 'vlm2vla-server[vllm]'"),
        (["check", "--engine", "openai", "--model", "BASE"], "--engine-option url="),
        (["serve", "--engine", "transformers", "--model", "nowhere"], "not a folder"),
        (["serve", "--engine", "transformers", "--model", "BASE", "--adapter", "x"], "NAME=PATH"),
        (["serve", "--engine", "transformers", "--model", "BASE", "--host", "0.0.0.0"], "--api-key"),
        (["serve", "--engine", "transformers", "--model", "BASE", "--engine-option", "speed=9"], "no option"),
        (["serve", "--engine", "transformers", "--model", "BASE", "--engine-option", "x"], "KEY=VALUE"),
    ],
)
def test_configuration_errors_exit_2_and_say_what_to_do(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(write_models(tmp_path).model)
    assert main([base if a == "BASE" else a for a in arguments]) == 2
    assert words in capsys.readouterr().err


def test_bad_flags_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["serve", "--port", "x"], ["fly"], ["serve", "--engine", "other"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--help"])
    assert stopped.value.code == 0 and "--adapter" in capsys.readouterr().out


def test_environment_that_does_not_convert_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("VLM2VLA_PORT", "many"), ("VLM2VLA_TWIN", "maybe"), ("VLM2VLA_ADAPTERS", "nopath")):
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigurationError):
            read_settings(parser().parse_args(["serve"]))
        monkeypatch.delenv(name)
