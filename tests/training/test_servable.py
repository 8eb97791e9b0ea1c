"""Tensor names that transformers and vLLM both load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.errors import DataError
from vlm2vla_training.servable import servable_name, weights_hash, write_servable_names
from vlm2vla_training.twin_model import write_random_base


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as transformers saves it."""
    folder = tmp_path_factory.mktemp("servable") / "base"
    write_random_base(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    return dict(model.state_dict()), report


def assert_loads_whole_and_equal(folder: Path, saved: Path) -> None:
    expected, _ = load(saved)
    found, report = load(folder)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_tower_gets_its_published_names_and_transformers_loads_them(folder: Path, saved: Path) -> None:
    write_servable_names(folder)
    tower = {name for name in names(folder) if "vision_tower" in name}
    assert len(tower) > 20 and all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in tower
    assert names(folder) - tower == {name for name in names(saved) if "vision_tower" not in name}
    assert_loads_whole_and_equal(folder, saved)


def test_doing_it_twice_changes_nothing_more(folder: Path) -> None:
    write_servable_names(folder)
    once = (folder / "model.safetensors").read_bytes()
    write_servable_names(folder)
    assert (folder / "model.safetensors").read_bytes() == once


def test_a_card_of_these_weights_names_their_new_hash_and_others_stay(folder: Path) -> None:
    write_servable_names(folder)
    assert ModelCard.read(folder).base_hash == weights_hash(folder)
    ModelCard.read(folder).model_copy(update={"base_hash": "ab" * 32}).write(folder)
    write_servable_names(folder)
    assert ModelCard.read(folder).base_hash == "ab" * 32


def test_shards_and_their_index(folder: Path, saved: Path) -> None:
    AutoModelForImageTextToText.from_pretrained(saved).save_pretrained(folder, max_shard_size="1MB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    write_servable_names(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == names(folder)
    assert_loads_whole_and_equal(folder, saved)


def test_other_towers_and_other_files(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": {"model_type": "qwen3_vl"}}))
    write_servable_names(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match="not a safetensors file"):
        write_servable_names(folder)


def test_names_elsewhere_are_left_alone() -> None:
    for name in ("language_model.model.norm.weight", "vision_tower.vision_model.head.probe", "x.vision_tower.encoder"):
        assert servable_name(name) == name
    assert servable_name("model.vision_tower.encoder.x") == "model.vision_tower.vision_model.encoder.x"
