"""One action written in four ways, as token ids (Fig. 3; sections 2 and 4.1; appendix B.3).

- text: the paper's own, `[[-0.002, -0.004, -0.023, 1.0]]`;
- tokens: the same with each digit as a reserved token (Table 2, VLM2VLA-AT);
- bins: each number cut into equal bins between the data's 1st and 99th percentile and written as the bin's number in
  words of text, as RT-2 does where numbers are single tokens;
- least_likely: the same bins, each as one of the vocabulary's least likely tokens, as RT-2 and OpenVLA do.

The end of turn belongs to no action and is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.digits import encode_digits
from vlm2vla_schema.parsing import format_actions
from vlm2vla_training.curation.examples import DIGIT_MAP
from vlm2vla_training.errors import DataError, UsageError

Rows = Sequence[Sequence[float]]
NAMES = ("text", "tokens", "bins", "least_likely")
LABELS = {
    "text": "actions as text",
    "tokens": "action tokens (Table 2)",
    "bins": "bins as numbers",
    "least_likely": "bins as least likely tokens",
}


@dataclass(frozen=True)
class Bins:
    """Uniform bins an axis.

    Attributes:
        low, high: [4], ends of the range: metres for x, y, z, then the gripper's 0 and 1.
        count: bins an axis.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    count: int

    @classmethod
    def of(cls, rows: NDArray[np.float64], count: int) -> Bins:
        """Take the 1st and 99th percentile of [N, 4] rows; the gripper's range is 0 to 1."""
        low, high = np.quantile(rows, [0.01, 0.99], axis=0)
        low[3], high[3] = 0.0, 1.0
        return cls(tuple(map(float, low)), tuple(map(float, high)), count)

    def numbers(self, rows: Rows) -> list[int]:
        """Bins of all values, row after row, 0 to count - 1; values beyond the range fall into the outermost bin."""
        low, span = np.asarray(self.low), np.maximum(np.asarray(self.high) - np.asarray(self.low), 1e-9)
        places = np.floor((np.asarray(rows, dtype=np.float64) - low) / span * self.count)
        return [int(value) for value in np.clip(places, 0, self.count - 1).reshape(-1)]


class Representations:
    """Writes rows in each of the four ways with one tokenizer."""

    def __init__(self, tokenizer: Any, bins: Bins, codebook: Sequence[int]) -> None:
        """Check that Table 2's tokens are tokens; `codebook` holds the token id of each bin.

        Raises:
            UsageError: there are fewer ids than bins, or the tokenizer splits one of Table 2's tokens.
        """
        if len(codebook) != bins.count:
            raise UsageError(f"{len(codebook)} tokens for {bins.count} bins; expected one each")
        split = [text for text in DIGIT_MAP.values() if len(_ids(tokenizer, text)) != 1]
        if split:
            raise UsageError(f"the tokenizer has no single token {split[0]!r}: it is no Gemma 3 tokenizer (Table 2)")
        self._tokenizer, self._bins, self._codebook = tokenizer, bins, list(codebook)

    def of(self, rows: Rows) -> dict[str, NDArray[np.int32]]:
        """Token ids of one action in each representation."""
        text = format_actions(rows)
        numbers = self._bins.numbers(rows)
        return {
            "text": _ids(self._tokenizer, text),
            "tokens": _ids(self._tokenizer, encode_digits(text, DIGIT_MAP)),
            "bins": _ids(self._tokenizer, " ".join(map(str, numbers))),
            "least_likely": np.asarray([self._codebook[number] for number in numbers], dtype=np.int32),
        }


def least_likely(mean_probability: NDArray[np.float64], excluded: frozenset[int], count: int) -> list[int]:
    """The `count` ids [V] of the lowest mean probability, least likely first; ids in `excluded` frame turns.

    Raises:
        DataError: the vocabulary is too small.
    """
    order = [int(token) for token in np.argsort(mean_probability, kind="stable") if int(token) not in excluded]
    if len(order) < count:
        raise DataError(f"the vocabulary has {len(order)} tokens beside its control tokens; {count} bins need as many")
    return order[:count]


def _ids(tokenizer: Any, text: str) -> NDArray[np.int32]:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
