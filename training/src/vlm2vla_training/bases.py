"""A base model's folder, as this project or its maker wrote it: processor and card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from vlm2vla_schema.processors import without_video
from vlm2vla_schema.types import MODEL_CARD_FILE, ModelCard
from vlm2vla_training.errors import UsageError
from vlm2vla_training.jsonio import read_json
from vlm2vla_training.servable import weights_hash

_PROCESSOR_FILES = (
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "*processor_config.json",
)  # fmt: skip


def load_processor(folder: Path) -> Any:
    """Tokenizer, template and image processor. A part for videos that cannot be loaded, for it needs torchvision, is
    left out: examples hold pictures.
    """
    try:
        return AutoProcessor.from_pretrained(folder)
    except ImportError:
        whole: Any = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(folder)), None)
        if whole is None or "video_processor" not in whole.get_attributes():
            raise
    return without_video(whole).from_pretrained(folder)


def copy_processor(base: Path, folder: Path) -> None:
    """Copy tokenizer, template and processor as they are: written anew, they would lack what loading left out."""
    for pattern in _PROCESSOR_FILES:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def read_base(folder: Path, image_size: int | None = None) -> ModelCard:
    """The card of a base. One straight from its maker has none: it is made from its configuration and weights.

    Args:
        image_size: side of the pictures in pixels, for a model that takes any size and has no card.

    Raises:
        UsageError: neither card nor configuration nor caller says how large pictures are.
    """
    if (folder / MODEL_CARD_FILE).is_file():
        return ModelCard.read(folder)
    size = (read_json(folder / "config.json").get("vision_config") or {}).get("image_size", image_size)
    if size is None:
        raise UsageError(
            f"{folder} has no {MODEL_CARD_FILE}, and its model takes pictures of any size; give one with image_size"
        )
    name = folder.resolve().name
    return ModelCard(name=name, base_model=name, base_hash=weights_hash(folder), image_size=int(size))


def curated_size(examples: Path) -> int | None:
    """Side in pixels of the pictures that `curate` wrote; they are the size of a base that has no own."""
    size = read_json(examples / "summary.json")["options"].get("image_size_px")
    return int(size) if size else None
