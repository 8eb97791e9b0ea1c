"""The options of ``vlm2vla-client bench``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm2vla_client.bench.floor import DEVICES, PAPER_CYCLE
from vlm2vla_client.bench.probe import ENDPOINTS
from vlm2vla_client.bench.shape import PUBLISHED

MAX_ROBOTS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``, the server's own apart."""
    add = parser.add_argument
    add("--compare", metavar="URL2", help="a second server, asked by turns with the first in the same run")
    add("--robots", type=_robots, default=(1, 2, 4, 8), metavar="1,2,4,8", help="robots that ask at the same time")
    add("--requests", type=int, default=20, metavar="N", help="requests of each robot to each server (20)")
    add("--endpoint", choices=ENDPOINTS, default="cycle")
    add("--image", type=Path, metavar="FILE", help="a picture (default: the twin's view, which needs its simulator)")
    add("--subtask", default="Move to Carrot", metavar="TEXT")
    add("--task", default="pick up the carrot", metavar="TEXT", help="for --endpoint subtasks")
    add("--out", type=Path, metavar="DIR", help="writes bench.json and bench.svg there")
    add("--json", action="store_true", help="the report as one JSON object on standard output")
    group = parser.add_argument_group("the physical limit, beside the measured times or, without --server, by itself")
    group.add_argument("--floor", metavar="SHAPE", help=f"{', '.join(PUBLISHED)}, or a model's config.json")
    group.add_argument("--device", choices=DEVICES, help="bandwidth and peak by the maker's data sheet")
    group.add_argument("--bandwidth-gb-s", type=float, metavar="B", help="memory bandwidth, 1e9 bytes a second")
    group.add_argument("--tflops", type=float, metavar="T", help="dense bfloat16 peak, 1e12 operations a second")
    group.add_argument("--weight-bits", type=float, default=16.0, metavar="BITS", help="16, 8 or 4 (default 16)")
    group.add_argument("--plan-tokens", type=int, default=PAPER_CYCLE[0].generated, metavar="N")
    group.add_argument("--action-tokens", type=int, default=PAPER_CYCLE[1].generated, metavar="N")


def _robots(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, received {text!r}") from None
    if not all(1 <= count <= MAX_ROBOTS for count in counts):
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_ROBOTS} robots, received {text!r}")
    return counts
