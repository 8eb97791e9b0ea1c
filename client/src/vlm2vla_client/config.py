"""What a run is made of: ``client.toml`` on a robot PC, flags over it, frozen once.

    server = "http://gpu-box:8000"
    robot = "widowx"
    camera = "realsense"
    verifier = "gemini"
    min_free_disk_mb = 512    # less than this free: an episode ends, the arm held

    [gemini]              # see verifiers/gemini_settings.py
    model = "gemini-2.5-pro"

    [widowx]              # how its driver is reached: robots/widowx.py; [bridge], [dynamixel]: the files of that name
    setup = ["/opt/ros/noetic/setup.bash"]

``limits.toml`` beside it holds what was measured on this bench (``counter_z_m``, ``wall_x_m``) and any other field of
``Limits``; a table ``[limits]`` in client.toml does the same. An unknown key is an error, so that a misspelt limit is
never silently ignored. The API key may also come from ``VLM2VLA_API_KEY``, which keeps it out of files and process
lists.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.policies.baselines import BASELINES
from vlm2vla_client.recorder import MIN_FREE_BYTES
from vlm2vla_client.safety import Limits
from vlm2vla_client.verifiers.gemini_settings import GeminiSettings
from vlm2vla_schema.gemini import Price
from vlm2vla_twin.kinematics import MAX_JOINT_SPEED_RAD_S

DEFAULT_SERVER = "http://127.0.0.1:8000"
ROBOTS = ("twin", "widowx", "bridge", "dynamixel", "replay")
CAMERAS = ("twin", "realsense", "video", "images", "v4l2")
VERIFIERS = ("gemini", "server", "human", "twin", "none")
POLICIES = ("server", "expert", "random", "swapped", *BASELINES)
PHYSICAL_ROBOTS = ("widowx", "bridge")
ARM_TABLES = (*PHYSICAL_ROBOTS, "dynamixel")
LIMITS_FILE = "limits.toml"


class HomePose(BaseModel):
    """``[home]``: where the end effector waits for an episode, gripper straight down (Bridge's start pose)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    position_m: tuple[float, float, float] = (0.30, 0.0, 0.15)

    @field_validator("position_m")
    @classmethod
    def _finite(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(math.isfinite(part) and abs(part) < 1.0 for part in value):
            raise ValueError("expected three finite metres within the arm's reach")
        return value


class ClientFile(BaseModel):
    """What client.toml may hold; flags override it.

    Attributes:
        model: adapter to ask, or ``base``; None for the server's default.
        verifier: one name, or a chain of them joined by commas.
        min_free_disk_mb: MiB that recordings leave free on their disk; 0 never looks.
        limits: overrides of the safety limits, by the names of ``Limits``; ``limits.toml`` beside it adds to them.
        home: where ``vlm2vla-client home`` goes, metres in the base frame.
        widowx, bridge, dynamixel: how that arm is reached; checked by the robot that is used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    server: str = DEFAULT_SERVER
    api_key: str | None = None
    model: str | None = None
    robot: str = "widowx"
    camera: str = "realsense"
    verifier: str = "gemini"
    min_free_disk_mb: int = Field(default=MIN_FREE_BYTES >> 20, ge=0)
    limits: dict[str, Any] = Field(default_factory=dict)
    gemini: GeminiSettings = Field(default_factory=GeminiSettings)
    home: HomePose = Field(default_factory=HomePose)
    widowx: dict[str, Any] = Field(default_factory=dict)
    bridge: dict[str, Any] = Field(default_factory=dict)
    dynamixel: dict[str, Any] = Field(default_factory=dict)

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The tables of the robots that have one, by robot."""
        return {name: getattr(self, name) for name in ARM_TABLES if getattr(self, name)}

    @field_validator("robot")
    @classmethod
    def _known_robot(cls, value: str) -> str:
        return _one_of(value, ROBOTS)

    @field_validator("camera")
    @classmethod
    def _known_camera(cls, value: str) -> str:
        return _one_of(value, CAMERAS)

    @field_validator("verifier")
    @classmethod
    def _known_verifiers(cls, value: str) -> str:
        return ",".join(_one_of(name.strip(), VERIFIERS) for name in value.split(","))


class ClientConfig(ClientFile):
    """The robot PC's own settings, read once.

    Attributes:
        path: where they were read from, or None.
    """

    path: Path | None = None

    @property
    def folder(self) -> Path:
        """Where client.toml lies or would lie; limits.toml and the recorded consent are beside it."""
        return (self.path or default_path()).parent


def _one_of(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return value


def default_path() -> Path:
    """``client.toml`` in the user's config folder."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "vlm2vla" / "client.toml"


def load_config(path: Path | None) -> ClientConfig:
    """Reads ``path``, or the user's own file when there is one, and ``limits.toml`` beside it.

    Raises:
        ConfigurationError: the file named is missing, one is not TOML, or holds an unknown key or a wrong value.
    """
    given = path is not None
    path = path or default_path()
    values = read_toml(path) if given or path.is_file() else {}
    file = check_file(values, path)
    limits_path = path.with_name(LIMITS_FILE)
    measured = read_toml(limits_path) if limits_path.is_file() else {}
    check_limits(measured, str(limits_path))
    if twice := sorted(file.limits.keys() & measured.keys()):
        raise ConfigurationError(f"{', '.join(twice)}: given in {path} and in {limits_path}; keep one of them")
    changes = {
        "api_key": file.api_key or os.environ.get("VLM2VLA_API_KEY"),
        "limits": {**file.limits, **measured},
        "path": path if values or given else None,
    }
    return ClientConfig.model_validate({**{name: getattr(file, name) for name in ClientFile.model_fields}, **changes})


def check_file(values: Mapping[str, Any], path: Path) -> ClientFile:
    """The settings of a client.toml.

    Raises:
        ConfigurationError: an unknown key or a wrong value; names ``path``, the key and what is known.
    """
    try:
        file = ClientFile.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {_problem(error)}") from None
    check_limits(file.limits, str(path))
    return file


def read_toml(path: Path) -> dict[str, Any]:
    """The file as a table.

    Raises:
        ConfigurationError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None


def _problem(error: ValidationError) -> str:
    """The first thing wrong, by name; never the value, which may be a key."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        tables: dict[tuple[str, ...], type[BaseModel]] = {
            ("gemini",): GeminiSettings,
            ("gemini", "prices"): Price,
            ("home",): HomePose,
        }
        owner = tables.get(tuple(place[:-1][:2]), ClientFile)
        inside = f" in [{'.'.join(place[:-1])}]" if place[:-1] else ""
        return f"unknown key {place[-1]!r}{inside}; known are {', '.join(sorted(owner.model_fields))}"
    expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{'.'.join(place)}: {expected}"


def check_limits(values: object, where: str) -> None:
    """Refuses what is not a table of known limits, and values that could not protect anything.

    Raises:
        ConfigurationError: names the limit.
    """
    if not isinstance(values, dict):
        raise ConfigurationError(f"{where}: [limits] must be a table")
    known = {item.name for item in fields(Limits)}
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{where}: unknown limit {key!r}; known are {', '.join(sorted(known))}")
    try:
        make_limits(values, counter_z_m=0.0, wall_x_m=0.5)
    except (ConfigurationError, TypeError) as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def make_limits(values: Mapping[str, Any], *, counter_z_m: float, wall_x_m: float) -> Limits:
    """The safety limits: the bench's counter and wall, with overrides from the configuration.

    Raises:
        ConfigurationError: a limit that could not protect anything.
    """
    given = {key: _tuples(value) for key, value in values.items()}
    defaults = {
        "counter_z_m": counter_z_m,
        "wall_x_m": wall_x_m,
        "max_joint_speed_rad_s": float(MAX_JOINT_SPEED_RAD_S),
    }
    return Limits(**{**defaults, **given})


def check_server_url(url: str) -> str:
    """The URL without a trailing slash.

    Raises:
        ConfigurationError: it does not start with http:// or https://.
    """
    if not url.startswith(("http://", "https://")) or len(url) < 10:
        raise ConfigurationError(f"--server must look like {DEFAULT_SERVER}, received {url!r}")
    return url.rstrip("/")


def refuse_read_only(robot: str) -> None:
    """Motors that are read without their driver are never moved.

    Raises:
        ConfigurationError: ``robot`` is ``dynamixel``.
    """
    if robot == "dynamixel":
        raise ConfigurationError(
            "the robot 'dynamixel' is only read, by `vlm2vla-client doctor --robot dynamixel`; it moves through its "
            "driver: give --robot widowx or bridge, or --sim"
        )


def split_verifiers(text: str) -> tuple[str, ...]:
    """``"gemini,human"`` as a chain of known names.

    Raises:
        ConfigurationError: an unknown or empty name.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in VERIFIERS:
            raise ConfigurationError(f"unknown verifier {name!r}; known are {', '.join(VERIFIERS)}")
    return names
