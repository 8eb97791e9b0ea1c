"""Progress on stderr and the closing summary line of every command."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vlm2vla_training.jsonio import write_json

T = TypeVar("T")
_INTERVAL_S = 5.0


def track(items: Iterable[T], total: int, label: str, note: Callable[[], str] | None = None) -> Iterator[T]:
    """Yield `items` and say every few seconds how many of `total` are done, at what rate and how long it will take;
    `note` adds what else there is to tell.
    """
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _INTERVAL_S or done == total:
            last = now
            rate = done / max(now - started, 1e-9)
            left_s = max(total - done, 0) / rate
            line = f"{label}: {done}/{total}, {rate:.1f}/s, {left_s:.0f} s left"
            print(line + (f", {note()}" if note else ""), file=sys.stderr, flush=True)


def finish(command: str, folder: Path, summary: dict[str, Any], started_s: float, line: str) -> None:
    """Write summary.json into `folder` and print the summary line.

    Args:
        command: name of the subcommand.
        folder: where summary.json goes.
        summary: JSON values.
        started_s: `time.monotonic()` at the start.
        line: what happened, in words.
    """
    seconds = round(time.monotonic() - started_s, 1)
    write_json(folder / "summary.json", {"command": command, "seconds": seconds, **summary})
    print(f"{command}: {line} in {seconds} s -> {folder}", flush=True)
