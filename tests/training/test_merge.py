"""Merged weights and fp8: names, types, files, and answers that are those of base and adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image, tolerance_nat
from vlm2vla_schema.types import ModelCard
from vlm2vla_training import cli, export
from vlm2vla_training.cli import main
from vlm2vla_training.errors import DataError
from vlm2vla_training.merge import write_merged
from vlm2vla_training.references import Agreement, measure_whole
from vlm2vla_training.sft_data import Encoder

TWIN = Path(__file__).parents[2] / "models" / "twin"
BASE, ADAPTER, LINEARS = TWIN / "base", TWIN / "adapter", 7 * 4
KINDS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "fp8": (torch.bfloat16, True)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The twin's adapter merged in each type, in shards of a megabyte."""
    root = tmp_path_factory.mktemp("merged")
    for name, (dtype, fp8) in KINDS.items():
        write_merged(BASE, ADAPTER, root / name, dtype, fp8=fp8, shard_size="1MB")
    return {name: root / name for name in KINDS}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def scores(folder: Path) -> list[list[float]]:
    """ln p of the twin's stored answers under a whole model, from the processor's own inputs."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    encoder, found = Encoder(processor, 112), []
    for index, reference in enumerate(ModelCard.read(ADAPTER).reference_logprobs or ()):
        text = encoder.prompt_text(PROBE_PROMPTS[index], 1) + reference.completion + "<end_of_turn>"
        picture = Image.fromarray(probe_image(index, 112))
        inputs = processor(text=[text], images=[[picture]], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            rows = torch.log_softmax(model(**inputs).logits[0, -len(reference.token_ids) - 1 : -1].float(), dim=-1)
        found.append(rows.gather(1, torch.tensor(reference.token_ids)[:, None])[:, 0].tolist())
    return found


@pytest.mark.parametrize("name", list(KINDS))
def test_merged_weights_answer_as_base_and_adapter_do(stored: dict[str, Path], name: str) -> None:
    references = ModelCard.read(ADAPTER).reference_logprobs
    assert references and len(references) == 8
    for measured, reference in zip(scores(stored[name]), references, strict=True):
        apart = float(np.mean(np.abs(np.subtract(measured, reference.logprobs))))
        base = float(np.mean(np.abs(np.subtract(reference.base_logprobs, reference.logprobs))))
        assert apart <= tolerance_nat(name) / 2 and 3 * apart <= base


@pytest.mark.parametrize("name", list(KINDS))
def test_files_are_whole_and_carry_published_names(stored: dict[str, Path], name: str) -> None:
    folder, tensors = stored[name], tensors_of(stored[name])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for tensor, file in index["weight_map"].items():
        assert tensor in load_file(folder / file)
    assert all(one.startswith("vision_tower.vision_model.") for one in tensors if "vision_tower" in one)
    assert not any("lora" in one for one in tensors) and not list(folder.glob("*.partial"))
    config = json.loads((folder / "config.json").read_text())
    dtype = {"fp8": "bfloat16"}.get(name, name)
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == dtype
    assert (folder / "tokenizer.json").is_file() and (folder / "processor_config.json").is_file()


def test_fp8_is_of_the_language_models_linears_alone(stored: dict[str, Path]) -> None:
    small, exact = tensors_of(stored["fp8"]), tensors_of(stored["float32"])
    quantised = {name for name, tensor in small.items() if tensor.dtype == torch.float8_e4m3fn}
    assert len(quantised) == LINEARS and all(name.startswith("language_model.model.layers.") for name in quantised)
    assert {tensor.dtype for name, tensor in small.items() if name not in quantised} == {torch.bfloat16}
    assert set(small) - set(exact) == {name.replace(".weight", ".weight_scale") for name in quantised}
    for name in quantised:
        scale = small[name.replace(".weight", ".weight_scale")].float()
        assert scale.shape == (exact[name].shape[0], 1)
        off = (small[name].float() * scale - exact[name]).abs()
        # Three bits of mantissa: half a step is a sixteenth of the value; bfloat16, also of the scale, adds to it.
        assert bool((off <= exact[name].abs() * 0.075 + scale * 2**-9).all())
    config = json.loads((stored["fp8"] / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "float-quantized")
    (group,) = config["config_groups"].values()
    assert group["weights"]["strategy"] == "channel" and group["input_activations"]["dynamic"] is True
    assert group["input_activations"]["strategy"] == "token" and "re:.*lm_head" in config["ignore"]


def test_an_exported_adapter_is_merged_with_card_terms_and_references(tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(BASE, base)
    shutil.copytree(ADAPTER, adapter)
    (base / "LICENSE").write_text("terms of the base\n")
    before = ModelCard.read(adapter).model_copy(update={"licence": "Gemma Terms of Use"})
    before.write(adapter)
    merge = ["export", "--adapter", str(adapter), "--base", str(base), "--out", str(out), "--format", "merged-fp8"]
    assert main([*merge, "--dry-run"]) == 0 and not out.exists()
    assert main(merge) == 0
    card, summary = ModelCard.read(out), json.loads((out / "summary.json").read_text())
    found = card.metrics["stored_weights"]
    assert summary["format"] == "merged-fp8" and summary["stored_weights"] == found and found["dtype"] == "fp8"
    assert 0 < found["distance_nat"] <= 0.3 and 3 * found["mean_distance_nat"] <= found["base_distance_nat"]
    assert card.reference_logprobs and len(card.reference_logprobs) == 8
    for reference in card.reference_logprobs:
        assert len(reference.logprobs) == len(reference.base_logprobs) == len(reference.token_ids) > 0
    kept = {"metrics", "reference_logprobs"}
    assert card.model_dump(exclude=kept) == before.model_dump(exclude=kept)
    notice = (out / "NOTICE").read_text()
    assert "Gemma Terms of Use" in notice and "prohibited_use_policy" in notice
    assert (out / "LICENSE").read_text() == "terms of the base\n"
    assert "--model FOLDER" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "config.json").read_text()


def test_a_merge_that_answers_otherwise_is_not_exported_and_the_old_artifact_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(base: Path, adapter: Path, folder: Path, dtype: torch.dtype, **options: Any) -> None:
        write_merged(base, adapter, folder, dtype, **options)
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            changed = {name: t * 0.5 if name.endswith("q_proj.weight") else t for name, t in tensors.items()}
            save_file(changed, path, metadata={"format": "pt"})

    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("stays")
    monkeypatch.setattr(export, "write_merged", spoilt)
    merge = ["export", "--adapter", str(ADAPTER), "--base", str(BASE), "--out", str(out), "--format", "merged"]
    assert main(merge) == 1 and "from what was trained" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["old"]


def test_a_whole_model_is_measured_against_another_whole_model(stored: dict[str, Path]) -> None:
    """A full fine-tune: no adapter anywhere."""
    references, agreement = measure_whole(stored["bfloat16"], BASE, stored["float32"], "bfloat16", 112)
    agreement.check()
    assert agreement.distance_nat <= 0.05 < 1 < agreement.base_distance_nat and len(references) == 8


def test_limits_of_the_agreement() -> None:
    Agreement("bfloat16", 0.1, 0.1, 0.31).check()
    with pytest.raises(DataError, match=r"expected at most 0\.1"):
        Agreement("bfloat16", 0.11, 0.05, 3.0).check()
    with pytest.raises(DataError, match="3 times closer"):
        Agreement("fp8", 0.2, 0.2, 0.5).check()
    with pytest.raises(DataError, match="expected at most"):
        Agreement("float32", float("nan"), 0.0, 1.0).check()


def test_formats_are_those_of_the_command_line() -> None:
    assert cli._FORMATS == export.FORMATS
