"""How much arithmetic a training run is, from the base's architecture alone: no weights are read.

A multiplication and an addition count as two operations. Left out, each below one percent of a 12B model's: norms,
softmax, Gemma's projector, the adapter's own products and the optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm2vla_training.bases import load_processor
from vlm2vla_training.errors import UsageError
from vlm2vla_training.jsonio import read_json
from vlm2vla_training.sft import PRESETS, Preset, check_adapted, lora_config
from vlm2vla_training.sft_data import Encoder


@dataclass(frozen=True)
class ModelSize:
    """A base and what a preset trains of it.

    Attributes:
        parameters: of the base, shared ones once.
        language, head, vision: weights of the linears that each token (vision: each patch) passes; Qwen's mergers count
            by the share of the patches that they get.
        attention_width: heads x head_dim x layers of the language model; vision_attention_width of the tower.
        patches: of a picture; image_tokens: what the language model gets of it.
        trained: parameters that get a gradient.
        vision_trained: whether some of them are in the tower.
        adapted_modules: 0 when every weight is trained.
    """

    parameters: int
    language: int
    head: int
    vision: int
    attention_width: int
    vision_attention_width: int
    patches: int
    image_tokens: int
    trained: int
    vision_trained: bool
    adapted_modules: int


@dataclass(frozen=True)
class _Tower:
    """A vision tower and what it makes of a picture: layers, pixels a side, patches merged to one token, tokens."""

    layers: int
    image_size: int
    merged: int
    image_tokens: int


FAMILIES = ("gemma3", "qwen3_vl")


def named_preset(name: str) -> Preset:
    """Return a preset of `sft` by name."""
    return PRESETS[name]


def read_config(base: Path) -> Any:
    """Read a model's configuration from its folder, or from a JSON file that holds only that.

    Raises:
        UsageError: it is of a family whose operations are not counted.
    """
    if base.is_file():
        values = read_json(base)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        config = AutoConfig.from_pretrained(base)
    if config.model_type not in FAMILIES:
        raise UsageError(f"{base} is {config.model_type}; operations are counted for {' and '.join(FAMILIES)}")
    return config


def read_encoder(base: Path, image_size: int) -> Encoder | None:
    """Return the base's own tokenizer and template as sft uses them, or None when `base` holds a configuration only."""
    if base.is_file() or not (base / "tokenizer_config.json").exists():
        return None
    return Encoder(load_processor(base), _tower(read_config(base), image_size).image_size)


def model_size(config: Any, preset: Preset, image_size: int) -> ModelSize:
    """Count weights on the meta device.

    Args:
        config: of the base.
        preset: says what is trained.
        image_size: pixels a side of the examples' pictures. Gemma's tower has a size of its own and disregards it.

    Raises:
        DataError: the preset's scope does not hit what it should.
        UsageError: the base cannot see pictures of this size.
    """
    tower = _tower(config, image_size)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        linears = {"language": 0, "head": 0, "vision": 0}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                part = "vision" if _in_tower(name) else "head" if "lm_head" in name else "language"
                linears[part] += module.weight.numel() // (tower.merged if "merger" in name else 1)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trained, adapted, vision_trained = parameters, 0, True
        if not preset.full:
            model = get_peft_model(model, lora_config(preset))
            adapters = {name: one.numel() for name, one in model.named_parameters() if "lora_" in name}
            trained, vision_trained = sum(adapters.values()), any(map(_in_tower, adapters))
            adapted = check_adapted(model, config, preset.scope)
    text, vision = config.text_config, config.vision_config
    return ModelSize(
        parameters=parameters,
        **linears,
        attention_width=text.num_attention_heads * text.head_dim * text.num_hidden_layers,
        vision_attention_width=vision.hidden_size * tower.layers,
        patches=(tower.image_size // vision.patch_size) ** 2,
        image_tokens=tower.image_tokens,
        trained=trained,
        vision_trained=vision_trained,
        adapted_modules=adapted,
    )


def _in_tower(name: str) -> bool:
    return "vision_tower" in name or "visual." in name


def _tower(config: Any, image_size: int) -> _Tower:
    vision = config.vision_config
    if config.model_type == "gemma3":
        return _Tower(vision.num_hidden_layers, vision.image_size, 1, config.mm_tokens_per_image)
    cell = vision.patch_size * vision.spatial_merge_size
    if image_size < cell or image_size % cell:
        raise UsageError(
            f"--image-size {image_size}: what a picture costs {config.model_type} follows from its size; expected the "
            f"one that curate is given, a multiple of {cell}"
        )
    merged = vision.spatial_merge_size**2
    return _Tower(vision.depth, image_size, merged, (image_size // vision.patch_size) ** 2 // merged)


def training_flops(size: ModelSize, preset: Preset, tokens: int, images: int) -> float:
    """Operations that one example costs once, forwards and backwards.

    Args:
        size: of the base.
        preset: backwards a frozen weight needs one product, a trained one and attention two; checkpointing repeats the
            forward one.
        tokens: of the example, its pictures' included.
        images: of the example.
    """
    weights, attention = 2.0 * size.language * tokens, 4.0 * size.attention_width * tokens**2
    head = 2.0 * size.head * tokens
    vision_weights = images * 2.0 * size.vision * size.patches
    vision_attention = images * 4.0 * size.vision_attention_width * size.patches**2
    forward = 1 + preset.gradient_checkpointing
    through_weights, through_attention = forward + (2 if preset.full else 1), forward + 2
    head_passes = 3 if preset.full else 2  # outside what is checkpointed
    language = weights * through_weights + attention * through_attention + head * head_passes
    if not size.vision_trained:  # the tower gets no gradients: one way through it
        return language + vision_weights + vision_attention
    return language + vision_weights * through_weights + vision_attention * through_attention
