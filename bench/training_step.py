"""A training step of `sft` on a model of any size with random weights: tokens/s, memory, share of the arithmetic limit.

    python bench/training_step.py --preset paper --peak-tflops 989 --out bench/results/training_step.json   # on a GPU
    python bench/training_step.py --config models/twin/base --preset twin --length 96 --out step.json       # on a CPU

The model is built on the device from a configuration alone, by default that of Gemma-3-12B among the tests' data; the
trainer is the one that `sft` builds: LoRA, optimiser, precision and gradient checkpointing of the preset. Batches hold
random tokens in the shape of an example: pictures in front, loss on the last `--answer` tokens. `--layers` keeps the
first layers of the language model and the tower, for small machines. A step lasts from the end of the one before to
its own end, on a GPU after everything queued is done; the first `--warm-up` are left out, and the median is taken.

Model FLOPs a token, the usual count: 2 forwards and 2 for the gradient of the inputs for each weight, and 2 more for
its own gradient where it is trained:

    4 x frozen + 6 x trained,  all trained: 6 x all

over the linears of the language model and its head; what checkpointing computes again is not counted. `share_of_peak`
is that, times tokens/s, over `--peak-tflops` (dense bfloat16: A100 312, H100 SXM and H200 989). `share_of_peak_all`
counts what is computed, as `estimate` does: pictures, attention, and the forward pass again where it is repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from soak import ROOT, machine
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from vlm2vla_training import sft
from vlm2vla_training.analysis.flops import ModelSize, model_size, read_config, training_flops
from vlm2vla_training.cli import build_parser
from vlm2vla_training.cpu_attention import CPU_ATTENTION

GEMMA = ROOT / "tests" / "training" / "configs" / "gemma-3-12b-it.json"
TWIN = ROOT / "models" / "twin" / "base"
"""Whose processor stands in: the trainer wants one, but no text and no picture passes it."""


class RandomBatches:
    """Batches as `sft`'s collator makes them, of random tokens and grey noise."""

    def __init__(self, config: Any, length: int, images: int, answer: int) -> None:
        """length: tokens an example, its pictures' and the answer's included.

        Raises:
            SystemExit: pictures and answer do not fit.
        """
        self._config, self._length, self._images, self._answer = config, length, images, answer
        if images * config.mm_tokens_per_image + answer >= length:
            needed = images * config.mm_tokens_per_image + answer + 1
            sys.exit(f"--length {length}: expected at least {needed} for {images} pictures and {answer} answer tokens")
        self._random = np.random.default_rng(0)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
        """Return input_ids, attention_mask, token_type_ids, labels [B, L] and pixel_values [B x images, 3, S, S]."""
        config, shape = self._config, (len(rows), self._length)
        size_px, soft = config.vision_config.image_size, self._images * config.mm_tokens_per_image
        ids = self._random.integers(0, config.text_config.vocab_size - 1, shape)
        ids += ids >= config.image_token_id  # any token but that of a picture
        ids[:, :soft] = config.image_token_id
        labels = np.where(np.arange(self._length) >= self._length - self._answer, ids, -100)
        batch: dict[str, NDArray[Any]] = {
            "input_ids": ids, "attention_mask": np.ones(shape, np.int64), "labels": labels,
            "token_type_ids": (ids == config.image_token_id).astype(np.int64),
        }  # fmt: skip
        if self._images:
            shape_px = (len(rows) * self._images, 3, size_px, size_px)
            batch["pixel_values"] = self._random.uniform(-1, 1, shape_px).astype(np.float32)
        return batch


class Watch(TrainerCallback):
    """When each step ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.losses.extend([logs["loss"]] if "loss" in logs else [])


def read_cut(path: Path, layers: int | None) -> Any:
    """The configuration, with only the first `layers` layers of language model and tower."""
    config = read_config(path)
    if config.model_type != "gemma3":
        raise SystemExit(f"{path} is {config.model_type}; random batches are made for gemma3 only")
    if layers is not None:
        config.text_config.layer_types = config.text_config.layer_types[:layers]
        config.text_config.num_hidden_layers = layers
        config.vision_config.num_hidden_layers = layers
    return config


def random_model(config: Any, weights: str, device: str) -> Any:
    """Random weights in the preset's type, made where they stay."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if weights == "nf4" else getattr(torch, weights)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if weights == "nf4":
        in_four_bits(model, device)
    if device == "cpu":
        model.set_attn_implementation(CPU_ATTENTION)
    return model


