"""`sft` and `verify-report` on pairs that also show what changed: an experiment with the verifier of the twin.

    python bench/difference_image.py first sft           --kinds verify ...     # what `vlm2vla-train sft` takes
    python bench/difference_image.py first verify-report ...

The difference is after minus before around mid grey, half as strong so that nothing is clipped: uint8
128 + (after - before) / 2. `first` puts it in the place of the picture before, which after and difference still
determine; `third` puts it behind the two. D.5's words stay as they are, byte for byte; they speak of two images, and
a third costs the tokens of one more picture. Nothing serves such prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training import sft
from vlm2vla_training.analysis import model, verify
from vlm2vla_training.cli import main
from vlm2vla_training.curation.dataset import ExampleSet
from vlm2vla_training.sft_data import Encoder, Tokens

HOW = ("first", "third")


def difference(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What changed between two pictures of one shape; mid grey where nothing did."""
    changed = (128 + (after.astype(np.int16) - before) // 2).clip(0, 255)
    return changed.astype(np.uint8)


class Pixels:
    """Pictures and, numbered behind them, differences, which are made when they are asked for."""

    def __init__(self, frames: NDArray[np.uint8]) -> None:
        """frames: uint8 [M, S, S, 3]."""
        self._frames = frames
        self._numbers: dict[tuple[int, int], int] = {}
        self._pairs: list[tuple[int, int]] = []

    def number(self, before: int, after: int) -> int:
        """The number of a difference."""
        if (before, after) not in self._numbers:
            self._numbers[before, after] = len(self)
            self._pairs.append((before, after))
        return self._numbers[before, after]

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array of all of them would have it."""
        return (len(self), *self._frames.shape[1:])

    def __len__(self) -> int:
        """Return the number of pictures, differences included."""
        return len(self._frames) + len(self._pairs)

    def __getitem__(self, wanted: int | list[int]) -> NDArray[np.uint8]:
        """One picture [S, S, 3], or several [N, S, S, 3]."""
        if isinstance(wanted, list):
            return np.stack([self[number] for number in wanted])
        if wanted < len(self._frames):
            picture: NDArray[np.uint8] = self._frames[wanted]
            return picture
        before, after = self._pairs[wanted - len(self._frames)]
        return difference(self._frames[before], self._frames[after])


def with_difference(examples: ExampleSet, how: str) -> ExampleSet:
    """Show the difference too, in every example of two pictures."""
    pixels: Any = Pixels(examples.pixels)
    for images in examples.images:
        before, after = images
        images[:] = [pixels.number(before, after), after] if how == "first" else [*images, pixels.number(*images)]
    examples.pixels = pixels
    return examples


def patched(how: str) -> None:
    """Let both commands see the difference, wherever they make a set of examples or count an example's pictures."""
    merged: Callable[..., ExampleSet] = sft.merged

    class Shown(Encoder):
        def encode(self, prompt: str, completion: str, images: int) -> Tokens:
            return super().encode(prompt, completion, 2 if how == "first" else 3)

    vars(sft).update(merged=lambda sets: with_difference(merged(sets), how), Encoder=Shown)
    vars(verify)["ExampleSet"] = lambda *columns: with_difference(ExampleSet(*columns), how)
    vars(model)["Encoder"] = Shown


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in HOW or sys.argv[2] not in ("sft", "verify-report"):
        sys.exit(f"expected one of {HOW}, then sft or verify-report")
    patched(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
