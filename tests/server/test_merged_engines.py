"""One set of prompts, three ways to serve an adapter: transformers with PEFT, vLLM with the adapter, vLLM with the
merged model. They agree within the tolerances of the proof; an adapter whose scope reaches into the vision tower is
refused, and may be merged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_contract import TWIN, Models, Subject, started
from proof_engines import Proving, measured_references, on_transformers, on_vllm
from tiny_models import IMAGE_SIZE, write_adapter

from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image, tolerance_nat
from vlm2vla_schema.types import ModelCard
from vlm2vla_server.adapter_proof import scope_problem
from vlm2vla_server.engines.base import Engine, ScoreRequest
from vlm2vla_server.engines.hf_model import ModelOptions
from vlm2vla_server.engines.transformers_engine import TransformersEngine
from vlm2vla_training.merge import write_merged

pytestmark = pytest.mark.timeout(3600)
SCOPES: dict[str, Any] = {
    "language_model": None,  # the twin's own adapter
    "paper": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
    "all_linear": "all-linear",
}
KINDS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "fp8": (torch.bfloat16, True)}
CASES = [("language_model", "float32"), ("language_model", "fp8"), ("paper", "bfloat16")]
SERVED = [
    pytest.param(engine, scope, kind, marks=[pytest.mark.vllm] if engine == "vllm" else [])
    for engine in ("transformers", "vllm")
    for scope, kind in CASES
]
COMPLETIONS = ('["Move to Carrot", "Grasp Carrot", "Lift Carrot"]', "Move forward, slightly left, and down.",
               "[[0.012, -0.004, -0.03, 1.0], [0.0, 0.0, -0.021, 0.0]]")  # fmt: skip


def adapter_of(models: Models, folder: Path, scope: str) -> Path:
    if SCOPES[scope] is None:
        return models.adapters[0][1]
    return write_adapter(models.base, folder / scope, 3, targets=SCOPES[scope])


def requests(adapter: str | None) -> list[ScoreRequest]:
    return [
        ScoreRequest((probe_image(index, IMAGE_SIZE),), prompt, COMPLETIONS[min(index // 2, 2)], adapter)
        for index, prompt in enumerate(PROBE_PROMPTS)
    ]


async def scores(engine: Engine, adapter: str | None) -> list[list[float]]:
    return [await engine.score(request) for request in requests(adapter)]


def with_peft(models: Models, adapter: Path) -> list[list[float]]:
    async def work() -> list[list[float]]:
        engine = TransformersEngine(ModelOptions(models.base, (("one", adapter),)))
        await engine.start()
        try:
            return await scores(engine, "one")
        finally:
            await engine.close()

    return asyncio.run(work())


def farthest(one: list[list[float]], other: list[list[float]]) -> float:
    """Of the prompt where it is largest, the mean absolute difference in nat: what the proof compares."""
    return max(float(np.mean(np.abs(np.subtract(a, b)))) for a, b in zip(one, other, strict=True))


def merged(models: Models, adapter: Path, folder: Path, kind: str) -> Path:
    """A whole model with the card that `export` would give it, references measured by the transformers engine."""
    dtype, fp8 = KINDS[kind]
    write_merged(models.base, adapter, folder, dtype, fp8=fp8, shard_size="1MB")
    card = ModelCard.read(TWIN / "adapter").model_copy(update={"name": kind, "reference_logprobs": None})
    card.write(folder)
    references = asyncio.run(measured_references(folder, None, models.base))
    card.model_copy(update={"reference_logprobs": references}).write(folder)
    return folder


@contextmanager
def serving(engine: str, model: Path, scratch: Path) -> Iterator[tuple[Subject, Proving]]:
    with started(engine, Models(model, ())) as subject:
        proving = on_vllm(subject) if engine == "vllm" else replace(on_transformers(scratch), base=model)
        yield subject, proving


@pytest.mark.parametrize(("engine", "scope", "kind"), SERVED)
def test_a_merged_model_is_proven_and_agrees_with_peft(
    contract_models: Models, tmp_path: Path, engine: str, scope: str, kind: str
) -> None:
    adapter = adapter_of(contract_models, tmp_path, scope)
    exact = with_peft(contract_models, adapter)
    folder = merged(contract_models, adapter, tmp_path / "merged", kind)
    with serving(engine, folder, tmp_path) as (subject, proving):
        whole = subject.run(scores(subject.engine, None))
        info = proving.started({})
    assert farthest(whole, exact) <= tolerance_nat(kind)
    assert info.ready and info.policy and info.merged is not None, info.reason
    proof = info.merged
    assert proof.proven and proof.proof == "references" and proof.distance_nat is not None
    assert proof.distance_nat <= tolerance_nat(kind) and (proof.base_distance_nat or 0) > 3 * proof.distance_nat


@pytest.mark.vllm
def test_vllm_with_the_adapter_agrees_with_peft(vllm_subject: Subject, contract_models: Models) -> None:
    exact = with_peft(contract_models, contract_models.adapters[0][1])
    beside = vllm_subject.run(scores(vllm_subject.engine, "twin"))
    base = vllm_subject.run(scores(vllm_subject.engine, None))
    assert farthest(beside, exact) <= tolerance_nat("float32") and farthest(base, exact) > 1.0


@pytest.mark.parametrize("scope", ["paper", "all_linear"])
def test_adapters_of_other_scopes_are_refused_with_the_reason(
    contract_models: Models, tmp_path: Path, scope: str
) -> None:
    adapter = adapter_of(contract_models, tmp_path, scope)
    assert "outside the language model" in str(scope_problem("one", adapter))
    proving = on_transformers(tmp_path)
    reason = replace(proving, base=contract_models.base).refused(adapter)
    assert "outside the language model" in reason and "--format merged" in reason
    assert scope_problem("twin", adapter_of(contract_models, tmp_path, "language_model")) is None


def test_a_merged_model_that_was_changed_is_refused(contract_models: Models, tmp_path: Path) -> None:
    folder = merged(contract_models, adapter_of(contract_models, tmp_path, "language_model"), tmp_path / "m", "float32")
    proving = replace(on_transformers(tmp_path), base=folder)
    card = ModelCard.read(folder)
    write_merged(contract_models.base, contract_models.adapters[1][1], folder, torch.float32, shard_size="1MB")
    reason = str(proving.started({}).reason)
    assert "what is merged is not what was exported" in reason
    assert not proving.started({}).policy and proving.started({}, unproven=True).ready
    write_merged(contract_models.base, None, folder, torch.float32, shard_size="1MB")
    assert "what is merged does not change the model" in str(proving.started({}).reason)
    card.model_copy(update={"prompt_versions": {"actions": "another"}}).write(folder)
    assert "asks for prompt actions" in str(proving.started({}).reason)


def test_a_card_without_the_bases_log_probabilities_proves_nothing(contract_models: Models, tmp_path: Path) -> None:
    folder = merged(contract_models, contract_models.adapters[0][1], tmp_path / "m", "float32")
    card = ModelCard.read(folder)
    assert card.reference_logprobs
    cut = [one.model_copy(update={"base_logprobs": []}) for one in card.reference_logprobs]
    card.model_copy(update={"reference_logprobs": cut}).write(folder)
    info = replace(on_transformers(tmp_path), base=folder).started({})
    assert not info.ready and "cannot be proven" in str(info.reason)
