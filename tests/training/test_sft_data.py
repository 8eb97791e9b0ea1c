"""What carries loss in each kind of example, and what stops a run before it starts."""

from pathlib import Path

import numpy as np
import pytest
from training_fakes import PLACE, episode_of
from transformers import AutoProcessor

from vlm2vla_training.cli import main
from vlm2vla_training.curation.dataset import ExampleSet, load_examples
from vlm2vla_training.curation.examples import KINDS
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.errors import DataError
from vlm2vla_training.sft_data import Collator, Encoder, check_parity, dump, encode_all
from vlm2vla_training.twin_model import write_random_base

GOLDEN = Path(__file__).parent / "golden"
SIZE_PX = 112


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("base")
    write_random_base(folder)
    return Encoder(AutoProcessor.from_pretrained(folder), SIZE_PX)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExampleSet]:
    root = tmp_path_factory.mktemp("chain")
    with EpisodeWriter(root / "episodes") as writer:
        writer.write(episode_of(PLACE, "put the carrot on the plate", "fake/0", 0.001))
    assert main(["annotate", "--episodes", str(root / "episodes"), "--out", str(root / "annotated")]) == 0
    common = ["curate", "--episodes", str(root / "episodes"), "--annotated", str(root / "annotated")]
    result = {}
    for variant in ("main", "at", "nr"):
        folder = root / variant
        assert main([*common, "--image-size", str(SIZE_PX), "--variant", variant, "--out", str(folder)]) == 0
        result[variant] = load_examples(folder, SIZE_PX)
    return result


def collator_of(examples: ExampleSet, encoder: Encoder) -> Collator:
    return Collator(examples, encode_all(examples, encoder, 1024), encoder.processor)


@pytest.mark.parametrize("variant", ["main", "at", "nr"])
def test_what_carries_loss_is_what_was_read_and_found_right(
    sets: dict[str, ExampleSet], encoder: Encoder, variant: str
) -> None:
    examples = sets[variant]
    assert set(examples.kinds) == ({"actions"} if variant == "nr" else set(KINDS))
    golden = (GOLDEN / f"loss_{variant}.txt").read_text(encoding="utf-8")
    assert dump(examples, collator_of(examples, encoder), encoder, 1) == golden


def test_loss_is_on_the_answer_and_its_end_of_turn_and_never_on_a_picture(
    sets: dict[str, ExampleSet], encoder: Encoder
) -> None:
    image_token = encoder.tokenizer.convert_tokens_to_ids("<image_soft_token>")
    for examples in sets.values():
        batch = collator_of(examples, encoder)([{"example": index} for index in range(len(examples))])
        ids, labels = batch["input_ids"], batch["labels"]
        for row, completion in enumerate(examples.completions):
            carried = labels[row] != -100
            assert np.array_equal(labels[row][carried], ids[row][carried])
            text = encoder.tokenizer.decode(ids[row][carried].tolist(), skip_special_tokens=False)
            assert text == completion.strip() + "<end_of_turn>"
            assert (ids[row] == image_token).sum() == 16 * len(examples.images[row])
        assert (labels[ids == image_token] == -100).all()
        assert np.array_equal(batch["token_type_ids"] == 1, ids == image_token)
        assert (labels[batch["attention_mask"] == 0] == -100).all()


def test_an_answer_with_an_image_token_is_refused(encoder: Encoder) -> None:
    with pytest.raises(DataError, match="image token"):
        encoder.encode("what is this?", "a <image_soft_token>", 1)


def test_examples_over_1024_tokens_stop_the_run_with_their_keys(sets: dict[str, ExampleSet], encoder: Encoder) -> None:
    short = sets["nr"]
    long = ExampleSet(
        short.pixels,
        [*short.images, *[[0]] * 7],
        [*short.prompts, *["which way?"] * 7],
        [*short.completions, *["left, " * (1024 + number) for number in range(7)]],
        [*short.kinds, *["direction"] * 7],
        [*short.episode_keys, *[f"bridge/{number}" for number in range(7)]],
    )
    expected = r"7 of \d+ examples exceed 1024 tokens; the longest: direction of bridge/6 \("
    with pytest.raises(DataError, match=expected) as found:
        encode_all(long, encoder, 1024)
    assert [f"bridge/{number} " in str(found.value) for number in range(7)] == [False] * 2 + [True] * 5


def test_tokens_and_pixels_are_those_of_the_processor(sets: dict[str, ExampleSet], encoder: Encoder) -> None:
    examples = sets["main"]
    collator = collator_of(examples, encoder)
    check_parity(examples, collator, encoder)
    darker = Collator(examples, encode_all(examples, encoder, 1024), encoder.processor)
    darker._bias = darker._bias - 0.01
    with pytest.raises(DataError, match="pixel values"):
        check_parity(examples, darker, encoder)
    causal = collator_of(examples, encoder)
    causal._image_token = encoder.processor.image_token_id  # <start_of_image>, whatever its name says
    with pytest.raises(DataError, match="attention differs"):
        check_parity(examples, causal, encoder)
