"""ZeRO-2 on two CPU processes (gloo) against one process: the same examples, the same losses.

    python bench/zero2.py --base models/twin/base --examples EXAMPLES --out bench/results/zero2.json

EXAMPLES is a folder written by `vlm2vla-train curate`. Needs vlm2vla-training[train,zero]. `vlm2vla-train sft` runs
twice with the same settings: alone with accumulation 2, and under `accelerate launch` on two processes with
accumulation 1 and ZeRO-2. Both see the same examples in the same steps. The configuration is that of training/configs
with what a CPU needs: gloo, and torch's Adam, because DeepSpeed's own is compiled for the machine.
Must: no logged loss differs by more than 1e-3 of itself. Exit code 1 when one does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from soak import ROOT, machine

LIMIT = 1e-3
# sft logs the mean of ten steps unless checkpoints come more often: with one a step, every step's loss is logged.
EVERY_STEP = ["--save-steps", "1"]


def sft(args: argparse.Namespace, out: Path, accumulation: int) -> list[str]:
    """The arguments of `vlm2vla-train sft`."""
    batch = ["--batch-size", str(args.batch_size), "--accumulation", str(accumulation), "--warmup-steps", "2"]
    steps = ["--max-steps", str(args.steps), *EVERY_STEP, "--threads", "1", "--no-tensorboard"]
    what = ["--preset", args.preset, "--base", str(args.base), "--examples", str(args.examples), "--out", str(out)]
    return ["sft", *what, *batch, *steps]


def configuration(folder: Path) -> Path:
    """accelerate's file for two processes on this machine, beside the DeepSpeed file that it names."""
    deepspeed = json.loads((ROOT / "training" / "configs" / "zero2.json").read_text())
    # Given an optimizer here, DeepSpeed builds it itself; "auto" takes the values of sft.
    values = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    deepspeed["optimizer"] = {"type": "AdamW", "params": {**values, "torch_adam": True}}
    deepspeed["zero_optimization"]["overlap_comm"] = False
    (folder / "zero2.json").write_text(json.dumps(deepspeed))
    lines = [
        "compute_environment: LOCAL_MACHINE", "distributed_type: DEEPSPEED", "deepspeed_config:",
        f"  deepspeed_config_file: {folder / 'zero2.json'}", "  zero3_init_flag: false", "machine_rank: 0",
        "num_machines: 1", "num_processes: 2", "main_training_function: main", "use_cpu: true",
    ]  # fmt: skip
    (folder / "two.yaml").write_text("\n".join(lines) + "\n")
    return folder / "two.yaml"


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [float(line["loss"]) for line in lines if "loss" in line]


def timed(command: list[str], **more: str) -> float:
    """Run a command with further environment variables; seconds. Raises CalledProcessError when it fails."""
    started = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, **more})
    return round(time.monotonic() - started, 1)


def main() -> int:
    """Run both, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--preset", default="twin", help="of sft; others load the base in bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4, help="examples a micro-batch; two of them make a step")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        one_s = timed([sys.executable, "-m", "vlm2vla_training.cli", *sft(args, work / "one", 2)])
        launch = ["accelerate.commands.launch", "--config_file", str(configuration(work)), "-m", "vlm2vla_training.cli"]
        two_s = timed([sys.executable, "-m", *launch, *sft(args, work / "two", 1)], DS_ACCELERATOR="cpu")
        one, two = losses(work / "one"), losses(work / "two")
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    result: dict[str, Any] = {
        "one_process": one,
        "two_processes_zero2": two,
        "largest_relative_difference": worst,
        "limit": LIMIT,
        "preset": args.preset,
        "seconds": {"one": one_s, "two": two_s},
        "examples_a_step": 2 * args.batch_size,
        "versions": {
            name: version(name) for name in ("torch", "deepspeed", "accelerate", "transformers", "trl", "peft")
        },
        "machine": machine(),
        "load_average": load,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("step    one process    two, ZeRO-2    relative difference")
    for step, (a, b) in enumerate(zip(one, two, strict=True), start=1):
        print(f"{step:4d} {a:14.6f} {b:14.6f} {abs(a - b) / abs(a):14.2e}")
    print(f"zero2: largest relative difference {worst:.2e} (limit {LIMIT:g}) -> {args.out}")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
