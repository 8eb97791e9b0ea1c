"""What is particular to the vLLM engine. Unmarked tests need no vLLM; those marked vllm run in .venv-vllm."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_contract import Models, Subject, started
from engine_parity import Difference, gap_nat, greedy_texts, row_requests, twin_frames
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from server_fakes import until

from vlm2vla_schema import prompts
from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image
from vlm2vla_schema.types import ModelCard
from vlm2vla_server.engines.adapters import inspect_adapter
from vlm2vla_server.engines.base import EngineStartError, GenerationError, GenerationRequest, ScoreRequest
from vlm2vla_server.engines.vllm_cpu import cut_at_images, pieces
from vlm2vla_server.engines.vllm_engine import TOO_LONG
from vlm2vla_server.engines.vllm_options import VLLMOptions, engine_arguments, option_value

pytestmark = pytest.mark.timeout(3600)
on_vllm = pytest.mark.parametrize("subject", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)

KNOWN = (
    "model",
    "dtype",
    "max_model_len",
    "speculative_config",
    "quantization",
    "tensor_parallel_size",
    "enforce_eager",
)
FRAMES, MUST_EQUAL, MAX_GAP_NAT = 50, 48, 1e-3
SAME_NAT, FAR_NAT = 1e-3, 0.1


def options(models: Models, **given: str) -> VLLMOptions:
    return VLLMOptions(models.base, models.adapters, engine_options=tuple(given.items()))


def test_options_are_vllms_own_and_read_as_json(contract_models: Models) -> None:
    for text, value in (("4", 4), ("true", True), ('{"a": [1]}', {"a": [1]}), ("fp8", "fp8"), ("0.9", 0.9), ("", "")):
        assert option_value(text) == value
    asked = options(contract_models, speculative_config='{"method": "ngram"}', dtype="bfloat16", enforce_eager="false")
    given = engine_arguments(asked, KNOWN, on_cpu=True)
    assert given["speculative_config"] == {"method": "ngram"} and given["dtype"] == "bfloat16"
    assert given["enforce_eager"] is False and given["model"] == str(contract_models.base)


def test_defaults_leave_the_checkpoints_sampling_and_code_alone(contract_models: Models) -> None:
    for on_cpu, dtype in ((True, "float32"), (False, "bfloat16")):
        given = engine_arguments(options(contract_models), KNOWN, on_cpu=on_cpu)
        assert given["generation_config"] == "vllm" and given["trust_remote_code"] is False
        assert given["dtype"] == dtype and given["max_model_len"] == 4096 and given["disable_chunked_mm_input"]
        assert (given["enable_lora"], given["max_loras"], given["max_lora_rank"]) == (True, 3, 16)
        assert ("block_size" in given) is on_cpu
    for limit, at_once in ((16, 8), (3, 1), (1, 1)):  # the others wait in the server, by priority
        asked = VLLMOptions(contract_models.base, max_concurrency=limit)
        assert engine_arguments(asked, KNOWN, on_cpu=False)["max_num_seqs"] == at_once
    bare = engine_arguments(VLLMOptions(contract_models.base), KNOWN, on_cpu=True)
    assert bare["enable_lora"] is False


def test_options_that_cannot_work_are_refused(contract_models: Models) -> None:
    for name, words in (("max_modl_len", "did you mean max_model_len"), ("model", "itself"), ("xyz", "no such option")):
        with pytest.raises(EngineStartError, match=words):
            engine_arguments(options(contract_models, **{name: "1"}), [*KNOWN, "model"], on_cpu=True)


def adapter_copy(models: Models, folder: Path, **config: Any) -> Path:
    target = Path(shutil.copytree(models.adapters[0][1], folder / "adapter"))
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def test_ranks_are_rounded_up_to_what_vllm_has(contract_models: Models, tmp_path: Path) -> None:
    for rank, pattern, expected in ((8, {}, 8), (20, {}, 32), (4, {"q_proj": 65}, 128)):
        folder = adapter_copy(contract_models, tmp_path / str(rank), r=rank, rank_pattern=pattern)
        asked = VLLMOptions(contract_models.base, (("a", folder),))
        assert engine_arguments(asked, KNOWN, on_cpu=True)["max_lora_rank"] == expected
    for wrong in (513, 0, "16", None):
        folder = adapter_copy(contract_models, tmp_path / f"bad{wrong}", r=wrong)
        with pytest.raises(EngineStartError, match="rank"):
            engine_arguments(VLLMOptions(contract_models.base, (("a", folder),)), KNOWN, on_cpu=True)


def test_adapters_are_compared_with_the_model_without_its_weights(contract_models: Models, tmp_path: Path) -> None:
    base, good = contract_models.base, contract_models.adapters[0][1]
    found = inspect_adapter(base, "twin", "a0", good)
    assert (found.adapted_modules, found.problem) == (28, None)
    renamed = adapter_copy(contract_models, tmp_path)
    weights = load_file(renamed / "adapter_model.safetensors")
    wrong = {name.replace("language_model.", "language_model.model."): value for name, value in weights.items()}
    save_file(wrong, renamed / "adapter_model.safetensors")
    assert "match no module" in str(inspect_adapter(base, "twin", "a0", renamed).problem)
    (renamed / "adapter_model.safetensors").unlink()
    with pytest.raises(EngineStartError, match="cannot read"):
        inspect_adapter(base, "twin", "a0", renamed)


@pytest.mark.parametrize(
    ("words", "too_long"),
    [
        ("This model's maximum context length is 4096 tokens. However, your prompt contains 6010 input tokens", True),
        ("The decoder prompt (length 4100) is longer than the maximum model length of 4096.", True),
        ("Grammar error: rule nowhere is not defined", False),
    ],
)
def test_both_of_vllms_refusals_of_a_long_prompt_are_known(words: str, too_long: bool) -> None:
    assert bool(TOO_LONG.search(words)) is too_long


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """A length, where the new queries begin, and images in it."""
    edges = sorted(draw(st.sets(st.integers(0, 40), max_size=6)))
    images = [(a, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    end = draw(st.integers(max([1, *(last + 1 for _, last in images)]), 45))
    return draw(st.integers(0, end - 1)), end, images


@given(sequences())
def test_pieces_let_an_images_tokens_see_one_another_and_nothing_else(
    case: tuple[int, int, list[tuple[int, int]]],
) -> None:
    begin, end, images = case
    place = np.arange(end)
    wanted = place[:, None] >= place[None]
    for first, last in images:
        inside = (place >= first) & (place <= last)
        wanted |= inside[:, None] & inside[None]
    seen = np.zeros((end, end), dtype=bool)
    covered: list[int] = []
    for start, stop, whole in pieces(begin, end, images):
        covered += range(start, stop)
        for query in range(start, stop):
            seen[query, : stop if whole else query + 1] = True
    assert covered == list(range(begin, end))
    assert np.array_equal(seen[begin:], wanted[begin:])


@dataclass
class Batch:
    """The fields of vLLM's CommonAttentionMetadata that are read."""

    num_reqs: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    block_table_tensor: torch.Tensor
    causal: bool | torch.Tensor
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None


