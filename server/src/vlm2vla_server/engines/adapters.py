"""Loading PEFT adapters and noticing when one does not fit the model.

PEFT and vLLM accept an adapter whose names match nothing and then answer as the base model does, with no error
(vllm#32758, #48019, #51949). So the names in the file are compared with the names that the model really has.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import safe_open

from vlm2vla_server.engines.base import EngineStartError

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter in the model. problem: None when file and model agree, otherwise what does not."""

    internal_name: str
    hash: str
    adapted_modules: int
    problem: str | None


def load_adapter(network: Any, name: str, internal_name: str, folder: Path) -> tuple[peft.PeftModel, LoadedAdapter]:
    """Add the adapter in `folder` to the network (a plain model for the first, a PeftModel later).

    Raises EngineStartError when the folder cannot be read at all.
    """
    _lora_config(name, folder)
    keys = _file_keys(name, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns about missing keys; we compare and report them ourselves
            if isinstance(network, peft.PeftModel):
                network.load_adapter(str(folder), adapter_name=internal_name, is_trainable=False)
                wrapped = network
            else:
                wrapped = peft.PeftModel.from_pretrained(network, str(folder), adapter_name=internal_name)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as problem:
        raise EngineStartError(f"cannot load adapter {name!r} from {folder}: {problem}") from problem
    return wrapped, _facts(wrapped, internal_name, keys, folder)


def inspect_adapter(model: Path, name: str, internal_name: str, folder: Path) -> LoadedAdapter:
    """Compare the adapter in `folder` with the base in `model` without loading weights: the network is built on torch's
    meta device, which holds shapes and no numbers. For engines that load adapters by themselves.

    Raises EngineStartError when either folder cannot be read at all.
    """
    _lora_config(name, folder)
    keys = _file_keys(name, folder)
    try:
        config = transformers.AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = transformers.AutoModelForImageTextToText.from_config(config)
            settings = peft.PeftConfig.from_pretrained(str(folder))
            wrapped = peft.PeftModel(network, settings, adapter_name=internal_name)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as problem:
        raise EngineStartError(f"cannot fit adapter {name!r} from {folder} to {model}: {problem}") from problem
    return _facts(wrapped, internal_name, keys, folder)


def _facts(wrapped: peft.PeftModel, internal_name: str, keys: set[str], folder: Path) -> LoadedAdapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = set(peft.get_peft_model_state_dict(wrapped, adapter_name=internal_name))
    modules = {key.split(".lora_")[0] for key in expected}
    digest = hashlib.sha256((folder / ADAPTER_FILE).read_bytes()).hexdigest()
    return LoadedAdapter(internal_name, digest, len(modules), _compare(keys, expected))


def rank_of(name: str, folder: Path) -> int:
    """The largest rank in an adapter's adapter_config.json. Raises EngineStartError."""
    config = _lora_config(name, folder)
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise EngineStartError(
            f"adapter {name!r}: expected ranks of at least 1 in its adapter_config.json, found {ranks}"
        )
    return int(max(ranks))


def _lora_config(name: str, folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise EngineStartError(f"adapter {name!r}: cannot read {path}: {problem}") from problem
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise EngineStartError(f"adapter {name!r}: expected a LoRA adapter, {path} says {kind!r}")
    return dict(config)


def _file_keys(name: str, folder: Path) -> set[str]:
    path = folder / ADAPTER_FILE
    try:
        with safe_open(str(path), framework="pt") as file:
            return set(file.keys())
    except (OSError, ValueError, RuntimeError) as problem:
        raise EngineStartError(f"adapter {name!r}: cannot read {path}: {problem}") from problem
    except Exception as problem:  # safetensors raises its own class for a broken header
        raise EngineStartError(f"adapter {name!r}: {path} is not a safetensors file: {problem}") from problem


def _compare(found: set[str], expected: set[str]) -> str | None:
    unknown, missing = sorted(found - expected), sorted(expected - found)
    if not unknown and not missing:
        return None
    parts = []
    if unknown:
        parts.append(f"{len(unknown)} of {len(found)} tensors match no module of the model, e.g. {unknown[0]}")
    if missing:
        parts.append(f"{len(missing)} of {len(expected)} expected tensors are not in the file, e.g. {missing[0]}")
    return "; ".join(parts)
