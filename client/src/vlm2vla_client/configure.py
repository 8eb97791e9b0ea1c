"""``vlm2vla-client configure``: writes client.toml and limits.toml, from flags, or by asking on a terminal.

What was there before is kept unless a new value is given; the old file stays beside the new one as ``*.old``. No key is
ever asked for or written: they belong into the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2vla_client.config import (
    CAMERAS,
    DEFAULT_SERVER,
    LIMITS_FILE,
    ROBOTS,
    VERIFIERS,
    check_file,
    check_limits,
    check_server_url,
    default_path,
    load_config,
    read_toml,
    split_verifiers,
)
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.verifiers.gemini_settings import GeminiSettings, notice, record_consent

MAX_COUNTER_M = 0.3
WALL_M = (0.2, 1.0)
CLIENT_COMMENT = "Settings of this robot PC; see docs/operate.md. Keys belong into the environment."
LIMITS_COMMENT = "Limits of this bench: metres, seconds, radians; see docs/safety.md."


@dataclass(frozen=True)
class Question:
    """One setting: its key, the flag's value, what to ask, what to offer, and how to read the answer.

    ``table``: "client" or "limits", the file that it is written to.
    """

    key: str
    given: str | None
    text: str
    offer: str | None
    read: Callable[[str], Any]
    table: str = "client"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; each answers one question."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="client.toml (default: the user's config folder)")
    parser.add_argument("--server", metavar="URL", help="where vlm2vla-server answers")
    parser.add_argument("--robot", metavar="NAME", help=f"one of {', '.join(ROBOTS)}")
    parser.add_argument("--camera", metavar="NAME", help=f"one of {', '.join(CAMERAS)}")
    parser.add_argument("--verifier", metavar="NAMES", help=f"one of {', '.join(VERIFIERS)}, or a chain: gemini,human")
    parser.add_argument("--counter-z-m", metavar="M", help="height of the counter in the robot's base frame, metres")
    parser.add_argument("--wall-x-m", metavar="M", help="where the wall begins, forward of the base, metres")
    parser.add_argument("--gemini-model", metavar="NAME", help="default gemini-2.5-pro, as in the paper")
    parser.add_argument("--gemini-project", metavar="ID", help="Vertex AI instead of an API key")
    parser.add_argument("--gemini-location", metavar="REGION", help="goes with --gemini-project")
    parser.add_argument("--gemini-consent", action="store_true", help="record: pictures of the bench may go to Google")
    parser.add_argument("--no-input", action="store_true", help="ask nothing: flags, else the old file, else defaults")


def configure(arguments: argparse.Namespace) -> int:
    """Writes both files and says what is in them.

    Raises:
        ConfigurationError: a value that cannot be used; nothing was written.
    """
    path: Path = arguments.config or default_path()
    old = read_toml(path) if path.is_file() else {}
    old_limits = read_toml(path.with_name(LIMITS_FILE)) if path.with_name(LIMITS_FILE).is_file() else {}
    if path.is_file() or old_limits:
        load_config(path if path.is_file() else None)  # says what is wrong with them, rather than carry it along
    asking = not arguments.no_input and sys.stdin.isatty()
    answers = [(question, _answer(question, asking)) for question in _questions(arguments, old, old_limits)]
    client, limits = dict(old), dict(old_limits)
    for question, value in answers:
        if value is not None:
            (client if question.table == "client" else limits)[question.key] = value
            if question.table == "limits" and isinstance(client.get("limits"), dict):
                client["limits"] = {name: kept for name, kept in client["limits"].items() if name != question.key}
    _set_gemini(client, arguments)
    check_file(client, path)
    check_limits(limits, LIMITS_FILE)
    _write(path, client, CLIENT_COMMENT)
    _write(path.with_name(LIMITS_FILE), limits, LIMITS_COMMENT)
    load_config(path)
    print(f"wrote {path} and {path.with_name(LIMITS_FILE)}")
    _report(path, client, limits, arguments, asking)
    return 0


def _questions(arguments: argparse.Namespace, old: Mapping[str, Any], limits: Mapping[str, Any]) -> list[Question]:
    measured = {**old.get("limits", {}), **limits}

    def offer(key: str, default: str | None) -> str | None:
        return str(old.get(key, default)) if old.get(key, default) is not None else None

    def known(key: str) -> str | None:
        return None if measured.get(key) is None else str(measured[key])

    robots, cameras = ", ".join(ROBOTS), ", ".join(CAMERAS)
    counter = "counter height in the base frame, metres (empty: not measured)"
    wall = "wall, metres forward of the base (empty: not measured)"
    return [
        Question("server", arguments.server, "server URL", offer("server", DEFAULT_SERVER), check_server_url),
        Question("robot", arguments.robot, f"robot ({robots})", offer("robot", "widowx"), _one_of(ROBOTS)),
        Question("camera", arguments.camera, f"camera ({cameras})", offer("camera", "realsense"), _one_of(CAMERAS)),
        Question("verifier", arguments.verifier, f"verifier, or a chain ({', '.join(VERIFIERS)})",
                 offer("verifier", "gemini"), lambda text: ",".join(split_verifiers(text))),
        Question("counter_z_m", arguments.counter_z_m, counter, known("counter_z_m"),
                 _metres(-MAX_COUNTER_M, MAX_COUNTER_M), "limits"),
        Question("wall_x_m", arguments.wall_x_m, wall, known("wall_x_m"), _metres(*WALL_M), "limits"),
    ]  # fmt: skip


def _answer(question: Question, asking: bool) -> Any:
    """The value: the flag's, or the operator's, or what is offered; None for a measurement that nobody made."""
    if question.given is not None:
        return _read(question, question.given)
    while asking:
        print(f"{question.text} [{question.offer or ''}]: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise ConfigurationError("the input ended before all was answered; nothing was written")
        text = line.strip() or question.offer
        if text is None:
            return None
        try:
            return _read(question, text)
        except ConfigurationError as error:
            print(f"  {error}", file=sys.stderr)
    return None if question.offer is None else _read(question, question.offer)


def _read(question: Question, text: str) -> Any:
    try:
        return question.read(text)
    except ValueError as error:
        raise ConfigurationError(f"{question.key}: {error}") from None


def _one_of(names: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"expected one of {', '.join(names)}, received {text!r}")
        return text

    return read


def _metres(low_m: float, high_m: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not low_m <= value <= high_m:
            raise ValueError(f"expected {low_m:g} to {high_m:g} metres, received {text}; is it in another unit?")
        return value

    return read


def _set_gemini(client: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Puts the flags into [gemini]; leaves the table out while it is empty."""
    table = dict(client.get("gemini", {}))
    for key in ("model", "project", "location"):
        if (value := getattr(arguments, f"gemini_{key}")) is not None:
            table[key] = value
    if table:
        client["gemini"] = table