def batch(starts: list[int], ends: list[int], images: dict[int, list[tuple[int, int]]] | None) -> Batch:
    queries = torch.tensor(starts, dtype=torch.int32)
    longest = max(b - a for a, b in pairwise(starts))
    table = torch.arange(len(ends) * 3, dtype=torch.int32).reshape(len(ends), 3)
    return Batch(len(ends), queries, queries, torch.tensor(ends, dtype=torch.int32), longest, table, True, images)


def test_a_batch_is_cut_at_its_images_and_keeps_its_blocks() -> None:
    # one sequence decodes, one reads a prompt whose first 4 tokens are cached and whose image lies at 6..9
    cut = cut_at_images(batch([0, 1, 9], [30, 12], {0: [(5, 9)], 1: [(6, 9)]}))
    assert cut.num_reqs == 4
    assert cut.query_start_loc.tolist() == [0, 1, 3, 7, 9] and cut.query_start_loc.dtype == torch.int32
    assert cut.seq_lens.tolist() == [30, 6, 10, 12] and cut.causal.tolist() == [1, 1, 0, 1]
    assert cut.block_table_tensor.tolist() == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [3, 4, 5]]


def test_batches_without_image_queries_stay_as_they_are() -> None:
    for same in (
        batch([0, 1, 2], [30, 31], {0: [(5, 9)], 1: [(6, 9)]}),
        batch([0, 5], [30], {0: [(5, 9)]}),
        batch([0, 5], [30], None),
        batch([0, 5], [30], {}),
    ):
        assert cut_at_images(same) is same


@pytest.fixture(scope="module")
def reference(contract_models: Models) -> Iterator[Subject]:
    """transformers and PEFT in float32 on the same models."""
    with started("transformers", contract_models) as running:
        yield running


