"""A random Gemma-3 at twin size and random LoRA adapters for it, written once a test run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.twin_model import write_random_base

LANGUAGE_LINEARS = r"^model\.language_model\..*\.(q|k|v|o|up|down|gate)_proj$"
IMAGE_SIZE = 112


def write_base(folder: Path) -> Path:
    """A servable base with random weights."""
    write_random_base(folder)
    return folder


def write_adapter(
    base: Path, folder: Path, seed: int, *, active: bool = True, targets: Any = LANGUAGE_LINEARS, **card: Any
) -> Path:
    """A LoRA adapter on the language model's linears; not active, it is left at its start and does nothing."""
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=not active)
    wrapped: Any = peft.get_peft_model(model, config)
    wrapped.save_pretrained(folder)
    stages: Any = ["subtasks", "motion_plan", "actions"]
    made = ModelCard(name=folder.name, base_model="twin-base", image_size=IMAGE_SIZE, stages=stages, policy=True)
    made.model_copy(update=card).write(folder)
    return folder


def write_proven_adapter(base: Path, folder: Path, seed: int, **card: Any) -> Path:
    """An active adapter whose card is complete, as `export` leaves it: hash, module count and references."""
    from vlm2vla_training.references import measure_references  # here: .venv-vllm lacks what it imports

    write_adapter(base, folder, seed, **card)
    linears = 7 * int(json.loads((base / "config.json").read_text())["text_config"]["num_hidden_layers"])
    facts: dict[str, Any] = {"base_hash": ModelCard.read(base).base_hash, "adapted_modules": linears}
    facts["reference_logprobs"] = measure_references(base, folder, IMAGE_SIZE)
    ModelCard.read(folder).model_copy(update=facts).write(folder)
    return folder
