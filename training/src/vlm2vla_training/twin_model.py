"""The twin's base as a network: Gemma-3's architecture at some million parameters, its processor, how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from vlm2vla_schema.prompts import PROMPT_VERSIONS
from vlm2vla_schema.types import ModelCard
from vlm2vla_training.pretrain_data import IMAGE_SIZE
from vlm2vla_training.servable import weights_hash, write_servable_names
from vlm2vla_training.twin_tokenizer import CHAT_TEMPLATE, train_tokenizer

PATCHES = IMAGE_SIZE // 14
TOKENS = PATCHES // 2
"""Image tokens a side: Gemma's projector averages two patches by two."""
IMAGE_TOKENS = TOKENS * TOKENS


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The twin's tokenizer with Gemma's special tokens and chat template, as transformers and vLLM know it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def config_for(tokenizer: PreTrainedTokenizerFast) -> Gemma3Config:
    """The Gemma-3 architecture at twin size: some 2 million parameters, 112x112 pictures, 16 image tokens."""
    width, ids = 128, tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": width, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "query_pre_attn_scalar": 32, "sliding_window": 1024, "max_position_embeddings": 4096,
        "bos_token_id": ids("<bos>"), "eos_token_id": ids("<eos>"), "pad_token_id": ids("<pad>"),
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": IMAGE_SIZE, "patch_size": 14,
    }  # fmt: skip
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        eos_token_id=[ids("<eos>"), ids("<end_of_turn>")], bos_token_id=ids("<bos>"), pad_token_id=ids("<pad>"),
        tie_word_embeddings=True,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Gemma3ForConditionalGeneration:
    """Random weights; the multimodal projection leaves its zero initialisation, or pictures could never be seen."""
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config_for(tokenizer))
    projector = model.model.multi_modal_projector
    nn.init.normal_(projector.mm_input_projection_weight, std=0.06)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[0] != model.config.text_config.vocab_size:
            nn.init.normal_(module.weight, std=0.06)
    nn.init.normal_(model.model.vision_tower.get_input_embeddings().weight, std=0.04)
    places: Any = model.model.vision_tower
    places.embeddings.position_embedding.weight.data.copy_(smooth_places(model.config.vision_config.hidden_size, seed))
    nn.init.normal_(model.get_input_embeddings().weight, std=0.06)
    for layer in model.model.language_model.layers:
        # Queries and keys are normalised: at the usual start no token can attend sharply to one patch of many.
        nn.init.constant_(layer.self_attn.q_norm.weight, 0.7)
        nn.init.constant_(layer.self_attn.k_norm.weight, 0.7)
    generation: Any = model.generation_config
    generation.eos_token_id = model.config.eos_token_id
    generation.bos_token_id, generation.pad_token_id = model.config.bos_token_id, model.config.pad_token_id
    return model


def smooth_places(width: int, seed: int) -> Tensor:
    """Position embeddings [64, width] to start from: random mixtures of waves over rows and columns.

    From independent random ones a tower takes several times as long to learn where a patch lies.
    """
    column, row = np.meshgrid(np.arange(PATCHES) + 0.5, np.arange(PATCHES) + 0.5)
    waves = [
        wave(np.pi * frequency / PATCHES * axis).reshape(-1)
        for frequency in (0.5, 1, 2, 3, 4, 5, 6, 7)
        for axis in (column, row)
        for wave in (np.sin, np.cos)
    ]
    mixture = np.random.default_rng([17, seed]).normal(size=(len(waves), width)) * np.sqrt(2.0 / len(waves))
    return torch.from_numpy((np.stack(waves, axis=-1) @ mixture).astype(np.float32))


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Gemma3Processor:
    """Gemma's processor at twin size: squash to 112x112, mean and deviation one half, pan-and-scan off."""
    image = Gemma3ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=1,
        do_pan_and_scan=False,
        image_seq_length=IMAGE_TOKENS,
    )
    return Gemma3Processor(image, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=IMAGE_TOKENS)


def save_base(
    model: Gemma3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    training: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write the base as a Hugging Face folder in bfloat16, with its processor and model card."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(dtype)
    build_processor(tokenizer).save_pretrained(folder)
    write_servable_names(folder)
    digest = weights_hash(folder)
    ModelCard(
        name="twin-base",
        base_model="twin-base",
        base_hash=digest,
        adapter_scope="none",
        adapted_modules=0,
        representation="text",
        digit_map=None,
        stages=["subtasks", "motion_plan", "actions"],
        image_size=IMAGE_SIZE,
        prompt_versions=dict(PROMPT_VERSIONS),
        policy=False,
        reference_logprobs=None,
        data_hash=None,
        training=training,
        metrics=metrics,
        licence="Apache-2.0",
    ).write(folder)


def write_random_base(folder: Path, seed: int = 0) -> None:
    """A servable base with random weights: for tests, and as the floor that a trained model is measured against."""
    tokenizer = build_tokenizer()
    save_base(build_model(tokenizer, seed), tokenizer, folder, {"steps": 0, "seed": seed}, {})
