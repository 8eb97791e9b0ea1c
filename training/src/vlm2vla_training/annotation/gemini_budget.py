"""What Gemini's annotations cost: Google's published rules for counting tokens, a price table, a limit in dollars."""

from __future__ import annotations

import math
import threading
import tomllib
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from vlm2vla_schema.gemini import Price
from vlm2vla_training.errors import TrainingError, UsageError

# A picture of at most 384 px a side is one tile, a larger one is cut into tiles; a tile counts 258 tokens.
TILE_TOKENS = 258
_SMALL_PX = 384
_TILE_PX = (256, 768)
# A log is mostly digits and brackets, which are tokens of their own; measured figures replace this after the first run.
EXPECTED_CHARS_A_TOKEN = 2.0
# Of an answer: B.1's example has six steps of about 120 tokens; a copied row is about 24; thoughts vary most.
EXPECTED_STEPS, TOKENS_A_STEP, TOKENS_A_COPIED_ROW, EXPECTED_THOUGHTS = 6, 120, 24, 1500


class _Listed(Price):
    """A row of the price table: what Batch mode costs stands beside what everybody pays."""

    batch_input_usd: float | None = Field(default=None, ge=0)
    batch_output_usd: float | None = Field(default=None, ge=0)


_TABLE = TypeAdapter(dict[str, _Listed])


class BudgetError(TrainingError):
    """The next request could cost more than is left of --max-usd."""


def read_price(path: Path, model: str, batch: bool = False) -> Price:
    """Read the price of `model` from a TOML file with one table a model: input_usd and output_usd a million tokens, for
    Batch mode batch_input_usd and batch_output_usd.

    Raises:
        UsageError: the file cannot be read, or has no such price for the model.
    """
    try:
        table = _TABLE.validate_python(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise UsageError(f'{path} is not a price table (["{model}"], input_usd, output_usd): {error}') from error
    if model not in table:
        raise UsageError(f"{path} has no price for {model}; it has {', '.join(sorted(table)) or 'none'}")
    listed = table[model]
    if not batch:
        return Price(input_usd=listed.input_usd, output_usd=listed.output_usd)
    if listed.batch_input_usd is None or listed.batch_output_usd is None:
        raise UsageError(f"{path}: --batch needs batch_input_usd and batch_output_usd for {model}")
    return Price(input_usd=listed.batch_input_usd, output_usd=listed.batch_output_usd)


def image_tokens(width: int, height: int) -> int:
    """Tokens that a picture counts as; width and height in pixels."""
    if max(width, height) <= _SMALL_PX:
        return TILE_TOKENS
    tile = min(max(math.floor(min(width, height) / 1.5), _TILE_PX[0]), _TILE_PX[1])
    return math.ceil(width / tile) * math.ceil(height / tile) * TILE_TOKENS


def expected_output_tokens(version: str, rows: int) -> int:
    """Tokens of an answer about an episode of `rows` rows, thoughts included, before anything has been measured."""
    copied = TOKENS_A_COPIED_ROW * rows if version == "b1-paper" else 0
    return EXPECTED_STEPS * TOKENS_A_STEP + EXPECTED_THOUGHTS + copied


def dollars(prompt_tokens: float, output_tokens: float, price: Price) -> float:
    """US dollars for this many tokens; thoughts are output."""
    return (prompt_tokens * price.input_usd + output_tokens * price.output_usd) / 1e6


def limit_reached(max_usd: float, spent_usd: float, bound_usd: float) -> BudgetError:
    """Say that a request of at most `bound_usd` does not fit any more."""
    left = max(max_usd - spent_usd, 0.0)
    return BudgetError(
        f"--max-usd {max_usd:g}: {left:.4f} USD are left and the next request could cost {bound_usd:.4f}; the same "
        "command with a higher limit goes on"
    )


class Budget:
    """Lets requests go while even the dearest outcome of all that are under way stays within the limit."""

    def __init__(self, max_usd: float, spent_usd: float) -> None:
        """Start with what earlier runs spent at the most."""
        self._max_usd = max_usd
        self._spent_usd = spent_usd
        self._reserved: list[float] = []
        self._changed = threading.Condition()

    def reserve(self, bound_usd: float) -> None:
        """Set the most that a request can cost aside; blocks while requests under way may still prove cheaper.

        Raises:
            BudgetError: it does not fit, and nothing is under way.
        """
        with self._changed:
            while self._spent_usd + sum(self._reserved) + bound_usd > self._max_usd:
                if not self._reserved:
                    raise limit_reached(self._max_usd, self._spent_usd, bound_usd)
                self._changed.wait()
            self._reserved.append(bound_usd)

    def settle(self, bound_usd: float, usd: float) -> None:
        """Replace what was set aside by what the request really cost."""
        with self._changed:
            self._reserved.remove(bound_usd)
            self._spent_usd += usd
            self._changed.notify_all()
