"""The programs of bench/ as modules, for the tests of what they count and how they judge it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1] / "bench"


@contextmanager
def program(name: str) -> Iterator[Any]:
    """bench/NAME.py, imported; while the block lasts it finds what it imports from beside it."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))
