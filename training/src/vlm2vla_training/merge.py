"""Merged weights: base and adapter as one model in names that transformers and vLLM load, in bfloat16, float32 or fp8.

fp8 is what vLLM's recipes call FP8 dynamic: E4M3 with a scale for each output channel, activations quantised token by
token while serving, the language model's linears only. Vision tower, projector, embeddings and lm_head keep their type.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlm2vla_training.bases import copy_processor
from vlm2vla_training.jsonio import read_json, write_json
from vlm2vla_training.servable import write_servable_names

SHARD_SIZE = "5GB"
FP8_SCHEME = "FP8_DYNAMIC"
NOT_QUANTISED = (r"re:.*lm_head", r"re:.*vision_tower\..*", r"re:.*multi_modal_projector\..*", r"re:.*visual\..*")
"""Of the linears: what keeps its type, as compressed-tensors writes it into config.json."""
_QUANTISED = re.compile(r"(^|\.)language_model\..*\.(q|k|v|o|up|down|gate)_proj\.weight$")
_INDEX = "model.safetensors.index.json"


def write_merged(
    base: Path,
    adapter: Path | None,
    folder: Path,
    dtype: torch.dtype,
    *,
    fp8: bool = False,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Write a whole model into `folder`: weights in shards, config, processor, tokenizer.

    Args:
        base: model folder; with `adapter` None it is written as it is (a full fine-tune).
        adapter: PEFT folder. It is added to the base in float32 and rounded once, to `dtype`.
        folder: is made; the caller moves it into place when everything is written.
        fp8: the language model's linears in fp8; the rest in `dtype`.
        shard_size: longest weight file, in transformers' notation.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    copy_processor(base, folder)
    set_dtype(folder / "config.json", dtype)
    write_servable_names(folder)
    if fp8:
        quantise(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Make a config.json name `dtype`, in its parts too, wherever it names one."""
    config = read_json(path)
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def quantise(folder: Path) -> None:
    """Turn a saved model's language linears into fp8 in place, one weight file at a time, and say so in config.json."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    scheme: dict[str, Any] = {FP8_SCHEME: ["Linear"]}
    config = QuantizationConfig(
        config_groups=scheme, format="float-quantized", quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(NOT_QUANTISED),
    )  # fmt: skip
    weights = config.config_groups[FP8_SCHEME].weights
    where: dict[str, str] = {}
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [name for name in tensors if _QUANTISED.search(name)]:
            stem = name.removesuffix(".weight")
            tensors[name], tensors[f"{stem}.weight_scale"] = _fp8(tensors[name], weights)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, path)
        where |= dict.fromkeys(tensors, path.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if (folder / _INDEX).is_file():
        write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    said = config.model_dump(mode="json", exclude_none=True)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "quantization_config": said})


def _fp8(weight: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear's weight [out, in] as float8_e4m3fn, and its scales [out, 1]."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    exact = weight.float()
    scale, zero = calculate_qparams(exact.amin(dim=1, keepdim=True), exact.amax(dim=1, keepdim=True), arguments)
    small = quantize(exact, scale, zero, arguments, dtype=torch.float8_e4m3fn)
    return small.contiguous(), scale.to(weight.dtype).contiguous()
