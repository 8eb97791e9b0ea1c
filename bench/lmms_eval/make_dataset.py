"""The twin's VQA benchmark as a task for lmms-eval: pictures of test seeds, questions the simulator can answer.

    python bench/lmms_eval/make_dataset.py --questions 5 --out work/twin_vqa

writes the task's two files and twin_vqa.parquet with the columns image, question, answer. Questions are in the words of
the base's training, or with --other in words that it never saw. Needs the extras of .venv.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import datasets
from PIL import Image

from vlm2vla_training.vqa.questions import OTHER, QUESTIONS, TRAINED, questions

HERE = Path(__file__).parent
TASK_FILES = ("twin_vqa.yaml", "twin_vqa.py")


def rows(count: int, wording: str) -> list[dict[str, object]]:
    made: list[dict[str, object]] = []
    for one in questions(count):
        buffer = io.BytesIO()
        Image.fromarray(one.picture).save(buffer, format="PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        made.append({"image": image, "question": one.texts[wording], "answer": one.answer})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5, help=f"of each of {len(QUESTIONS)} kinds")
    parser.add_argument("--other", action="store_true", help="in words never seen in training")
    parser.add_argument("--out", type=Path, default=Path("work/twin_vqa"), help="folder for --include-path")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in TASK_FILES:
        shutil.copyfile(HERE / name, options.out / name)
    made = rows(options.questions, OTHER if options.other else TRAINED)
    table = datasets.Dataset.from_list(made).cast_column("image", datasets.Image())
    table.to_parquet(str(options.out / "twin_vqa.parquet"))
    print(f"{len(table)} questions in {options.out}")


if __name__ == "__main__":
    main()
