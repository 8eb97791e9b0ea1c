"""How sure a model is of a verdict: its probability of "done" against "not done" where D.5's two answers part.

A model says "done" from one half on. A service that pays more for a false "done" than for one cycle too many asks for
more; `vlm2vla-train verify-report` tells what a threshold gives and costs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.limits import MAX_REASONING_CHARS
from vlm2vla_schema.parsing import format_verdict
from vlm2vla_schema.types import Verdict
from vlm2vla_server.engines.base import Engine, ScoreRequest
from vlm2vla_server.errors import DeadlineExceeded

EVEN = 0.5
"""The threshold of a model that is asked for no more than its own word."""


async def probability_done(
    engine: Engine, images: Sequence[NDArray[np.uint8]], prompt: str, adapter: str | None, deadline_s: float
) -> float:
    """The probability of "true" among the two values of D.5's field `success`, 0 to 1.

    images: RGB squares of the model's size, before and after. deadline_s: on the monotonic clock, in seconds.
    Raises DeadlineExceeded, ScoreUnavailable, GenerationError.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
            done, not_done = [
                await _log_probability(engine, ScoreRequest(tuple(images), prompt, _opening(success), adapter))
                for success in (True, False)
            ]
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed while the verdict's probability was measured") from None
    return 0.5 * (1.0 + math.tanh((done - not_done) / 2.0))


def certain(verdict: Verdict, probability: float, threshold: float) -> Verdict:
    """The verdict "done" as it is answered when `threshold` is asked for: below it "not done", and the reasoning says
    why it is another than the model's."""
    if probability >= threshold:
        return verdict
    why = f"Not sure enough ({probability:.2f}, asked for {threshold:.2f}): {verdict.reasoning}"
    return Verdict(False, "Low", why[:MAX_REASONING_CHARS])


def _opening(success: bool) -> str:
    """The verdict up to its first value: what differs between the two answers, and nothing after it."""
    return format_verdict(Verdict(success, "High", "-")).split(",", maxsplit=1)[0]


async def _log_probability(engine: Engine, request: ScoreRequest) -> float:
    """ln p of the text alone; the engine's last value is the end of turn, which does not follow here."""
    return math.fsum((await engine.score(request))[:-1])
