"""Settings of the server: environment `VLM2VLA_*`, overridden by the flags of `vlm2vla-server serve`.

Built once in `cli`, then frozen and handed down.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from vlm2vla_schema.images import MAX_PIXELS
from vlm2vla_server.errors import ConfigurationError
from vlm2vla_server.logs import FORMATS as LOG_FORMATS

ENGINES = ("vllm", "transformers", "openai")
BASE_MODEL_NAME = "base"
TWIN_MODEL = Path("models/twin/base")
TWIN_ADAPTER = Path("models/twin/adapter")
TWIN_VERIFIER = Path("models/twin/verifier")
_REAL = frozenset({"verify_threshold", "max_row_translation_m", "body_timeout_s", "drain_s"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Settings:
    """Everything that can be set. Environment name of a field: `VLM2VLA_` and the field in capitals.

    max_concurrency: requests being generated or waiting for the engine; one more is answered `overloaded`.
    verifier: what answers /verify when a request names no model; None: as everywhere, the first adapter.
    verify_threshold: probability from which its "done" counts; None: what its card says.
    max_body_mb: largest request body, 2**20 bytes each. max_image_pixels: largest decoded picture.
    max_row_translation_m: largest |dx|, |dy|, |dz| of one row. body_timeout_s: longest wait for a request's body.
    drain_s: how long running requests may go on after SIGTERM. log_texts: prompts and raw texts go to the log.
    engine_options: passed to the engine as they are (`--engine-option KEY=VALUE`).
    """

    engine: str = "vllm"
    model: Path | None = None
    adapters: tuple[tuple[str, Path], ...] = ()
    verifier: str | None = None
    verify_threshold: float | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_concurrency: int = 16
    max_body_mb: int = 16
    max_image_pixels: int = MAX_PIXELS
    max_row_translation_m: float = 0.10
    body_timeout_s: float = 30.0
    drain_s: float = 8.0
    threads: int = 0
    allow_unproven: bool = False
    log_format: str = "json"
    log_texts: bool = False
    engine_options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigurationError on values that cannot work."""
        if self.engine not in ENGINES:
            raise ConfigurationError(f"--engine {self.engine!r}: expected one of {', '.join(ENGINES)}")
        if not 1 <= self.max_concurrency <= 1024:
            raise ConfigurationError("--max-concurrency: expected 1 to 1024")
        if not 1 <= self.max_body_mb <= 1024:
            raise ConfigurationError("--max-body-mb: expected 1 to 1024")
        if not 0 <= self.port <= 65535:
            raise ConfigurationError("--port: expected 0 to 65535")
        if not 0.001 <= self.max_row_translation_m <= 1.0:
            raise ConfigurationError("--max-row-translation-m: expected 0.001 to 1.0")
        if not 0 <= self.drain_s <= 600:
            raise ConfigurationError("--drain-s: expected 0 to 600")
        if self.log_format not in LOG_FORMATS:
            raise ConfigurationError(f"--log-format {self.log_format!r}: expected {' or '.join(LOG_FORMATS)}")
        self._check_adapters()
        if self.api_key is not None and not self.api_key:
            raise ConfigurationError("the API key is empty; leave it out or set a real one")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigurationError(
                f"--host {self.host} can be reached from other machines: set --api-key (or VLM2VLA_API_KEY), "
                "or serve on 127.0.0.1"
            )

    def _check_adapters(self) -> None:
        names = [name for name, _ in self.adapters]
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigurationError(
                    f"--adapter name {name!r}: expected 1 to 64 letters, digits, '.', '_' or '-', starting with one of "
                    "the first two"
                )
            if name == BASE_MODEL_NAME:
                raise ConfigurationError("--adapter: the name 'base' is reserved for the untouched model")
        if len(set(names)) != len(names):
            raise ConfigurationError("--adapter: each name may be given once")
        if self.verifier not in (None, BASE_MODEL_NAME, *names):
            raise ConfigurationError(f"--verifier {self.verifier!r}: expected the name of an --adapter, or 'base'")
        if self.verify_threshold is not None and not 0.5 <= self.verify_threshold < 1:
            raise ConfigurationError("--verify-threshold: expected 0.5 (the model's own word) to below 1")

    @property
    def max_body_bytes(self) -> int:
        """Largest request body in bytes."""
        return self.max_body_mb * 2**20

    @property
    def engine_threads(self) -> int:
        """Threads of the engine's arithmetic; 0 leaves one core to the event loop."""
        return self.threads if self.threads > 0 else max(1, (os.cpu_count() or 2) - 1)

    def require_model(self) -> Path:
        """The model folder. Raises ConfigurationError when none is set or a folder does not exist."""
        if self.model is None:
            raise ConfigurationError("no model: give --model FOLDER, or --twin for the small embedded one")
        for label, folder in (("--model", self.model), *((f"--adapter {n}", p) for n, p in self.adapters)):
            if not folder.is_dir():
                raise ConfigurationError(f"{label}: {folder} is not a folder")
        return self.model


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_adapter(text: str) -> tuple[str, Path]:
    """`NAME=PATH`. Raises ConfigurationError."""
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise ConfigurationError(f"--adapter {text!r}: expected NAME=PATH")
    return name, Path(path)