def in_four_bits(model: Any, device: str) -> None:
    """Replace all linears but the head by QLoRA's: nf4, quantised twice, computed in bfloat16. One after the other, so
    that the whole model lies in bfloat16 only before the first.
    """
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or "lm_head" in name:  # torch's own attention reads its weights itself
            continue
        small = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.bfloat16,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        small.weight = bitsandbytes.nn.Params4bit(
            module.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        small.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, small.to(device))
    model.is_loaded_in_4bit = True  # what PEFT asks


def flops_a_token(size: ModelSize, full: bool) -> int:
    """The usual count of the docstring above."""
    linears = size.language + size.head
    return 6 * linears if full else 4 * linears + 6 * size.trained


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Train some steps, and what they tell."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["sft", "--base", str(TWIN), "--examples", folder, "--out", folder, "--preset", args.preset]
        command += ["--batch-size", str(args.batch_size), "--max-steps", str(args.warm_up + args.steps)]
        chosen = build_parser().parse_args([*command, "--no-tensorboard", *(["--compile"] if args.compile else [])])
        preset = sft.chosen_preset(chosen)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = read_cut(args.config, args.layers)
        size = model_size(config, preset, config.vision_config.image_size)
        model = random_model(config, preset.weights, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # from here on: what training holds, not what making weights took
        batches = RandomBatches(config, args.length, args.images, args.answer)
        examples = sft.rows_of(list(range(preset.batch_size * preset.accumulation * (args.warm_up + args.steps))))
        assert examples is not None
        processor = AutoProcessor.from_pretrained(TWIN)
        trainer, adapted = sft.build_trainer(chosen, preset, model, processor, batches, examples, None)
        trainer.args.logging_steps, trainer.args.save_strategy = 1, "no"
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train()
    seconds = [after - before for before, after in pairwise(watch.ends[args.warm_up - 1 :])]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * _resident_kb()
    tokens, step_s = preset.batch_size * preset.accumulation * args.length, statistics.median(seconds)
    usual = flops_a_token(size, preset.full)
    whole = training_flops(size, preset, args.length, args.images) / args.length
    return {
        "config": args.config.name, "layers": config.text_config.num_hidden_layers, "preset": args.preset,
        "batch_size": preset.batch_size, "accumulation": preset.accumulation, "length": args.length,
        "images": args.images, "answer": args.answer, "gradient_checkpointing": preset.gradient_checkpointing,
        "weights": preset.weights, "parameters": size.parameters, "trained": size.trained, "adapted_modules": adapted,
        "steps_s": seconds, "seconds_a_step": step_s, "losses": watch.losses,
        "tokens_a_step": tokens, "tokens_a_second": tokens / step_s, "peak_gb": peak / 1e9,
        "model_flops_a_token": usual, "all_flops_a_token": whole, "tflops": usual * tokens / step_s / 1e12,
        "peak_tflops": args.peak_tflops, "share_of_peak": _share(usual * tokens / step_s, args.peak_tflops),
        "share_of_peak_all": _share(whole * tokens / step_s, args.peak_tflops),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "load_average": os.getloadavg(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        **machine(),
    }  # fmt: skip


def _resident_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _share(flops_a_second: float, peak_tflops: float | None) -> float | None:
    return None if peak_tflops is None else flops_a_second / (peak_tflops * 1e12)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=GEMMA, help="a model's folder, or its config.json alone")
    parser.add_argument("--layers", type=int, help="keep only the first of them")
    parser.add_argument("--preset", choices=sorted(sft.PRESETS), default="paper")
    parser.add_argument("--batch-size", type=int, default=1, help="of a micro-batch; accumulation is the preset's")
    parser.add_argument("--length", type=int, default=1024, help="tokens an example")
    parser.add_argument("--images", type=int, default=1, help="pictures an example")
    parser.add_argument("--answer", type=int, default=64, help="tokens an example that carry loss")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="as `sft --compile`")
    parser.add_argument("--peak-tflops", type=float, help="the device's limit for the preset's products")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.warm_up < 1 or args.steps < 1:
        parser.error("expected --warm-up and --steps of at least 1")
    result = measured(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    share = result["share_of_peak"]
    print(
        f"training_step: {result['tokens_a_second']:.0f} tokens/s, {result['seconds_a_step']:.3f} s a step, peak "
        f"{result['peak_gb']:.2f} GB, {result['model_flops_a_token'] / 1e9:.3g} GFLOP a token, "
        f"{result['tflops']:.3g} TFLOP/s" + ("" if share is None else f", {100 * share:.1f} % of the limit")
        + f" -> {args.out}"
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
