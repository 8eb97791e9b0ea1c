"""Training and serving give the model the same prompt and the same pixels for the same 640x480 frame."""

import numpy as np
import pytest
from transformers import AutoProcessor

from vlm2vla_schema import prompts
from vlm2vla_schema.images import decode_to_square, encode_jpeg
from vlm2vla_server.engines.base import Turn
from vlm2vla_server.engines.processors import apply_template
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


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("base")
    write_random_base(folder)
    return Encoder(AutoProcessor.from_pretrained(folder), 112)


@pytest.mark.parametrize("name", PROMPTS)
def test_same_prompt_and_same_pixels(encoder: Encoder, name: str) -> None:
    prompt, count = PROMPTS[name]
    size = int(encoder.processor.image_processor.size["height"])
    frames = [np.random.default_rng(seed).integers(0, 256, (480, 640, 3)).astype(np.uint8) for seed in range(count)]
    sent = [encode_jpeg(frame) for frame in frames]

    # As the server does: the client's JPEG to the card's square, the model's own template and processor.
    turn = Turn("user", (*[None] * count, prompt))
    pictures = [decode_to_square(data, size) for data in sent]
    options = {"return_dict": True, "return_tensors": "np", "processor_kwargs": {"do_pan_and_scan": False}}
    served = apply_template(encoder.processor, pictures, (turn,), tokenize=True, **options)
    text = apply_template(encoder.processor, pictures, (turn,), tokenize=False)

    # As `curate` and `sft` do: the recorded JPEG to a PNG of the square, to pixels, to a batch.
    pixels = np.stack([loaded_image(prepared_image(data, size), size) for data in sent])
    examples = ExampleSet(pixels, [list(range(count))], [prompt], ["yes"], ["verify"], ["fake/0"])
    batch = Collator(examples, [encoder.encode(prompt, "yes", count)], encoder.processor)([{"example": 0}])
    asked = batch["input_ids"][0][batch["labels"][0] == -100]

    assert encoder.prompt_text(prompt, count) == text
    assert np.array_equal(pixels, np.stack(pictures))
    assert asked.tolist() == np.asarray(served["input_ids"])[0].tolist()
    assert batch["token_type_ids"][0][: len(asked)].tolist() == np.asarray(served["token_type_ids"])[0].tolist()
    assert np.allclose(batch["pixel_values"], served["pixel_values"], atol=1e-5)
