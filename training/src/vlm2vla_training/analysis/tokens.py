"""`tokens`: how long the examples are, in the tokens of a real processor, against the limit of appendix E (1024).

Nothing is trained and no weights are read. Every example is counted; the longest of each kind is also given to the
processor itself, with its pictures, and must come out as long.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlm2vla_schema.images import to_model_square
from vlm2vla_training.analysis.figures import length_figure, save
from vlm2vla_training.bases import curated_size, load_processor, read_base
from vlm2vla_training.curation.dataset import read_examples
from vlm2vla_training.errors import DataError
from vlm2vla_training.progress import finish, track
from vlm2vla_training.sft_data import Encoder

QUANTILES = (0.5, 0.9, 0.99, 1.0)
TABLE_FILE = "tokens.md"


@dataclass(frozen=True)
class Length:
    """One example's tokens: the prompt with its pictures, and the answer with its end of turn."""

    key: str
    prompt_text: str
    images: int
    prompt: int
    completion: int

    @property
    def total(self) -> int:
        """Prompt and answer."""
        return self.prompt + self.completion


def run_tokens(args: argparse.Namespace) -> int:
    """`tokens`: count, draw and say what is over the limit. Quick, so nothing is resumed."""
    started = time.monotonic()
    tables = [
        read_examples(folder, ["images", "prompt", "completion", "kind", "episode_key"]) for folder in args.examples
    ]
    count = sum(len(table) for table in tables)
    if args.dry_run:
        print(f"tokens: would count {count} examples with the processor of {args.base}")
        return 0
    card = read_base(args.base, curated_size(args.examples[0]))
    encoder = Encoder(load_processor(args.base), card.image_size)
    kinds: dict[str, list[Length]] = defaultdict(list)
    for row in track((row for table in tables for row in _rows(table)), count, "tokens"):
        found = encoder.encode(row["prompt"], row["completion"], len(row["images"]))
        length = Length(row["episode_key"], row["prompt"], len(row["images"]), len(found.prompt), len(found.answer))
        kinds[row["kind"]].append(length)
    for lengths in kinds.values():
        compare_with_processor(max(lengths, key=lambda one: one.prompt), encoder, card.image_size)
    summary = {
        "base": card.name,
        "limit": args.max_tokens,
        "examples": count,
        "kinds": {kind: described(kinds[kind], args.max_tokens) for kind in sorted(kinds)},
    }
    over = sum(kind["over_limit"] for kind in summary["kinds"].values())
    args.out.mkdir(parents=True, exist_ok=True)
    text = table_text(summary)
    (args.out / TABLE_FILE).write_text(text, encoding="utf-8")
    save(length_figure({kind: [one.total for one in kinds[kind]] for kind in sorted(kinds)}, args.max_tokens), args.out,
         "tokens")  # fmt: skip
    print(text, end="")
    longest = max(one.total for lengths in kinds.values() for one in lengths)
    line = f"{count} examples, longest {longest} tokens, {over} over {args.max_tokens}"
    finish("tokens", args.out, summary, started, line)
    return 0


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def described(lengths: list[Length], limit: int) -> dict[str, Any]:
    """Quantiles of one kind; a quantile is a length that occurs, the next one up between two."""
    parts = {
        name: [int(value) for value in np.quantile([getattr(one, name) for one in lengths], QUANTILES, method="higher")]
        for name in ("prompt", "completion", "total")
    }
    longest = max(lengths, key=lambda one: one.total)
    over = sum(one.total > limit for one in lengths)
    return {"examples": len(lengths), **parts, "over_limit": over, "longest": longest.key}


def table_text(summary: dict[str, Any]) -> str:
    """The table as Markdown."""
    names = " / ".join("longest" if q == 1.0 else f"{100 * q:g} %" for q in QUANTILES)
    lines = [
        f"Tokens with the processor of {summary['base']}; quantiles {names}; limit {summary['limit']}.",
        "",
        "| kind | examples | prompt | completion | total | over |",
        "|---|---|---|---|---|---|",
    ]
    for kind, one in summary["kinds"].items():
        parts = " | ".join(" / ".join(map(str, one[name])) for name in ("prompt", "completion", "total"))
        lines.append(f"| {kind} | {one['examples']} | {parts} | {one['over_limit']} |")
    return "\n".join(lines) + "\n"


def compare_with_processor(length: Length, encoder: Encoder, size_px: int) -> None:
    """Give the prompt and grey pictures to the processor itself.

    Raises:
        DataError: it makes another number of tokens of them: what is counted here would not be what the model gets.
    """
    grey = to_model_square(np.full((480, 640, 3), 128, dtype=np.uint8), size_px)
    pictures = [Image.fromarray(grey)] * length.images
    found = encoder.processor(
        text=[encoder.prompt_text(length.prompt_text, length.images)], images=[pictures] if pictures else None,
        add_special_tokens=False, return_tensors="np",
    )  # fmt: skip
    if found["input_ids"].shape[1] != length.prompt:
        raise DataError(
            f"{length.key}: the processor makes {found['input_ids'].shape[1]} tokens of a prompt counted as "
            f"{length.prompt}; its template or its pictures' tokens have changed"
        )
