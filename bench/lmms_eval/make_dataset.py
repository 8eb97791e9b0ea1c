"""A small VQA data set of the twin for lmms-eval: test pictures, questions whose answers the simulator knows.

    python bench/lmms_eval/make_dataset.py --questions 40 --out twin_vqa.parquet

Columns image, question, answer. Seeds from 1,000,000 on, which no training picture has. Needs the extras of .venv.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from vlm2vla_training import pretrain_data

FIRST_SEED = 1_000_000
KINDS = (pretrain_data.q_there, pretrain_data.q_held, pretrain_data.q_colour, pretrain_data.q_compare)


def rows(count: int) -> list[dict[str, object]]:
    """One question a picture, the kinds in turn."""
    made: list[dict[str, object]] = []
    seed = FIRST_SEED
    while len(made) < count:
        shown, rng = pretrain_data.still(seed), np.random.default_rng(seed)
        seed += 1
        pair = KINDS[len(made) % len(KINDS)](shown[1], rng) if shown is not None else None
        if shown is None or pair is None:
            continue
        buffer = io.BytesIO()
        Image.fromarray(shown[0]).save(buffer, format="PNG")
        made.append({"image": {"bytes": buffer.getvalue(), "path": None}, "question": pair[0], "answer": pair[1]})
    return made


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("twin_vqa.parquet"))
    options = parser.parse_args()
    table = datasets.Dataset.from_list(rows(options.questions)).cast_column("image", datasets.Image())
    table.to_parquet(str(options.out))
    print(f"{len(table)} questions in {options.out}")


if __name__ == "__main__":
    main()
