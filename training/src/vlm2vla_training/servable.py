"""Tensor names that both transformers and vLLM load.

transformers 5 saves a SigLIP or CLIP tower as `vision_tower.encoder`; vLLM wants `vision_tower.vision_model.encoder`,
as in Google's own Gemma 3, and refuses the other at load. transformers reads both. So bases are written with those.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from vlm2vla_schema.types import MODEL_CARD_FILE, ModelCard
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_json

_INDEX = "model.safetensors.index.json"
_WRAPPED_TOWERS = ("siglip_vision_model", "clip_vision_model")
"""Towers whose inner `vision_model` transformers 5 leaves out of the names that it saves."""
_TOWER = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
_MAX_HEADER_BYTES = 100 * 2**20


def write_servable_names(folder: Path) -> None:
    """Rename the vision tower's tensors of a saved model in place; weights are copied as bytes, never loaded.

    Does nothing where the names are right already or the model has no such tower. A model card that names the hash of
    these very weights gets their new one; cards of adapters made for them have to be written anew.
    Raises DataError when a weight file is not a safetensors file.
    """
    vision = read_json(folder / "config.json").get("vision_config") or {}
    if vision.get("model_type") not in _WRAPPED_TOWERS:
        return
    before = weights_hash(folder)
    for path in sorted(folder.glob("*.safetensors")):
        _rename_tensors(path)
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        index["weight_map"] = {servable_name(name): file for name, file in index["weight_map"].items()}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (folder / MODEL_CARD_FILE).is_file():
        card = ModelCard.read(folder)
        if card.base_hash == before:
            card.model_copy(update={"base_hash": weights_hash(folder)}).write(folder)


def servable_name(name: str) -> str:
    """One tensor's name as vLLM wants it."""
    return _TOWER.sub(r"\1vision_model.", name)


def weights_hash(folder: Path) -> str:
    """sha256 of the weight file; of several, over their hex digests in the order of their names. The server computes
    the same for a base that it loads."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _rename_tensors(path: Path) -> None:
    """The format: 8 bytes with the header's length, a JSON header by tensor name, then the bytes of all tensors."""
    with path.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise DataError(f"{path} is not a safetensors file: its header would have {length} bytes")
        try:
            header = json.loads(source.read(length))
        except ValueError as problem:
            raise DataError(f"{path} is not a safetensors file: its header is not JSON") from problem
        renamed = {servable_name(name): entry for name, entry in header.items()}
        if list(renamed) == list(header):
            return
        text = json.dumps(renamed, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(source, target, 1 << 20)
    shutil.copymode(path, partial)
    os.replace(partial, path)
