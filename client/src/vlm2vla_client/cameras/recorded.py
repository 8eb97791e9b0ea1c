"""Recordings played at their own pace, as if they happened now: what video files and folders of pictures share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.cameras.capture import Picture, RecordingEndedError
from vlm2vla_client.clock import Clock


class RecordedSource:
    """A source that shows one picture every ``period_s``, and then ends or begins anew.

    Args:
        name: what error texts call it.
        pictures: called for every play; gives the pictures in order, each uint8 [H, W, 3], RGB, with memory of its own.
        period_s: asked once at every opening.
    """

    def __init__(
        self,
        name: str,
        pictures: Callable[[], Iterator[NDArray[np.uint8]]],
        period_s: Callable[[], float],
        clock: Clock,
        *,
        repeat: bool,
    ) -> None:
        self._name, self._pictures, self._period_of, self._clock = name, pictures, period_s, clock
        self._repeat = repeat
        self._playing: Iterator[NDArray[np.uint8]] = iter(())
        self._period_s = self._due_s = 0.0
        self._number = -1

    @property
    def name(self) -> str:
        """The file or folder."""
        return self._name

    def open(self) -> None:
        """Begins with the first picture."""
        self._period_s = self._period_of()
        self._playing = self._pictures()
        self._due_s, self._number = time.monotonic(), -1

    def read(self, timeout_s: float) -> Picture | None:
        """The next picture when it is due. Raises RecordingEndedError after the last one, unless it is repeated."""
        wait_s = self._due_s - time.monotonic()
        time.sleep(min(max(wait_s, 0.0), timeout_s))
        if wait_s > timeout_s:
            return None
        image = next(self._playing, None)
        if image is None and self._repeat and self._number >= 0:
            self._playing = self._pictures()
            image = next(self._playing, None)
        if image is None:
            raise RecordingEndedError(f"the recording has ended after {self._number + 1} pictures")
        # A computer that was too slow for the pace plays on from here; it does not hurry to catch up.
        self._due_s = max(self._due_s + self._period_s, time.monotonic())
        self._number += 1
        return Picture(image, self._clock.now_s(), self._number)

    def close(self) -> None:
        """Lets go of the file."""
        self._playing = iter(())
