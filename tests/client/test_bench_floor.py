"""The floor calculator against numbers worked out by hand, and against the tensors of a model that is here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vlm2vla_client.bench.floor import DEVICES, Device, Generation, a100_equivalents, floor_of, with_bits
from vlm2vla_client.bench.shape import ModelShape, read_shape
from vlm2vla_client.errors import ConfigurationError

TWIN = Path(__file__).resolve().parents[2] / "models" / "twin" / "base"


@pytest.fixture(scope="module")
def gemma() -> ModelShape:
    return read_shape("gemma-3-12b")


def test_parameters_of_gemma_3_12b(gemma: ModelShape) -> None:
    decoder, tower = gemma.decoder, gemma.tower
    # q and o: 3840 x 4096 each; k and v: 3840 x 2048 each; gate, up and down: 3840 x 15360 each.
    assert decoder.layer_matrices == 2 * 15_728_640 + 2 * 7_864_320 + 3 * 58_982_400 == 224_133_120
    assert decoder.layer_norms == 4 * 3840 + 2 * 256 == 15_872
    assert decoder.head == 262_208 * 3840 == 1_006_878_720
    assert decoder.parameters == 48 * (224_133_120 + 15_872) + 3840 + 1_006_878_720 == 11_766_034_176
    assert tower.patches == 64 * 64
    assert tower.parameters == 27 * 15_239_504 + 678_528 + 4096 * 1152 + 2 * 1152 == 416_866_032
    assert gemma.projection == 1152 * 3840 + 1152 == 4_424_832
    assert gemma.parameters == 12_187_325_040


def test_the_parameters_of_the_committed_model_are_counted_to_the_last() -> None:
    with (TWIN / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    # The tower's pooling head is in the file and never run: Gemma takes the patches.
    counted = [
        math.prod(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and not name.startswith("vision_tower.vision_model.head.")
    ]
    assert len(counted) < len(header) - 1
    for source in (TWIN, TWIN / "config.json"):
        shape = read_shape(str(source))
        assert (shape.parameters, shape.name) == (sum(counted), "base")


def test_sliding_layers_keep_only_their_window(gemma: ModelShape) -> None:
    decoder = gemma.decoder
    assert (decoder.global_layers, decoder.layers - decoder.global_layers) == (8, 40)
    # A layer: keys and values, 8 heads of 256 numbers of 2 bytes = 8192 bytes.
    assert decoder.kv_bytes(1, 2.0) == 48 * 8192 == 393_216
    assert decoder.kv_bytes(1024, 2.0) == 1024 * 393_216
    assert decoder.kv_bytes(1025, 2.0) - decoder.kv_bytes(1024, 2.0) == 8 * 8192
    assert decoder.kv_bytes(3000, 2.0) == 8192 * (8 * 3000 + 40 * 1024)
    # Scores and weighted sum: 2 x 2 x 16 heads x 256 operations a key.
    assert decoder.attention_flops(10) == 16_384 * 480
    assert decoder.attention_flops(2000) == 16_384 * (8 * 2000 + 40 * 1024)


def test_decoding_is_bytes_over_bandwidth(gemma: ModelShape) -> None:
    machine = Device("round", bandwidth_gb_s=1000.0, tflops=1000.0)
    floor = floor_of(gemma, machine, (Generation(prompt=100, generated=2, pictures=0),))
    # One step at a context of 101 tokens: 11,766,034,176 weights of 2 bytes and 101 x 393,216 bytes of cache.
    assert floor.steps == 1
    assert floor.decode_ms == pytest.approx((23_532_068_352 + 39_714_816) / 1e12 * 1000, rel=1e-12)
    assert floor.ms_per_token == floor.decode_ms and floor.vision_ms == 0.0
    eight = floor_of(gemma, machine, (Generation(100, 2, pictures=0),), robots=8)
    assert eight.decode_ms == pytest.approx((23_532_068_352 + 8 * 39_714_816) / 1e12 * 1000, rel=1e-12)


def test_few_bits_shorten_the_reading_of_weights_only(gemma: ModelShape) -> None:
    machine = with_bits(Device("round", 1000.0, 1000.0), 8.0)
    floor = floor_of(gemma, machine, (Generation(100, 2, pictures=0),))
    assert floor.decode_ms == pytest.approx((11_766_034_176 + 39_714_816) / 1e12 * 1000, rel=1e-12)


def test_prefill_and_vision_are_operations_over_peak_when_that_takes_longer(gemma: ModelShape) -> None:
    slow = Device("slow sums", bandwidth_gb_s=1e6, tflops=1.0)
    floor = floor_of(gemma, slow, (Generation(prompt=3, generated=1),))
    matrices = 2 * 3 * 48 * 224_133_120
    attention = 16_384 * 48 * (1 + 2 + 3)
    assert floor.prefill_ms == pytest.approx((matrices + attention + 2 * 1_006_878_720) / 1e12 * 1000, rel=1e-12)
    # 27 layers of 4 x 1152^2 + 2 x 1152 x 4304, the patches' embedding, attention of 4096 patches, the projection.
    tower = 2 * 4096 * (27 * 15_224_832 + 677_376) + 4 * 4096**2 * 1152 * 27 + 2 * 256 * 1152 * 3840
    assert floor.vision_ms == pytest.approx(tower / 1e12 * 1000, rel=1e-12)
    assert (floor.steps, floor.ms_per_token) == (0, 0.0)
    cached = floor_of(gemma, slow, (Generation(prompt=3, generated=1, cached=2, pictures=0),))
    fewer = 2 * 48 * 224_133_120 + 16_384 * 48 * 3 + 2 * 1_006_878_720
    assert cached.prefill_ms == pytest.approx(fewer / 1e12 * 1000, rel=1e-12)


def test_a_short_prompt_on_a_fast_machine_still_reads_all_weights(gemma: ModelShape) -> None:
    machine = Device("fast sums", bandwidth_gb_s=1000.0, tflops=1e6)
    floor = floor_of(gemma, machine, (Generation(3, 1, pictures=0),))
    assert floor.prefill_ms == pytest.approx(23.532068352, rel=1e-12)


def test_machines_in_a100s(gemma: ModelShape) -> None:
    assert a100_equivalents(gemma, DEVICES["a100"]) == 1.0
    long = (Generation(100, 1000, pictures=0),)
    # Decoding alone: the ratio of the bandwidths.
    assert a100_equivalents(gemma, DEVICES["h200"], long) == pytest.approx(4800 / 2039, rel=1e-3)
    cycle_ms = floor_of(gemma, DEVICES["a100"]).cycle_ms
    # The paper's cycle of 6.1 s on an A100 is a few times the floor of what we assume it generates, never below it.
    assert 1.0 < 6100 / cycle_ms < 6.0


def without(config: dict[str, Any], part: str, key: str) -> dict[str, Any]:
    return {**config, part: {name: value for name, value in config[part].items() if name != key}}


def test_what_is_no_shape_is_refused_with_the_field_that_is_missing(tmp_path: Path) -> None:
    config = json.loads((TWIN / "config.json").read_text())
    path = tmp_path / "config.json"
    for broken, words in (
        (without(config, "text_config", "head_dim"), "head_dim"),
        (without(config, "vision_config", "patch_size"), "patch_size"),
        ({**config, "mm_tokens_per_image": 0}, "mm_tokens_per_image"),
        ({"model_type": "llama"}, "text_config"),
        ([], "Gemma-3"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(ConfigurationError, match=words):
            read_shape(str(path))
    path.write_text("{")
    with pytest.raises(ConfigurationError, match="Gemma-3"):
        read_shape(str(path))
    with pytest.raises(ConfigurationError, match="gemma-3-12b"):
        read_shape(str(tmp_path / "missing"))
    with pytest.raises(ConfigurationError, match="above 0"):
        Device("none", 0.0, 1.0)
