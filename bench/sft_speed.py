"""Seconds a step and memory of `sft` beside TRL's usual way to train a vision-language model, on the same examples.

    python bench/sft_speed.py --base models/twin/base --examples EXAMPLES --out bench/results/sft_speed.json

EXAMPLES is a folder written by `vlm2vla-train curate`. TRL's side is SFTTrainer as its example for vision-language
models has it: columns images, prompt and completion, TRL's own collator, transformers' attention. Model, adapter,
optimiser, precision, batch and order of the examples are the same, and so are the batches, but for one token: TRL's
answers go on with the line break behind the end of turn, which carries loss too, so its losses lie a little lower.

Each side runs in a process of its own, in turns, so that other programs on the machine disturb both; on one thread,
because threads that wait for one another make a step on a busy machine ten times as long. A step lasts from the end of
the one before to its own end, collator included; the first three are left out, and the median is taken of the steps of
all runs. `processor_s_a_step`, what a step costs in processor time, is inflated much less by other programs. Memory is
the largest resident set of the process. Must: at most TRL's seconds and at most TRL's memory. Exit code 1 when not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soak import ROOT, machine

SIDES = ("ours", "trl")
WARM_UP = 3


def settings(args: argparse.Namespace, out: Path) -> argparse.Namespace:
    """What `vlm2vla-train sft` would get."""
    from vlm2vla_training.cli import build_parser

    command = ["sft", "--base", str(args.base), "--out", str(out), "--preset", "twin", "--max-steps", str(args.steps)]
    command += ["--examples", str(args.examples), "--batch-size", str(args.batch_size), "--warmup-steps", "2"]
    return build_parser().parse_args([*command, "--save-steps", "10000", "--no-tensorboard"])


def ours(args: argparse.Namespace, out: Path) -> Any:
    """The trainer that `sft` builds."""
    from transformers import AutoProcessor

    from vlm2vla_training import sft
    from vlm2vla_training.curation.dataset import load_examples
    from vlm2vla_training.sft_data import Collator, Encoder, encode_all

    chosen = settings(args, out)
    preset = sft.chosen_preset(chosen)
    processor = AutoProcessor.from_pretrained(args.base)
    examples = load_examples(args.examples, args.image_size)
    encoder = Encoder(processor, args.image_size)
    collator = Collator(examples, encode_all(examples, encoder, preset.max_tokens), processor)
    rows = sft.rows_of(list(range(len(examples))))
    assert rows is not None
    model = sft.load_base(args.base, preset)
    trainer, _ = sft.build_trainer(chosen, preset, model, processor, collator, rows, None)
    return trainer


def trl(args: argparse.Namespace, out: Path) -> Any:
    """TRL's way: messages and pictures, everything else its own."""
    import torch
    from datasets import Dataset, Features, Image, List, Value
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTTrainer

    from vlm2vla_training import sft
    from vlm2vla_training.curation.dataset import read_examples

    chosen = settings(args, out)
    preset = sft.chosen_preset(chosen)
    table = read_examples(args.examples, ["images", "prompt", "completion"]).to_pylist()
    message = List({"role": Value("string"), "content": Value("string")})
    rows = Dataset.from_list(
        [
            {
                "images": [{"bytes": data, "path": None} for data in row["images"]],
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in table
        ],
        features=Features({"images": List(Image()), "prompt": message, "completion": message}),
    )
    arguments = sft.training_arguments(chosen, preset, held_out=False)
    arguments.dataset_kwargs = None
    return SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(args.base, dtype=getattr(torch, preset.weights)),
        args=arguments,
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(args.base),
        peft_config=sft.lora_config(preset),
    )


def train(args: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: the time of every step, the losses and the memory."""
    from transformers import TrainerCallback

    ends: list[tuple[float, float]] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append((time.perf_counter(), time.process_time()))

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    with tempfile.TemporaryDirectory() as folder:
        trainer = {"ours": ours, "trl": trl}[args.side](args, Path(folder))
        trainer.args.logging_steps = 1
        trainer.add_callback(Watch())
        trainer.train()
    pairs = list(zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False))
    wall, processor = ([after[clock] - before[clock] for before, after in pairs] for clock in (0, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"steps_s": wall, "processor_s": processor, "peak_mb": peak, "losses": losses}


def alone(args: argparse.Namespace, side: str) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--base", str(args.base), "--examples", str(args.examples)]
    command += ["--steps", str(args.steps), "--batch-size", str(args.batch_size), "--image-size", str(args.image_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns, and what is divided by what."""
    load = [os.getloadavg()]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(args.rounds):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            runs[side].append(alone(args, side))
            seconds = statistics.median(runs[side][-1]["steps_s"])
            print(f"sft_speed: {side} {seconds:.3f} s a step", file=sys.stderr, flush=True)
            load.append(os.getloadavg())
    wall, processor = (
        {side: statistics.median(step for one in runs[side] for step in one[key]) for side in SIDES}
        for key in ("steps_s", "processor_s")
    )
    peak = {side: max(one["peak_mb"] for one in runs[side]) for side in SIDES}
    return {
        "seconds_a_step": wall,
        "processor_s_a_step": processor,
        "peak_mb": peak,
        "ratio_seconds": wall["ours"] / wall["trl"],
        "ratio_processor": processor["ours"] / processor["trl"],
        "ratio_peak": peak["ours"] / peak["trl"],
        "seconds_of_each_run": {side: [statistics.median(one["steps_s"]) for one in runs[side]] for side in SIDES},
        "losses": {side: runs[side][0]["losses"] for side in SIDES},
        "batch_size": args.batch_size,
        "steps": args.steps,
        "threads": args.threads,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "load_average": load,
        **machine(),
    }


def main() -> int:
    """Compare, or with --side be one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=112, help="of the base's card, pixels")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.base, args.examples = args.base.resolve(), args.examples.resolve()
    if args.side:
        print(json.dumps(train(args)))
        return 0
    if args.out is None:
        parser.error("--out is required")
    result = compared(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    seconds, peak = result["seconds_a_step"], result["peak_mb"]
    print(
        f"sft_speed: {seconds['ours']:.3f} s a step against TRL's {seconds['trl']:.3f} (ratio "
        f"{result['ratio_seconds']:.2f}), peak {peak['ours']:.0f} MB against {peak['trl']:.0f} (ratio "
        f"{result['ratio_peak']:.2f}) -> {args.out}"
    )
    return 0 if result["ratio_seconds"] <= 1 and result["ratio_peak"] <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