def _report(
    path: Path, client: Mapping[str, Any], limits: Mapping[str, Any], arguments: argparse.Namespace, asking: bool
) -> None:
    settings = GeminiSettings.model_validate(client.get("gemini", {}))
    consent = arguments.gemini_consent
    if "gemini" in client["verifier"]:
        print(f"note: {notice(settings)}.")
        if asking and not consent:
            print("send them? [y/N]: ", end="", file=sys.stderr, flush=True)
            consent = sys.stdin.readline().strip().lower() in ("y", "yes")
    if consent:
        print(f"consent recorded in {record_consent(path.parent)}; delete that file to withdraw it")
    for name in ("counter_z_m", "wall_x_m"):
        if name not in limits and name not in client.get("limits", {}):
            print(f"note: {name} is not measured: a physical arm does not move without it")
    print("next: vlm2vla-client doctor")


def save_measured(path: Path, measured: Mapping[str, float]) -> Path:
    """Puts measurements into limits.toml beside client.toml (``path``) and out of its [limits]; gives the file.

    Every other key stays; the old file stays beside the new one as ``*.old``.

    Raises:
        ConfigurationError: the limits cannot be right with them, or cannot be written.
    """
    client = read_toml(path) if path.is_file() else {}
    file = path.with_name(LIMITS_FILE)
    limits = {**(read_toml(file) if file.is_file() else {}), **measured}
    check_limits(limits, LIMITS_FILE)
    if any(key in client.get("limits", {}) for key in measured):
        client["limits"] = {key: kept for key, kept in client["limits"].items() if key not in measured}
        _write(path, client, CLIENT_COMMENT)
    _write(file, limits, LIMITS_COMMENT)
    load_config(path if path.is_file() else None)
    return file


def toml_text(table: Mapping[str, Any], prefix: str = "") -> str:
    """The table as TOML: texts, numbers, booleans, arrays of them, and tables."""
    plain_keys = [key for key, value in table.items() if not isinstance(value, dict)]
    lines = [f"{_key(key)} = {_value(table[key])}\n" for key in plain_keys]
    for key, value in table.items():
        if isinstance(value, dict) and value:
            name = f"{prefix}{_key(key)}"
            lines.append(f"\n[{name}]\n{toml_text(value, name + '.')}")
    return "".join(lines)


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "a").replace("-", "a").isalnum()
    return key if bare else json.dumps(key, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # for these kinds JSON and TOML write the same


def _write(path: Path, table: Mapping[str, Any], comment: str) -> None:
    """Writes the whole file or nothing; only its owner may read it."""
    temporary = path.with_name(path.name + ".part")
    try:
        tomllib.loads(toml_text(table))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: a value that TOML cannot hold ({error})") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"# {comment}\n{toml_text(table)}")
        if path.is_file():
            shutil.copy2(path, path.with_name(path.name + ".old"))  # not moved: there is a whole file at every moment
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}; give --config FILE") from None
