"""What the Gemini verifier is told by its owner: model, account, prices, and consent to send pictures away.

    [gemini]
    model = "gemini-2.5-pro"          # the paper's verifier (D.5)
    project = "my-project"            # Vertex AI with this machine's Google credentials, instead of an API key
    location = "us-central1"

    [gemini.prices."gemini-2.5-pro"]  # US dollars per million tokens, from Google's price list
    input_usd = 1.25
    output_usd = 10.0                 # thoughts are billed as output

The API key comes from the environment only, so that it is in no file, log or process list. This module needs no Google
library.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_schema.gemini import Price

DEFAULT_MODEL = "gemini-2.5-pro"
CONSENT_FILE = "gemini_consent.json"
EXTRA = "the verifier gemini needs google-genai: pip install 'vlm2vla-client[gemini]'"


class GeminiSettings(BaseModel):
    """The table ``[gemini]`` of client.toml.

    Attributes:
        project: a Google Cloud project: Vertex AI is used with this machine's own Google credentials.
        location: Vertex AI's region; needs ``project``.
        max_output_tokens: of one answer, thoughts included; an answer cut by it is no verdict.
        prices: by model name; without an entry the cost in dollars stays unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(default=DEFAULT_MODEL, min_length=1, max_length=200)
    project: str | None = Field(default=None, min_length=1)
    location: str | None = Field(default=None, min_length=1)
    max_output_tokens: int = Field(default=8192, ge=256, le=65536)
    prices: dict[str, Price] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _location_belongs_to_a_project(self) -> GeminiSettings:
        if (self.project is None) != (self.location is None):
            raise ValueError("project and location go together (Vertex AI); leave both out to use an API key")
        return self


def account(settings: GeminiSettings) -> str:
    """Whom the pictures are sent to, for people."""
    if settings.project is not None:
        return f"Vertex AI, project {settings.project} in {settings.location}"
    return "Gemini API"


def notice(settings: GeminiSettings) -> str:
    """What the operator must know before the first picture leaves."""
    return (
        f"the verifier gemini sends the pictures of the bench before and after every chunk, and the words of the "
        f"subtasks, to Google ({account(settings)}, model {settings.model}). Google's terms apply: what a picture "
        "shows leaves your laboratory, every call costs money, and answers must not be used to build competing models"
    )


def consent_path(config_folder: Path) -> Path:
    """Where the operator's consent is kept."""
    return config_folder / CONSENT_FILE


def has_consented(config_folder: Path) -> bool:
    """True when a consent was recorded in this folder; a damaged record counts as none."""
    try:
        record = json.loads(consent_path(config_folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("consented") is True


def record_consent(config_folder: Path) -> Path:
    """Writes the consent down, with its time.

    Raises:
        ConfigurationError: the folder cannot be written.
    """
    path = consent_path(config_folder)
    record = {"consented": True, "to": "send pictures of the bench to Google (verifier gemini)",
              "utc": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        config_folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
    return path
