"""What a run is made of: ``client.toml`` on a robot PC, flags over it, frozen once.

    server = "http://gpu-box:8000"
    robot = "widowx"
    camera = "realsense"
    verifier = "gemini"

    [limits]
    counter_z_m = 0.012
    wall_x_m = 0.52

An unknown key is an error, so that a misspelt limit is never silently ignored. The API key may also come from
``VLM2VLA_API_KEY``, which keeps it out of files and process lists.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.safety import Limits
from vlm2vla_twin.kinematics import MAX_JOINT_SPEED_RAD_S

DEFAULT_SERVER = "http://127.0.0.1:8000"
ROBOTS = ("twin", "widowx", "bridge", "replay")
CAMERAS = ("twin", "realsense", "video", "images", "v4l2")
VERIFIERS = ("gemini", "server", "human", "twin", "none")
POLICIES = ("server", "expert", "random", "swapped")
_TEXT_KEYS = ("server", "api_key", "model", "robot", "camera", "verifier")


@dataclass(frozen=True)
class ClientConfig:
    """The robot PC's own settings; flags override them.

    Attributes:
        limits: overrides of the safety limits, by the names of ``Limits``.
        path: where it was read from, or None.
    """

    server: str = DEFAULT_SERVER
    api_key: str | None = None
    model: str | None = None
    robot: str = "widowx"
    camera: str = "realsense"
    verifier: str = "gemini"
    limits: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None


def default_path() -> Path:
    """``client.toml`` in the user's config folder."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "vlm2vla" / "client.toml"


def load_config(path: Path | None) -> ClientConfig:
    """Reads ``path``, or the user's own file when there is one.

    Raises:
        ConfigurationError: the file named is missing, is not TOML, or holds an unknown key or a wrong type.
    """
    given = path is not None
    path = path or default_path()
    if not given and not path.is_file():
        return ClientConfig(api_key=os.environ.get("VLM2VLA_API_KEY"))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    limits = values.pop("limits", {})
    for key, value in values.items():
        if key not in _TEXT_KEYS:
            raise ConfigurationError(f"{path}: unknown key {key!r}; known are {', '.join(_TEXT_KEYS)} and [limits]")
        if not isinstance(value, str):
            raise ConfigurationError(f"{path}: {key} must be text, found {type(value).__name__}")
    check_limits(limits, str(path))
    values.setdefault("api_key", os.environ.get("VLM2VLA_API_KEY"))
    return ClientConfig(**values, limits=limits, path=path)


def check_limits(values: object, where: str) -> None:
    """Refuses what is not a table of known limits; ``Limits`` itself checks the numbers."""
    if not isinstance(values, dict):
        raise ConfigurationError(f"{where}: [limits] must be a table")
    known = {item.name for item in fields(Limits)}
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{where}: unknown limit {key!r}; known are {', '.join(sorted(known))}")


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