def parse_option(text: str) -> tuple[str, str]:
    """`KEY=VALUE`. Raises ConfigurationError."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigurationError(f"--engine-option {text!r}: expected KEY=VALUE")
    return key, value


def from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    """The settings that `VLM2VLA_*` variables give, by field name. Lists are separated by commas. `VLM2VLA_TWIN=1`
    is `--twin`. Raises ConfigurationError on text that does not convert."""
    found: dict[str, object] = {}
    for item in fields(Settings):
        text = environment.get(f"VLM2VLA_{item.name.upper()}")
        if text is None or (text == "" and item.name != "api_key"):
            continue
        found[item.name] = _convert(item.name, text)
    if environment.get("VLM2VLA_TWIN"):
        found["twin"] = _boolean("twin", environment["VLM2VLA_TWIN"])
    return found


def _convert(name: str, text: str) -> object:
    if name == "adapters":
        return tuple(parse_adapter(part) for part in text.split(",") if part)
    if name == "engine_options":
        return tuple(parse_option(part) for part in text.split(",") if part)
    if name == "model":
        return Path(text)
    if name in ("allow_unproven", "log_texts"):
        return _boolean(name, text)
    if name in ("engine", "host", "api_key", "log_format", "verifier"):
        return text
    try:
        return float(text) if name in _REAL else int(text)
    except ValueError:
        raise ConfigurationError(f"VLM2VLA_{name.upper()}: expected a number") from None


def _boolean(name: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ConfigurationError(f"VLM2VLA_{name.upper()}: expected 1 or 0")


def build(overrides: Mapping[str, object], checkout: Path) -> Settings:
    """Settings from merged values (environment, then flags). `twin` stands for the embedded model of the checkout, its
    adapter and the one that verifies, with the transformers engine unless another is named. Raises ConfigurationError.
    """
    values = {key: value for key, value in overrides.items() if key != "twin" and value is not None}
    if overrides.get("twin"):
        values.setdefault("engine", "transformers")
        values.setdefault("model", checkout / TWIN_MODEL)
        if "adapters" not in values:
            values["adapters"] = (("twin", checkout / TWIN_ADAPTER), ("verifier", checkout / TWIN_VERIFIER))
            values.setdefault("verifier", "verifier")
    known = {item.name for item in fields(Settings)}
    unknown = set(values) - known
    if unknown:
        raise ConfigurationError(f"unknown settings: {', '.join(sorted(unknown))}")
    return Settings(**values)  # type: ignore[arg-type]  # each value was converted by its own parser above
