"""The physical limit of an inference cycle: nothing that does the same arithmetic on the same machine can be faster.

Each part takes at least its operations over the machine's peak, and at least its bytes over the memory's bandwidth.
Decoding one token at a time reads every weight of the decoder and the cache once a token, so bandwidth decides it
(speculative decoding gets several tokens from one reading and may go below). The adapter's own weights, activations,
sampling and everything a processor does are left out: a floor, not a forecast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vlm2vla_client.bench.shape import ModelShape
from vlm2vla_client.errors import ConfigurationError

PAPER_CYCLE_S = 6.1
"""Table 3 (D.6): median of one cycle, plan and rows, on one A100."""
CACHE_NUMBER_BYTES = 2.0
VISION_NUMBER_BYTES = 2.0


@dataclass(frozen=True)
class Device:
    """A machine by its makers' figures: memory bandwidth and dense bfloat16 peak. ``weight_bytes`` of one number."""

    name: str
    bandwidth_gb_s: float
    tflops: float
    weight_bytes: float = 2.0

    def __post_init__(self) -> None:
        """Raises ConfigurationError on figures that no machine has."""
        if not (self.bandwidth_gb_s > 0.0 and self.tflops > 0.0 and self.weight_bytes > 0.0):
            raise ConfigurationError("a machine's bandwidth (GB/s), peak (TFLOPS) and bits a weight must be above 0")

    def ms(self, flops: float, read_bytes: float) -> float:
        """The longer of computing and reading."""
        return 1000.0 * max(flops / (self.tflops * 1e12), read_bytes / (self.bandwidth_gb_s * 1e9))


DEVICES = {
    "a100-40gb": Device("a100-40gb", 1555.0, 312.0),
    "a100": Device("a100", 2039.0, 312.0),
    "h100": Device("h100", 3350.0, 989.0),
    "h200": Device("h200", 4800.0, 989.0),
    "rtx4090": Device("rtx4090", 1008.0, 165.0),
}
"""NVIDIA's data sheets: SXM boards (a100: 80 GB), bfloat16 without sparsity."""
A100 = DEVICES["a100"]


@dataclass(frozen=True)
class Generation:
    """One text: tokens of the prompt, how many of them a prefix cache holds already, tokens generated (the end of turn
    included), and whether the picture has to go through the tower."""

    prompt: int
    generated: int
    cached: int = 0
    pictures: int = 1


PAPER_CYCLE = (Generation(350, 60), Generation(480, 100, cached=262, pictures=0))
"""A cycle of Gemma-3-12B as we count it: D.4's prompts with one picture (about 260 tokens), 60 tokens of plan, 100 of
rows; the second stage finds the picture in the prefix cache. The paper states no token counts."""


@dataclass(frozen=True)
class Floor:
    """Shortest possible milliseconds of a cycle's parts, for ``robots`` that ask at the same moment."""

    device: str
    robots: int
    vision_ms: float
    prefill_ms: float
    decode_ms: float
    steps: int

    @property
    def cycle_ms(self) -> float:
        """All parts, one after another."""
        return self.vision_ms + self.prefill_ms + self.decode_ms

    @property
    def ms_per_token(self) -> float:
        """One decoding step; 0 when nothing is decoded."""
        return self.decode_ms / self.steps if self.steps else 0.0


def floor_of(
    shape: ModelShape, device: Device, work: tuple[Generation, ...] = PAPER_CYCLE, robots: int = 1
) -> Floor:
    """The floor of some generations, one after another, each for ``robots`` at once (weights are read once for all)."""
    vision = prefill = decode = 0.0
    steps = 0
    for part in work:
        vision += _vision_ms(shape, device, part.pictures * robots)
        prefill += _prefill_ms(shape, device, part, robots)
        for step in range(1, part.generated):  # the first token comes with the prefill
            decode += _step_ms(shape, device, part.prompt + step, robots)
            steps += 1
    return Floor(device.name, robots, vision, prefill, decode, steps)


def a100_equivalents(shape: ModelShape, device: Device, work: tuple[Generation, ...] = PAPER_CYCLE) -> float:
    """How many A100s (bfloat16) a machine is worth for this work: the ratio of the floors."""
    return floor_of(shape, A100, work).cycle_ms / floor_of(shape, device, work).cycle_ms


def with_bits(device: Device, bits: float) -> Device:
    """The same machine with the decoder's weights in ``bits`` a number (16, 8 or 4)."""
    return replace(device, weight_bytes=bits / 8.0)


def _vision_ms(shape: ModelShape, device: Device, pictures: int) -> float:
    if pictures == 0:
        return 0.0
    tower = shape.tower
    matrices = tower.layers * tower.layer_matrices + tower.embedding
    attention = 4.0 * tower.patches * tower.patches * tower.hidden * tower.layers
    projection = 2.0 * tower.image_tokens * tower.hidden * shape.decoder.hidden
    flops = pictures * (2.0 * tower.patches * matrices + attention + projection)
    return device.ms(flops, VISION_NUMBER_BYTES * (tower.parameters + shape.projection))


def _prefill_ms(shape: ModelShape, device: Device, part: Generation, robots: int) -> float:
    decoder, new = shape.decoder, part.prompt - part.cached
    attention = sum(decoder.attention_flops(place + 1) for place in range(part.cached, part.prompt))
    flops = robots * (2.0 * new * decoder.layers * decoder.layer_matrices + attention + 2.0 * decoder.head)
    return device.ms(flops, device.weight_bytes * decoder.read_per_token)


def _step_ms(shape: ModelShape, device: Device, context: int, robots: int) -> float:
    decoder = shape.decoder
    read = device.weight_bytes * decoder.read_per_token + robots * decoder.kv_bytes(context, CACHE_NUMBER_BYTES)
    multiplied = 2.0 * (decoder.layers * decoder.layer_matrices + decoder.head)
    return device.ms(robots * (multiplied + decoder.attention_flops(context)), read)
