"""What a Qwen3-VL asks of the engines that Gemma 3 does not, on a random one; vLLM in .venv-vllm."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_contract import Models, Subject, started
from numpy.typing import NDArray
from qwen_model import END_OF_TURN, IMAGE_SIZE, SPECIALS, write_qwen
from tiny_models import write_adapter

from vlm2vla_server.engines.base import EngineStartError, ScoreRequest, Turn
from vlm2vla_server.engines.hf_model import HFModel, ModelOptions, Prompt
from vlm2vla_server.engines.processors import apply_template, load_processor
from vlm2vla_server.service import ANY_SIZE, read_cards
from vlm2vla_server.settings import Settings

ANSWER = "[[0.01, 0.0, -0.02, 1.0]]"
SAME_NAT = 1e-3
Picture = NDArray[np.uint8]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> HFModel:
    return HFModel(ModelOptions(base))


def picture(seed: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def asked(model: HFModel, *pictures: Picture, question: str = "Where is the carrot?") -> Prompt:
    return model.encode(pictures, (Turn("user", (*[None] * len(pictures), question)),))


def ours(model: HFModel, prompt: Prompt) -> list[float]:
    with model.using(None):
        return model.log_probabilities(prompt, model.completion_ids(ANSWER))


def in_one_pass(model: HFModel, prompt: Prompt) -> list[float]:
    """transformers' own forward over prompt and answer, which finds positions by itself from a clean start."""
    answer = torch.tensor([model.completion_ids(ANSWER)])
    kinds = {name: torch.cat([kind, 0 * answer], dim=1) for name, kind in prompt.kinds.items()}
    model.network.model.rope_deltas = None
    with torch.inference_mode():
        output = model.network(input_ids=torch.cat([prompt.ids, answer], dim=1), **kinds, **prompt.pictures)
    rows = torch.log_softmax(output.logits[0, prompt.length - 1 : -1], dim=-1)
    return [float(value) for value in rows.gather(1, answer[0][:, None])[:, 0]]


def test_answers_are_placed_where_transformers_places_them_whatever_was_asked_before(model: HFModel) -> None:
    """Pictures of other sizes and none in turn: the model itself would go on from the last picture's offset."""
    cases = [(picture(0),), (), (picture(1), picture(2)), (picture(3, 96, 256),), ()]
    prompts = [asked(model, *pictures) for pictures in cases]
    expected = [in_one_pass(model, prompt) for prompt in prompts]
    for prompt, right in zip(prompts, expected, strict=True):
        assert ours(model, prompt) == pytest.approx(right, abs=1e-4)
    wrong = ours(model, prompts[1])
    model.network.model.rope_deltas = torch.tensor([[-12]])
    assert ours(model, prompts[1]) == wrong


def test_a_picture_moves_the_text_behind_it_by_its_longer_side(model: HFModel) -> None:
    prompt, marked = asked(model, picture(0, 96, 256)), "mm_token_type_ids"
    assert prompt.positions is not None and prompt.pictures["image_grid_thw"].tolist() == [[1, 6, 16]]
    at = torch.nonzero(prompt.kinds[marked][0])[:, 0]
    assert len(at) == 3 * 8 and prompt.split == int(at[-1]) + 1
    first = int(at[0])
    rows = [first + row for row in range(3) for _ in range(8)]
    assert prompt.positions[1, 0, at].tolist() == rows
    assert prompt.positions[2, 0, at].tolist() == [*range(first, first + 8)] * 3
    assert prompt.positions[:, 0, prompt.split].tolist() == [first + 8] * 3


def test_what_was_read_of_a_picture_is_used_again_for_it_alone(base: Path) -> None:
    model, without = HFModel(ModelOptions(base)), HFModel(ModelOptions(base, prefix_cache_entries=0))
    plan, rows = asked(model, picture(0), question="Plan."), asked(model, picture(0), question="Rows.")
    with model.using(None):
        assert [model.prefill(prompt)[2] for prompt in (plan, rows)] == [0, rows.split]
    assert ours(model, rows) == ours(without, rows)
    flat = [np.zeros((height, width, 3), np.uint8) for height, width in ((128, 128), (64, 256))]
    square, long = (asked(model, one) for one in flat)  # the same ids and the same pixel values: only the grids differ
    assert torch.equal(square.ids, long.ids)
    assert torch.equal(square.pictures["pixel_values"], long.pictures["pixel_values"])
    with model.using(None):
        assert [model.prefill(prompt)[2] for prompt in (square, long, square)] == [0, 0, square.split]
    assert ours(model, long) == pytest.approx(in_one_pass(model, long), abs=1e-4)


def test_features_of_the_towers_inner_layers_reach_the_answer(base: Path) -> None:
    model = HFModel(ModelOptions(base))
    prompt = asked(model, picture(0))
    whole = ours(model, prompt)
    model._prefixes.clear()
    for merger in model.network.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
    assert np.abs(np.subtract(whole, ours(model, prompt))).max() > 1e-2


def test_a_turn_ends_as_the_template_says_and_control_tokens_are_known(model: HFModel) -> None:
    assert model.tokenizer.convert_ids_to_tokens(model.stop_ids) == [END_OF_TURN, "<|endoftext|>"]
    assert set(SPECIALS) <= model.control_texts and not {"<think>", "<tool_call>"} & model.control_texts


def test_a_template_that_can_think_is_told_not_to(tmp_path: Path) -> None:
    turns = (Turn("user", ("Go.  ",)),)
    texts = {
        kind: apply_template(load_processor(write_qwen(tmp_path / kind, thinking=kind)), (), turns, tokenize=False)
        for kind in ("never", "optional")
    }
    plain = "<|im_start|>user\nGo.  <|im_end|>\n<|im_start|>assistant\n"
    assert texts == {"never": plain, "optional": plain + "<think>\n\n</think>\n\n"}


def test_the_processors_video_part_is_left_out_only_where_it_cannot_be_had(base: Path, tmp_path: Path) -> None:
    processor: Any = load_processor(base)
    assert processor.image_token_ids != processor.video_token_ids
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    (broken / "preprocessor_config.json").write_text("{")
    with pytest.raises(EngineStartError):
        load_processor(broken)


def test_a_base_of_any_size_takes_that_of_its_adapters(base: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("model_card.json")))
    adapter = write_adapter(base, tmp_path / "adapter", 1, image_size=256)
    for adapters, size in (((), ANY_SIZE), ((("a", adapter),), 256)):
        card = read_cards(Settings(engine="transformers", model=bare, adapters=adapters))["base"]
        assert (card.name, card.image_size, card.policy) == ("bare", size, False)


@pytest.fixture(scope="module")
def reference(qwen_models: Models) -> Iterator[Subject]:
    """transformers and PEFT in float32 on the models of the engine contract."""
    with started("transformers", qwen_models) as running:
        yield running


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("subject", [pytest.param("vllm-qwen", marks=pytest.mark.vllm)], indirect=True)
@pytest.mark.parametrize("adapter", [None, "twin"])
def test_vllm_gives_the_log_probabilities_of_transformers(
    subject: Subject, reference: Subject, adapter: str | None
) -> None:
    for pictures in ((), (picture(0),), (picture(0), picture(1))):
        ask = ScoreRequest(pictures, "Where is the carrot?", ANSWER, adapter)
        found, right = (engine.run(engine.engine.score(ask)) for engine in (subject, reference))
        assert found == pytest.approx(right, abs=SAME_NAT)
