"""The nouns that cross package boundaries.

Legend of shapes: H, W image height and width in pixels; N rows of a chunk.
Frame of every motion: robot base, +x forward, +y left, +z up; metres. Gripper: 1 open, 0 closed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlm2vla_schema.errors import VLM2VLAError

Row: TypeAlias = list[float]
"""[dx_m, dy_m, dz_m, gripper]: a relative motion of the end effector, then the gripper (section 3.1)."""

Subtasks: TypeAlias = list[str]
"""l_1 .. l_N of section 3.1, in the order in which they are done."""

Confidence: TypeAlias = Literal["High", "Medium", "Low"]
Scenario: TypeAlias = Literal["in_distribution", "out_of_distribution"]
Stage: TypeAlias = Literal["subtasks", "motion_plan", "actions"]
Representation: TypeAlias = Literal["text", "tokens"]

MODEL_CARD_FILE = "model_card.json"
_MAX_CARD_BYTES = 8 * 1024 * 1024
_MAX_DIGIT_TOKEN_CHARS = 64


@dataclass(frozen=True, eq=False)
class Frame:
    """One camera image.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        stamp_s: when it was captured, on the monotonic clock of the machine that captured it.
        frame_id: unique within an episode.
    """

    image: NDArray[np.uint8]
    stamp_s: float
    frame_id: str


@dataclass(frozen=True)
class Chunk:
    """An action chunk a_i: 1..32 rows [dx_m, dy_m, dz_m, gripper], executed in order (section 3.1, B.2)."""

    rows: list[Row]


@dataclass(frozen=True)
class Verdict:
    """The verifier's answer for one subtask (appendix D.5). `success` decides; `confidence` is recorded."""

    success: bool
    confidence: Confidence
    reasoning: str


class ModelCardError(VLM2VLAError):
    """A model folder has no card, or one that cannot be used."""


class ReferenceLogprobs(BaseModel):
    """Log-probabilities measured where the adapter was made; a server compares its own before it becomes ready.

    `token_ids` are those of `completion` and the end of turn after it. `logprobs` has one entry for each: ln p of that
    token after the prompt and the tokens before it, in nat, under the adapter; `base_logprobs` the same under the base.
    `image` is base64 of PNG or JPEG bytes of the card's `image_size`, or null for a text-only probe.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    prompt: str
    image: str | None = None
    completion: str
    token_ids: list[int] = Field(default_factory=list)
    logprobs: list[float] = Field(default_factory=list)
    base_logprobs: list[float] = Field(default_factory=list)


class ModelCard(BaseModel):
    """`model_card.json`: what a server must know to prompt, decode and trust a model folder.

    Prompt, grammar and parser follow the card. `policy` is true only for a model that was trained to act.
    `digit_map` is present exactly when `representation` is "tokens" (Table 2). `verify_threshold` is the probability
    from which a server takes its word that a subtask is done; None is one half, its own word.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    name: str
    base_model: str
    base_hash: str | None = None
    adapter_scope: str | None = None
    adapted_modules: int = 0
    representation: Representation = "text"
    digit_map: dict[str, str] | None = None
    stages: list[Stage] = Field(default_factory=list)
    image_size: int = Field(gt=0, le=4096)
    prompt_versions: dict[str, str] = Field(default_factory=dict)
    policy: bool = False
    verify_threshold: float | None = Field(default=None, ge=0.5, lt=1)
    reference_logprobs: list[ReferenceLogprobs] | None = None
    data_hash: str | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    licence: str = ""

    @model_validator(mode="after")
    def _map_follows_representation(self) -> Self:
        if (self.representation == "tokens") != (self.digit_map is not None):
            raise ValueError('digit_map must be given with representation "tokens" and only then')
        if self.digit_map is not None:
            check_digit_map(self.digit_map)
        return self

    @classmethod
    def read(cls, folder: Path | str) -> ModelCard:
        """Read the card of a model folder.

        Raises:
            ModelCardError: it is missing, too large, or not a valid card.
        """
        path = Path(folder) / MODEL_CARD_FILE
        try:
            if path.stat().st_size > _MAX_CARD_BYTES:
                raise ModelCardError(f"{path} is larger than {_MAX_CARD_BYTES} bytes: not a model card")
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            message = f"cannot read {path}: {error.strerror}; expected a folder written by export"
            raise ModelCardError(message) from error
        except ValueError as error:
            raise ModelCardError(f"{path} is not a valid model card: {error}") from error

    def write(self, folder: Path | str) -> None:
        """Write the card into a folder that exists; readers see the old card or the new one, never half of one."""
        path = Path(folder) / MODEL_CARD_FILE
        text = json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)


def check_digit_map(digit_map: dict[str, str]) -> None:
    """Check that a digit map can be undone without ambiguity.

    Raises:
        ValueError: keys are not exactly "0".."9", or a value is empty, too long, shared, a prefix of another,
            or starts with a character that action text itself uses.
    """
    if sorted(digit_map) != list("0123456789"):
        raise ValueError('digit_map must have exactly the keys "0" to "9"')
    values = list(digit_map.values())
    for index, value in enumerate(values):
        if len(value) > _MAX_DIGIT_TOKEN_CHARS:
            raise ValueError(f"digit_map: no value may be longer than {_MAX_DIGIT_TOKEN_CHARS} characters")
        if not value or value[0] in "0123456789[]-+., \t\r\n`eE":
            raise ValueError("digit_map: every value must start with a character that action text does not use")
        if any(other.startswith(value) for place, other in enumerate(values) if place != index):
            raise ValueError("digit_map: no value may equal another or start one")
