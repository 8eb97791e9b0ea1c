"""What Gemini is asked about an episode (appendix B.1): pictures in their order, the log as text, the answer's form."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from vlm2vla_schema.embodiments import EMBODIMENTS, WIDOWX, Embodiment
from vlm2vla_schema.parsing import format_number
from vlm2vla_schema.prompts import annotation_prompt
from vlm2vla_training.episodes.base import Episode, binary_gripper
from vlm2vla_training.errors import DataError

VERSIONS = ("b1-ranges", "b1-paper")
DEFAULT_MODEL = "gemini-2.5-flash"  # B.1: 2.5 Pro at first, then 2.5 Flash "to save on costs"
# Google takes requests of at most 20 MB; base64 adds a third to the pictures.
MAX_PICTURE_BYTES = 14_000_000


@dataclass(frozen=True)
class RequestSettings:
    """What shapes an answer; all of it enters the content hash.

    Attributes:
        version: "b1-ranges" or "b1-paper".
        temperature: None leaves the model's own: the paper prints none for the annotation. The same for `top_p`.
        max_output_tokens: of one answer, thoughts included.
        frames_every: every n-th observation is shown, and the last (Fig. 10 shows every tenth); 1 shows all.
        embodiment: name of the card that describes the log's rows.
    """

    model: str = DEFAULT_MODEL
    version: str = "b1-ranges"
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int = 16384
    frames_every: int = 1
    embodiment: str = WIDOWX.name

    def card(self) -> Embodiment:
        """The embodiment's card."""
        return EMBODIMENTS[self.embodiment]


@dataclass(frozen=True)
class Question:
    """One request: `frames` are (original step number, encoded image); `content` is a hash of all that is asked."""

    episode_key: str
    content: str
    prompt: str
    frames: list[tuple[int, bytes]]
    labelled: bool


def question_about(episode: Episode, settings: RequestSettings) -> Question:
    """Build the request for an episode read with its images.

    Raises:
        DataError: the episode has no rows or no images.
    """
    if not len(episode) or not episode.images:
        raise DataError(f"episode {episode.key} has {len(episode)} rows and {len(episode.images)} images")
    prompt = annotation_prompt(log_text(episode, settings.card()), settings.version, settings.card())
    frames = chosen_frames(episode, settings.frames_every)
    asked = [episode.key, asdict(settings), response_schema(settings.version), prompt]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for number, data in frames:
        digest.update(f"\0{number}\0".encode() + hashlib.sha256(data).digest())
    return Question(episode.key, digest.hexdigest(), prompt, frames, labelled=settings.version == "b1-ranges")


def log_text(episode: Episode, embodiment: Embodiment = WIDOWX) -> str:
    """The trajectory log of B.1: the instruction, then one row a step, numbered, such as [dx, dy, dz, gripper]."""
    rows = episode.actions.copy()
    rows[:, 6] = binary_gripper(rows[:, 6])
    row = embodiment.places()["row"]
    lines = [f"Instruction: {episode.instruction}", f"Rows, each with its number, as [{row}] in {embodiment.units}:"]
    for index, values in enumerate(rows[:, embodiment.columns].tolist()):
        lines.append(f"{episode.first_step + index}: [{', '.join(map(format_number, values))}]")
    return "\n".join(lines)


def chosen_frames(episode: Episode, every: int, max_bytes: int = MAX_PICTURE_BYTES) -> list[tuple[int, bytes]]:
    """Every n-th observation and the last; fewer when they would not fit into one request."""
    while True:
        places = sorted({*range(0, len(episode), every), len(episode) - 1})
        if len(places) <= 2 or sum(len(episode.images[place]) for place in places) <= max_bytes:
            return [(episode.first_step + place, episode.images[place]) for place in places]
        every += 1


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header alone."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def mime_type(data: bytes) -> str:
    """Of an encoded image as datasets hold them."""
    return "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"


def response_schema(version: str) -> dict[str, Any]:
    """The answer's form in Google's notation: B.1's fields, then the rows as copies or as an inclusive range."""
    text = {"type": "STRING"}
    fields: dict[str, Any] = {"step_description": text, "reasoning": text, "main_movements": text}
    if version == "b1-paper":
        fields["actions"] = {"type": "ARRAY", "items": {"type": "ARRAY", "items": {"type": "NUMBER"}}}
    else:
        fields |= {"first": {"type": "INTEGER"}, "last": {"type": "INTEGER"}}
    step = {"type": "OBJECT", "properties": fields, "required": [*fields], "propertyOrdering": [*fields]}
    return {"type": "ARRAY", "items": step}
