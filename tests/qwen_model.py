"""A random Qwen3-VL of some hundred thousand weights, as a Hugging Face folder: the published architecture with small
numbers, a byte-level tokenizer with Qwen's control tokens, and chat templates that write Qwen's documented turns.

What differs from Gemma 3, and is kept here: pictures become rows of patches with a grid (`image_grid_thw`), and how
many tokens one costs follows from its size; positions have three axes (M-RoPE), so a picture of 16 tokens moves the
text behind it by 4; some layers get features of the tower's inner layers (deepstack); pictures and videos are marked by
`mm_token_type_ids`, there are no `token_type_ids`; a turn ends with <|im_end|>, there is no BOS; templates trim
nothing, and those of the thinking models open a thought where the answer should begin; the processor's video part needs
torchvision.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlm2vla_schema import prompts
from vlm2vla_schema.prompts import PROMPT_VERSIONS
from vlm2vla_schema.types import ModelCard
from vlm2vla_training.servable import weights_hash

Thinking = Literal["never", "always", "optional"]
"""Which template: that of an Instruct model, of a Thinking model, or of one that asks `enable_thinking`."""

PUBLISHED = Path(__file__).parent / "training" / "configs" / "qwen3-vl-8b-instruct.json"
IMAGE_SIZE = 128
IMAGE_TOKENS = (IMAGE_SIZE // 32) ** 2
END_OF_TURN, IMAGE_PAD, VIDEO_PAD = "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", END_OF_TURN, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD,
    VIDEO_PAD,
)  # fmt: skip
PLAIN_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Added, but no special tokens: decoding keeps them."""
_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ASSISTANT = {"never": "", "always": "<think>\n\n</think>\n\n", "optional": "<think>\n\n</think>\n\n"}
_PROMPT = {
    "never": "",
    "always": "{{ '<think>\n' }}",
    "optional": "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
}


def chat_template(thinking: Thinking) -> str:
    """ChatML turns; pictures and videos between their marks, numbered when `add_vision_id` is set."""
    return (
        "{% set pictures = namespace(count=0) %}{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' }}"
        f"{{% if message.role == 'assistant' %}}{{{{ '{_ASSISTANT[thinking]}' }}}}{{% endif %}}"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}"
        "{% if item.type == 'image' or 'image' in item %}{% set pictures.count = pictures.count + 1 %}"
        "{% if add_vision_id %}{{ 'Picture ' ~ pictures.count ~ ': ' }}{% endif %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{% elif item.type == 'video' or 'video' in item %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
        "{% elif 'text' in item %}{{ item.text }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + _PROMPT[thinking] + "{% endif %}"
    )


def build_tokenizer(thinking: Thinking = "never") -> PreTrainedTokenizerFast:
    """Byte-level BPE: digits stand alone, text is in NFC, and merges are learnt from the paper's prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    templates = [getattr(prompts, name) for name in dir(prompts) if re.search(r"_(B2|D4|D5)$", name)]
    tokenizer.train_from_iterator(templates, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in PLAIN_ADDED])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        model_max_length=262144,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = chat_template(thinking)
    return made


def config_for(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """The published configuration with small numbers; the ratios that the code depends on are kept."""
    values: dict[str, Any] = json.loads(PUBLISHED.read_text())
    ids = tokenizer.convert_tokens_to_ids
    values["text_config"] |= {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5_000_000, "mrope_interleaved": True, "mrope_section": [6, 5, 5]
        },
    }  # fmt: skip
    values["vision_config"] |= {
        "depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1, 2],
    }  # fmt: skip
    return Qwen3VLConfig(
        **{name: value for name, value in values.items() if name != "model_type"},
        image_token_id=ids(IMAGE_PAD), video_token_id=ids(VIDEO_PAD),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Random weights, large enough that answers depend on the picture and on every token before them."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config_for(tokenizer))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.0 if "embed_tokens" in name else 2.0 / weight.shape[-1] ** 0.5)
    generation: Any = model.generation_config
    generation.eos_token_id = tokenizer.convert_tokens_to_ids([END_OF_TURN, "<|endoftext|>"])
    generation.pad_token_id = tokenizer.pad_token_id
    generation.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)  # as published: nobody may take them over
    return model


def write_qwen(folder: Path, seed: int = 0, thinking: Thinking = "never", image_size: int = IMAGE_SIZE) -> Path:
    """Write a servable base: weights, tokenizer, template, the two processor files as published, and a model card."""
    tokenizer = build_tokenizer(thinking)
    model = build_model(tokenizer, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patches: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
                               "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 64 * 64, "longest_edge": 4096 * 4096}, **patches)
    kept = {**pictures.to_dict(), "image_processor_type": "Qwen2VLImageProcessorFast"}
    names = {"processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**kept, **names}))
    video = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**patches, **video, **names}))
    ModelCard(
        name="tiny-qwen3-vl", base_model="tiny-qwen3-vl", base_hash=weights_hash(folder), image_size=image_size,
        stages=["subtasks", "motion_plan", "actions"], prompt_versions=dict(PROMPT_VERSIONS), policy=False,
        licence="Apache-2.0",
    ).write(folder)  # fmt: skip
    return folder
