"""Training and serving give the model the same prompt and the same pixels for the same 640x480 frame."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from qwen_model import IMAGE_SIZE, write_qwen

from vlm2vla_schema import prompts
from vlm2vla_schema.images import decode_image, encode_jpeg, to_model_square
from vlm2vla_server.engines import processors
from vlm2vla_server.engines.base import Turn
from vlm2vla_training import bases
from vlm2vla_training.curation.dataset import ExampleSet, prepared_image
from vlm2vla_training.curation.dataset import _square as loaded_image
from vlm2vla_training.sft_data import Collator, Encoder
from vlm2vla_training.twin_model import write_random_base

PROMPTS = {
    "subtasks": (prompts.subtasks_prompt("pick up the carrot"), 1),
    "motion_plan": (prompts.motion_plan_prompt("Grasp the carrot"), 1),
    "actions": (prompts.actions_prompt("Grasp the carrot", "Move down slightly."), 1),
    "nr": (prompts.actions_prompt("pick up the carrot", None), 1),
    "verify": (prompts.verify_prompt("Grasp the carrot", "Lift the carrot"), 2),
    "verify the last": (prompts.verify_prompt("Lift the carrot", None), 2),
    "template trims": ("  what is this?\n", 1),
}


@dataclass(frozen=True)
class Sides:
    """One base as both sides load it: the encoder of `sft`, the processor of the engines, the card's picture size."""

    encoder: Encoder
    processor: Any
    size: int


@pytest.fixture(scope="module", params=["gemma3", "qwen3_vl", "qwen3_vl that may think", "qwen3_vl, resized"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    folder, size = tmp_path_factory.mktemp("base"), 112
    if request.param == "gemma3":
        write_random_base(folder)
    else:
        size = 200 if "resized" in request.param else IMAGE_SIZE
        write_qwen(folder, thinking="optional" if "think" in request.param else "never")
    return Sides(Encoder(bases.load_processor(folder), size), processors.load_processor(folder), size)


@pytest.mark.parametrize("name", PROMPTS)
def test_same_prompt_and_same_pixels(sides: Sides, name: str) -> None:
    prompt, count = PROMPTS[name]
    encoder, processor, size = sides.encoder, sides.processor, sides.size
    frames = [np.random.default_rng(seed).integers(0, 256, (480, 640, 3)).astype(np.uint8) for seed in range(count)]
    sent = [encode_jpeg(frame) for frame in frames]

    # As the server does: the client's JPEG to the card's square, the model's own template and processor.
    turn = Turn("user", (*[None] * count, prompt))
    pictures = [to_model_square(decode_image(data), size) for data in sent]
    options = {"return_dict": True, "return_tensors": "np", "processor_kwargs": processors.picture_options(processor)}
    served = dict(processors.apply_template(processor, pictures, (turn,), tokenize=True, **options))
    text = processors.apply_template(processor, pictures, (turn,), tokenize=False)

    # As `curate` and `sft` do: the recorded JPEG to a PNG of the square, to pixels, to a batch.
    pixels = np.stack([loaded_image(prepared_image(data, size), size) for data in sent])
    examples = ExampleSet(pixels, [list(range(count))], [prompt], ["yes"], ["verify"], ["fake/0"])
    batch = Collator(examples, [encoder.encode(prompt, "yes", count)], encoder.processor)([{"example": 0}])
    asked = batch["labels"][0] == -100

    assert encoder.prompt_text(prompt, count) == text
    assert np.array_equal(pixels, np.stack(pictures))
    assert batch.pop("labels").shape == batch["input_ids"].shape and batch.keys() == served.keys()
    for part, array in batch.items():
        if array.shape == (1, len(asked)):  # one value a token, of the answer too
            assert array[0][asked].tolist() == np.asarray(served[part])[0].tolist(), part
        else:
            assert array.shape == served[part].shape and np.allclose(array, served[part], atol=1e-5), part
