"""How much arithmetic a training run is, from the base's architecture alone: no weights are read.

A multiplication and an addition count as two operations. Left out, each below one percent of a 12B model's: norms,
softmax, the projector, the adapter's own products and the optimiser.
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
        language, head, vision: weights of the linears that each token (vision: each patch) passes.
        attention_width: heads x head_dim x layers of the language model; vision_attention_width of the tower.
        patches: of a picture; image_tokens: what the language model gets of it.
        trained: parameters that get a gradient.
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
    adapted_modules: int


def named_preset(name: str) -> Preset:
    """Return a preset of `sft` by name."""
    return PRESETS[name]


def read_config(base: Path) -> Any:
    """Read a model's configuration from its folder, or from a JSON file that holds only that.

    Raises:
        UsageError: it is not of the Gemma 3 family, whose operations alone are counted.
    """
    if base.is_file():
        values = read_json(base)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        config = AutoConfig.from_pretrained(base)
    if config.model_type != "gemma3":
        raise UsageError(f"{base} is {config.model_type}; estimates are counted for gemma3 only")
    return config


def read_encoder(base: Path) -> Encoder | None:
    """Return the base's own tokenizer and template as sft uses them, or None when `base` holds a configuration only."""
    if base.is_file() or not (base / "tokenizer_config.json").exists():
        return None
    return Encoder(load_processor(base), int(read_config(base).vision_config.image_size))


def model_size(config: Any, preset: Preset) -> ModelSize:
    """Count weights on the meta device.

    Raises:
        DataError: the preset's scope does not hit what it should.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        linears = {"language": 0, "head": 0, "vision": 0}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                part = "vision" if "vision_tower" in name else "head" if "lm_head" in name else "language"
                linears[part] += module.weight.numel()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trained, adapted = parameters, 0
        if not preset.full:
            model = get_peft_model(model, lora_config(preset))
            trained = sum(one.numel() for name, one in model.named_parameters() if "lora_" in name)
            adapted = check_adapted(model, config, preset.scope)
    text, tower = config.text_config, config.vision_config
    return ModelSize(
        parameters=parameters,
        **linears,
        attention_width=text.num_attention_heads * text.head_dim * text.num_hidden_layers,
        vision_attention_width=tower.hidden_size * tower.num_hidden_layers,
        patches=(tower.image_size // tower.patch_size) ** 2,
        image_tokens=config.mm_tokens_per_image,
        trained=trained,
        adapted_modules=adapted,
    )


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
    if preset.scope == "language_model" and not preset.full:  # the tower gets no gradients: one way through it
        return language + vision_weights + vision_attention
    return language + vision_weights * through_weights + vision_attention * through_attention
