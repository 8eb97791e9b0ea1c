"""A random Gemma-3 at twin size and random LoRA adapters for it, written once a test run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.pretrain import write_random_base

LANGUAGE_LINEARS = r"^model\.language_model\..*\.(q|k|v|o|up|down|gate)_proj$"
IMAGE_SIZE = 112


def write_base(folder: Path) -> Path:
    """A servable base with random weights."""
    write_random_base(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int, *, active: bool = True, **card: Any) -> Path:
    """A LoRA adapter on the language model's linears; not active, it is left at its start and does nothing."""
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE_LINEARS, init_lora_weights=not active)
    wrapped: Any = peft.get_peft_model(model, config)
    wrapped.save_pretrained(folder)
    stages: Any = ["subtasks", "motion_plan", "actions"]
    made = ModelCard(name=folder.name, base_model="twin-base", image_size=IMAGE_SIZE, stages=stages, policy=True)
    made.model_copy(update=card).write(folder)
    return folder
