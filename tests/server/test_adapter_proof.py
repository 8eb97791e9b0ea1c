"""An adapter is served only when its log-probabilities are those that were stored where it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from proof_engines import Proving, on_transformers, on_vllm
from safetensors.torch import load_file, save_file
from server_fakes import FakeEngine, run, with_settings, write_models

from vlm2vla_schema.images import to_base64
from vlm2vla_schema.probes import tolerance_nat
from vlm2vla_schema.types import ModelCard, ReferenceLogprobs
from vlm2vla_server.engines.base import EngineInfo
from vlm2vla_server.service import Service

WEIGHTS = "adapter_model.safetensors"
ENGINES = [pytest.param("transformers"), pytest.param("vllm", marks=pytest.mark.vllm)]
pytestmark = pytest.mark.timeout(3600)  # vLLM's start on a busy machine


@pytest.fixture(scope="module", params=ENGINES)
def proving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Proving:
    if request.param == "vllm":
        return on_vllm(request.getfixturevalue("vllm_subject"))
    return on_transformers(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(proving: Proving, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: proving.write(proving.base, root / name, seed) for seed, name in enumerate(("one", "two", "three"))}


@pytest.fixture
def adapter(adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(adapters["one"], tmp_path / "adapter"))


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    assert all(old in name for name in tensors)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


def edit_card(folder: Path, **changes: object) -> None:
    ModelCard.read(folder).model_copy(update=changes).write(folder)


def test_the_right_adapter_is_ready(proving: Proving, adapter: Path) -> None:
    info = proving.started({"twin": adapter})
    assert info.ready and info.policy, info.reason
    (one,) = info.adapters
    assert one.proven and one.proof == "references" and one.tolerance_nat == 0.02
    assert one.distance_nat is not None and one.base_distance_nat is not None
    assert one.distance_nat < 0.001 and one.base_distance_nat > 0.05


def test_three_adapters_at_once_are_ready(proving: Proving, adapters: dict[str, Path]) -> None:
    info = proving.started(adapters)
    assert info.ready, info.reason
    assert [(one.name, one.proven, one.proof) for one in info.adapters] == [(n, True, "references") for n in adapters]


def test_an_adapter_under_another_ones_card_is_refused(
    proving: Proving, adapter: Path, adapters: dict[str, Path]
) -> None:
    shutil.copyfile(adapters["two"] / WEIGHTS, adapter / WEIGHTS)
    assert "not what was exported" in proving.refused(adapter)


def test_renamed_keys_are_refused(proving: Proving, adapter: Path) -> None:
    rename(adapter, "language_model.", "language_model.model.")
    assert proving.refused(adapter)


def test_vision_tower_keys_are_refused(proving: Proving, adapter: Path) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(proving.base)
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]  # the paper's list, E
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(adapter)
    assert any("vision_tower" in name for name in load_file(adapter / WEIGHTS))
    assert "outside the language model" in proving.refused(adapter)


def test_zero_weights_are_refused(proving: Proving, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, adapter / WEIGHTS)
    assert "does not change the model" in proving.refused(adapter)


def test_weights_that_barely_act_are_refused(proving: Proving, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor * 0.3 for name, tensor in tensors.items()}, adapter / WEIGHTS)
    assert "not what was exported" in proving.refused(adapter)


def test_the_wrong_base_is_refused(proving: Proving, tmp_path: Path) -> None:
    """The adapter was made for another base than the one that is served."""
    from vlm2vla_training.twin_model import write_random_base

    write_random_base(tmp_path / "other", seed=7)
    adapter = proving.write(tmp_path / "other", tmp_path / "adapter", 1)
    assert "sha256" in proving.refused(adapter)
    edit_card(adapter, base_hash=None)
    assert "not what was exported" in proving.refused(adapter)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json", "model_card.json"])
def test_a_missing_file_is_refused(proving: Proving, adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    assert name in proving.refused(adapter)


def test_allow_unproven_serves_with_policy_false(proving: Proving, adapter: Path) -> None:
    rename(adapter, "language_model.", "language_model.model.")
    info = proving.started({"twin": adapter}, unproven=True)
    assert info.ready and not info.policy and info.reason
    assert not info.adapters[0].proven and not info.adapters[0].policy and info.adapters[0].problem


def test_an_older_card_gets_the_weaker_proof_and_info_says_so(
    proving: Proving, adapter: Path
) -> None:
    edit_card(adapter, reference_logprobs=None)
    (one,) = proving.started({"twin": adapter}).adapters
    assert one.proven and one.proof == "difference" and one.distance_nat is None and one.tolerance_nat is None


# --- the arithmetic, on a scripted engine -----------------------------------------------------------------------------


class Scripted(FakeEngine):
    """Scores [adapter, -2] or [base, -2]; the references say [-1, -2]."""

    adapter, base, dtype = -1.0, -2.0, "float32"

    async def score(self, request: object) -> list[float]:
        return [self.base if getattr(request, "adapter", None) is None else self.adapter, -2.0]

    def info(self) -> EngineInfo:
        known = super().info()
        return EngineInfo(**{**vars(known), "dtype": self.dtype})


def reference(**changes: object) -> ReferenceLogprobs:
    values = {"prompt": "p", "completion": "c", "token_ids": [5, 6], "logprobs": [-1.0, -2.0]}
    return ReferenceLogprobs.model_validate({**values, **changes})


@pytest.mark.parametrize(
    ("dtype", "adapter", "base", "word"),
    [
        ("float32", -1.03, -2.0, None),  # 0.015 on average over the two tokens
        ("float32", -1.05, -2.0, "expected at most 0.02 in float32"),
        ("bfloat16", -1.19, -2.0, None),
        ("bfloat16", -1.21, -2.0, "expected at most 0.1 in bfloat16"),
        ("fp8", -1.59, -3.0, None),
        ("fp8", -1.61, -3.0, "expected at most 0.3 in fp8"),
        ("float32", -1.03, -1.08, "3 times closer"),
        ("float32", float("nan"), -2.0, "does not change the model"),
    ],
)
def test_limits_of_the_proof(tmp_path: Path, dtype: str, adapter: float, base: float, word: str | None) -> None:
    settings = write_models(tmp_path, reference_logprobs=[reference()] * 8)
    engine = Scripted()
    engine.dtype, engine.adapter, engine.base = dtype, adapter, base

    async def work() -> Service:
        service = Service(settings, engine)
        await service.start()
        return service

    service = run(work())
    assert service.ready is (word is None), service.reason
    assert word is None or word in str(service.reason)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"logprobs": [-1.0]}, "another tokenizer"), ({"image": to_base64(b"no picture")}, "picture")],
)
def test_references_that_cannot_be_compared_are_no_proof(tmp_path: Path, changes: dict[str, object], word: str) -> None:
    settings = write_models(tmp_path, reference_logprobs=[reference(**changes)])

    async def work() -> Service:
        service = Service(with_settings(settings), Scripted())
        await service.start()
        return service

    service = run(work())
    assert not service.ready and word in str(service.reason)


def test_quantised_weights_get_the_widest_limit() -> None:
    assert [tolerance_nat(name) for name in ("float32", "bfloat16", "float16", "fp8", "bfloat16 int4")] == [
        0.02, 0.1, 0.1, 0.3, 0.3,
    ]  # fmt: skip


def test_a_card_on_disk_is_read_back_with_its_references(adapter: Path) -> None:
    stored = json.loads((adapter / "model_card.json").read_text())["reference_logprobs"]
    assert len(stored) == 8 and all(len(one["token_ids"]) == len(one["logprobs"]) > 1 for one in stored)
