"""What each scope adapts on the published architectures, on the meta device: no weights, all names."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm2vla_training import cli
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.sft import (
    PAPER_NAMES,
    PRESETS,
    SCOPES,
    Preset,
    adapted_modules,
    check_adapted,
    expected_modules,
    lora_config,
)

CONFIGS = Path(__file__).parent / "configs"
GEMMA, QWEN = "gemma-3-12b-it", "qwen3-vl-8b-instruct"
SEVEN = {f"language_model.{name}" for name in PAPER_NAMES}
SIGLIP = {f"vision_tower.{name}" for name in ("q_proj", "k_proj", "v_proj")}
# The hand count of docs/train.md, per name: layers of the language model, layers of the tower.
GEMMA_ALL = SEVEN | SIGLIP | {f"vision_tower.{name}" for name in ("out_proj", "fc1", "fc2")}
QWEN_TOWER = {"visual.qkv": 27, "visual.proj": 27, "visual.linear_fc1": 27 + 4, "visual.linear_fc2": 27 + 4}
EXPECTED = {
    (GEMMA, "language_model"): (336, dict.fromkeys(SEVEN, 48)),
    (GEMMA, "paper"): (417, {**dict.fromkeys(SEVEN, 48), **dict.fromkeys(SIGLIP, 27)}),
    (GEMMA, "all_linear"): (498, {name: 48 if name in SEVEN else 27 for name in GEMMA_ALL}),
    (QWEN, "language_model"): (252, dict.fromkeys(SEVEN, 36)),
    (QWEN, "paper"): (252, dict.fromkeys(SEVEN, 36)),
    (QWEN, "all_linear"): (368, {**dict.fromkeys(SEVEN, 36), **QWEN_TOWER}),
}


def config_of(name: str) -> Any:
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    return AutoConfig.for_model(values.pop("model_type"), **values)


def adapted(config: Any, preset: Preset) -> Any:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        return get_peft_model(model, lora_config(preset))


def part_and_name(path: str) -> str:
    """base_model.model.model.language_model.layers.3.mlp.up_proj -> language_model.up_proj"""
    match = re.fullmatch(r"base_model\.model\.model\.(\w+)\..*\.(\w+)", path)
    assert match is not None, path
    return f"{match[1]}.{match[2]}"


@pytest.mark.parametrize(("name", "scope"), EXPECTED)
def test_a_scope_adapts_exactly_these_modules(name: str, scope: str) -> None:
    total, by_name = EXPECTED[name, scope]
    config = config_of(name)
    model = adapted(config, Preset(scope=scope))
    assert Counter(map(part_and_name, adapted_modules(model))) == by_name
    assert check_adapted(model, config, scope) == total == sum(by_name.values())


def test_the_papers_preset_has_the_papers_scope_and_numbers() -> None:
    preset = PRESETS["paper"]
    lora = lora_config(preset)
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (16, 32, set(PAPER_NAMES))
    assert (preset.learning_rate, preset.epochs, preset.max_tokens, preset.weights) == (5e-5, 1.0, 1024, "bfloat16")
    assert preset.batch_size * preset.accumulation * 4 == 8
    assert {name for name, one in PRESETS.items() if one.scope != "language_model"} == {"paper"}


def test_adapters_elsewhere_than_the_scope_says_are_an_error() -> None:
    config = config_of(GEMMA)
    with pytest.raises(DataError, match="adapted 417 modules of gemma3; expected 336"):
        check_adapted(adapted(config, PRESETS["paper"]), config, "language_model")


def test_a_tower_that_is_not_counted_is_refused_unless_it_is_left_alone() -> None:
    config = config_of(GEMMA)
    config.vision_config.model_type = "clip_vision_model"
    assert expected_modules(config, "language_model") == 336
    with pytest.raises(UsageError, match="clip_vision_model"):
        expected_modules(config, "paper")


def test_the_command_line_offers_every_preset_and_scope() -> None:
    assert set(cli._PRESETS) == set(PRESETS) and set(cli._SCOPES) == set(SCOPES)