def proof_scores(subject: Subject, adapter: str | None, completion: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    found = [
        subject.run(subject.engine.score(ScoreRequest((probe_image(i, 112),), prompt, completion, adapter)))
        for i, prompt in enumerate(PROBE_PROMPTS)
    ]
    return np.asarray(found)


@on_vllm
@pytest.mark.parametrize("adapter", ["twin", "one", "my.two"])
def test_the_adapter_is_truly_active(subject: Subject, reference: Subject, adapter: str) -> None:
    completion = "[[0.012, -0.004, -0.03, 1.0]]"
    ours, theirs = (proof_scores(engine, adapter, completion) for engine in (subject, reference))
    base, their_base = (proof_scores(engine, None, completion) for engine in (subject, reference))
    assert np.abs(base - their_base).max() < SAME_NAT
    assert np.abs(ours - theirs).max() < SAME_NAT
    assert np.abs(ours - base).mean() > FAR_NAT


@on_vllm
def test_two_images_and_none_score_as_in_transformers(subject: Subject, reference: Subject) -> None:
    pictures = (probe_image(0, 112), probe_image(1, 112))
    for images in ((), pictures[:1], pictures):
        ask = ScoreRequest(images, prompts.verify_prompt("Grasp Carrot", None), '{"success": true', "twin")
        ours, theirs = (engine.run(engine.engine.score(ask)) for engine in (subject, reference))
        assert ours == pytest.approx(theirs, abs=SAME_NAT)


@on_vllm
def test_the_server_is_told_how_many_run_at_once(subject: Subject) -> None:
    assert subject.engine.info().slots == VLLMOptions(subject.models.base).max_concurrency // 2 == 8


@on_vllm
def test_prompts_are_the_same_tokens(subject: Subject, reference: Subject) -> None:
    pictures = (probe_image(0, 112), probe_image(1, 112))
    for images in ((), pictures[:1], pictures):
        ask = GenerationRequest(images, "\n What is it?\n\n", None, 0.0, 1.0, 0, 1)
        lengths = [engine.run(engine.collect(ask))[1][-1].prompt_tokens for engine in (subject, reference)]
        assert lengths[0] == lengths[1]


@on_vllm
def test_greedy_rows_are_those_of_transformers(
    subject: Subject, reference: Subject, contract_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = contract_models.adapters[0]
    requests = row_requests(twin_frames(FRAMES, 112), ModelCard.read(folder), name)
    theirs = reference.run(greedy_texts(reference.engine, requests), 1000)
    ours = subject.run(greedy_texts(subject.engine, requests), 1000)
    model: Any = reference.engine
    differences = [
        Difference(i, a, b, gap_nat(model._model, requests[i], b))
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True))
        if a != b
    ]
    with capsys.disabled():
        print(f"\ngreedy rows of vLLM and transformers: {FRAMES - len(differences)} of {FRAMES} frames equal")
        for found in differences:
            print(f"  frame {found.frame}: top-2 gap {found.gap_nat:.2e} nat\n    {found.one}\n    {found.other}")
    assert len({*theirs}) > 5, "the frames should not all give the same rows"
    assert FRAMES - len(differences) >= MUST_EQUAL
    assert all(found.gap_nat < MAX_GAP_NAT for found in differences)


@on_vllm
def test_a_closed_stream_leaves_the_scheduler(subject: Subject) -> None:
    engine: Any = subject.engine
    statistics = engine._llm.logger_manager  # told at every step what the scheduler holds
    record, held = statistics.record, []

    def spy(*args: Any, scheduler_stats: Any = None, **others: Any) -> None:
        if scheduler_stats is not None:
            held.append(scheduler_stats.num_running_reqs + scheduler_stats.num_waiting_reqs)
        record(*args, scheduler_stats=scheduler_stats, **others)

    async def work() -> None:
        ask = GenerationRequest((), "Say something.", None, 1.0, 1.0, 0, 3000, "root ::= [a-z]{3000}\n")
        streams = [engine.generate(ask) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        statistics.record = spy
        await until(lambda: 3 in held, 60)
        for stream in streams:
            await stream.aclose()
        held.clear()
        await subject.collect(replace(ask, max_tokens=6))

    try:
        subject.run(work())
    finally:
        statistics.record = record
    assert held and max(held[2:]) <= 1, held


def children_named(name: str) -> list[int]:
    """Process ids of this process' children whose (shortened) name is `name`."""
    threads = Path("/proc/self/task").glob("*/children")
    found = [int(child) for thread in threads for child in thread.read_text().split()]
    return [child for child in found if name.startswith(Path(f"/proc/{child}/comm").read_text().strip())]


@on_vllm
def test_a_killed_engine_ends_its_streams_and_says_that_it_died(subject: Subject) -> None:
    """Stands last: the engine is gone afterwards."""
    engine: Any = subject.engine
    ask = GenerationRequest((), "Say something.", None, 1.0, 1.0, 0, 2000, "root ::= [a-z]{3000}\n")

    async def work() -> str:
        stream = engine.generate(ask)
        await anext(stream)
        cores = children_named("VLLM::EngineCore")
        assert cores
        for process in cores:
            os.kill(process, signal.SIGKILL)
        with pytest.raises(GenerationError, match="died"):
            while True:
                await anext(stream)
        reason = str(await engine.wait_dead())
        with pytest.raises(GenerationError):
            await subject.collect(replace(ask, max_tokens=1))
        await until(lambda: engine.load().running == 0 and engine.load().waiting == 0)
        return reason

    assert "died" in subject.run(work(), 60)
