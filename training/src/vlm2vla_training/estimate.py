"""`estimate`: dollars, hours and gigabytes of annotation and training for a dataset, before anything is spent.

Examples are really built from some of the episodes and counted with the base's own tokenizer; the rest is arithmetic
whose assumptions stand in the report.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from vlm2vla_training.annotation.files import read_annotated
from vlm2vla_training.annotation.gemini_budget import read_price
from vlm2vla_training.annotation.gemini_estimate import estimate_annotation
from vlm2vla_training.annotation.gemini_request import RequestSettings
from vlm2vla_training.annotation.rules import RulesAnnotator
from vlm2vla_training.curation.dataset import ExampleWriter
from vlm2vla_training.curation.examples import VARIANTS, Example, ExampleOptions, examples_of
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import UsageError
from vlm2vla_training.progress import finish

if TYPE_CHECKING:
    from vlm2vla_training.analysis.flops import ModelSize
    from vlm2vla_training.sft import Preset
    from vlm2vla_training.sft_data import Encoder

_GB = 1e9
# Without the base's tokenizer: English prose has about four characters a token, action text about two.
_CHARS_A_TOKEN = 3.0
_TURN_TOKENS = 12  # the template's own, pictures' borders included
# sft keeps two checkpoints: trained weights and Adam's two moments, all as stored by the trainer.
_CHECKPOINTS = 2


@dataclass
class Sample:
    """What some episodes became: lengths are (tokens, images) of each example; bytes as they lie on the disk."""

    episodes: int = 0
    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    annotated_bytes: int = 0
    example_bytes: int = 0
    by_rules: int = 0


def run_estimate(args: argparse.Namespace) -> int:
    """`estimate`: print the report and write it to summary.json."""
    from vlm2vla_training.analysis import flops  # torch and trl, which take seconds

    started = time.monotonic()
    for name in ("gpus", "gpu_tflops", "utilisation", "sample"):
        if getattr(args, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected more than 0")
    dataset = EpisodeDataset(args.episodes)
    preset = flops.named_preset(args.preset)
    config = flops.read_config(args.base)
    size, encoder = flops.model_size(config, preset, args.image_size), flops.read_encoder(args.base, args.image_size)
    sample = take_sample(dataset, args, preset, encoder, size.image_tokens)
    if not sample.lengths:
        raise UsageError(f"the first {sample.episodes} episodes of {args.episodes} give no example; try --sample")
    total = args.episodes_total or dataset.count()
    cost = sum(flops.training_flops(size, preset, tokens, images) for tokens, images in sample.lengths)
    report: dict[str, Any] = {
        "episodes": total,
        "annotate": annotation_part(dataset, args, total),
        "train": training_part(args, preset, sample, total / sample.episodes, cost),
        "disk_gb": disk_part(dataset, sample, total, size, preset),
        "model": asdict(size),
        "assumptions": assumptions(args, dataset, sample, total, measured=encoder is not None),
    }
    for line in lines_of(report):
        print(line)
    if args.dry_run:
        print("estimate: nothing was written (--dry-run)")
        return 0
    disk = sum(report["disk_gb"].values())
    summary_line = f"{report['train']['gpu_hours']} GPU hours, {disk:.1f} GB, {_usd(report)}"
    finish("estimate", args.out, report, started, summary_line)
    return 0


def take_sample(
    dataset: EpisodeDataset, args: argparse.Namespace, preset: Preset, encoder: Encoder | None, image_tokens: int
) -> Sample:
    """Build the examples of the first episodes as `curate` would, from annotations or, without, from the rules'."""
    options = ExampleOptions(variant=next((one for one in VARIANTS if one == preset.variant), "main"))
    annotated = read_annotated(args.annotated) if args.annotated else {}
    sample, rules = Sample(), RulesAnnotator()
    with TemporaryDirectory() as folder:
        writer = ExampleWriter(Path(folder), options, args.image_size)
        for episode in islice(dataset.episodes(), args.sample):
            known = annotated.get(episode.key)
            sample.by_rules += known is None
            known = known or rules.annotate(episode)
            found = examples_of(known, options)
            writer.write(episode, found)
            sample.episodes += 1
            sample.rows += len(episode)
            sample.kinds.update(one.kind for one in found.examples)
            sample.lengths += [(_tokens(one, encoder, image_tokens), len(one.images)) for one in found.examples]
            sample.annotated_bytes += len(json.dumps(known.to_json(), ensure_ascii=False).encode()) + 1
        writer.flush()
        sample.example_bytes = sum(part.stat().st_size for part in Path(folder).glob("part-*.parquet"))
    return sample


def _tokens(example: Example, encoder: Encoder | None, image_tokens: int) -> int:
    if encoder is not None:
        return len(encoder.encode(example.prompt, example.completion, len(example.images)))
    text = (len(example.prompt) + len(example.completion)) / _CHARS_A_TOKEN
    return round(text) + _TURN_TOKENS + len(example.images) * (image_tokens + 4)


def annotation_part(dataset: EpisodeDataset, args: argparse.Namespace, total: int) -> dict[str, Any] | None:
    """Tokens, dollars and hours of annotating with Gemini; None without a price table: rules cost nothing.

    Hours follow from the account's limits; Batch mode has none, and its hours are Google's to choose: None.
    """
    if args.prices is None:
        if args.batch:
            raise UsageError("--batch is a price of the table: give --prices")
        return None
    settings = RequestSettings(args.model, args.prompt_version, frames_every=args.frames_every)
    price = read_price(args.prices, args.model, args.batch)
    found = estimate_annotation(dataset, list(dataset.steps()), settings, price)
    scale = total / dataset.count()
    minutes = max(total / args.requests_per_minute, found.prompt_tokens * scale / args.tokens_per_minute)
    return {
        "model": args.model,
        "batch": args.batch,
        "prompt_version": args.prompt_version,
        "prompt_tokens": round(found.prompt_tokens * scale),
        "output_tokens": round(found.output_tokens * scale),
        "usd": round(found.usd * scale, 2),
        "hours": None if args.batch else round(minutes / 60, 2),
        "basis": found.basis,
    }


def training_part(
    args: argparse.Namespace, preset: Preset, sample: Sample, scale: float, sample_flops: float
) -> dict[str, Any]:
    """Examples, steps, operations and hours of one run; dollars when an hour's price was given."""
    examples = round(len(sample.lengths) * scale)
    lengths = [tokens for tokens, _ in sample.lengths]
    operations = sample_flops * scale * preset.epochs
    gpu_hours = operations / (args.gpu_tflops * 1e12 * args.utilisation) / 3600
    batch = preset.batch_size * preset.accumulation * args.gpus
    return {
        "preset": args.preset,
        "examples": examples,
        "kinds": {kind: round(count * scale) for kind, count in sorted(sample.kinds.items())},
        "tokens_an_example": {"mean": round(sum(lengths) / len(lengths), 1), "max": max(lengths)},
        "too_long": sum(tokens > preset.max_tokens for tokens in lengths),
        "steps": -(-round(examples * preset.epochs) // batch),
        "flops": float(f"{operations:.4g}"),
        "gpu_hours": float(f"{gpu_hours:.4g}"),
        "hours": float(f"{gpu_hours / args.gpus:.4g}"),
        "usd": None if args.gpu_usd_per_hour is None else round(gpu_hours * args.gpu_usd_per_hour, 2),
    }


def disk_part(
    dataset: EpisodeDataset, sample: Sample, total: int, size: ModelSize, preset: Preset
) -> dict[str, float]:
    """Gigabytes (1e9 bytes) of every stage's files."""
    stored = sum(part.stat().st_size for part in dataset.parts) / dataset.count()
    width = 2 if preset.weights == "bfloat16" and preset.full else 4  # adapters are kept in float32
    sizes = {
        "episodes": stored * total,
        "annotated": sample.annotated_bytes / sample.episodes * total,
        "examples": sample.example_bytes / sample.episodes * total,
        "base": size.parameters * (4 if preset.weights == "float32" else 2),
        # What is trained and AdamW's two moments of it, all in float32.
        "checkpoints": size.trained * 4 * 3 * _CHECKPOINTS,
        "result": size.trained * width,
    }
    return {name: float(f"{value / _GB:.4g}") for name, value in sizes.items()}


def assumptions(
    args: argparse.Namespace, dataset: EpisodeDataset, sample: Sample, total: int, measured: bool
) -> list[str]:
    """Everything in the report that was not counted, in words."""
    found = [
        f"{args.gpu_tflops:g} TFLOP/s a GPU in bfloat16 (312 is an A100's) of which {args.utilisation:.0%} are used",
        f"examples as those of the first {sample.episodes} episodes ({sample.rows} rows)",
    ]
    if sample.by_rules:
        found.append(f"{sample.by_rules} of these were annotated by rules to have steps to count")
    if not measured:
        found.append(f"{_CHARS_A_TOKEN:g} characters a token: {args.base} holds no tokenizer")
    if total != dataset.count():
        found.append(f"{total} episodes like the {dataset.count()} in {args.episodes}")
    if args.prices is not None:
        found.append("one request an episode; one that must be repaired costs about twice as much")
    if args.batch:
        found.append("Google says that a job of Batch mode ends within 24 hours, mostly sooner; no rate limit counts")
    return found


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    annotate, train, disk = report["annotate"], report["train"], report["disk_gb"]
    lines = [f"{report['episodes']:,} episodes"]
    if annotate is not None:
        hours = "Batch mode" if annotate["batch"] else f"{annotate['hours']:g} h"
        lines.append(
            f"annotate  {annotate['usd']:,.2f} USD, {hours} ({annotate['model']}, "
            f"{annotate['prompt_tokens']:,} tokens in, {annotate['output_tokens']:,} out; {annotate['basis']})"
        )
    tokens = train["tokens_an_example"]
    money = "" if train["usd"] is None else f"{train['usd']:,.2f} USD, "
    lines.append(
        f"train     {money}{train['hours']:g} h = {train['gpu_hours']:g} GPU hours ({train['examples']:,} examples of "
        f"{tokens['mean']:g} tokens, {train['steps']:,} steps, {train['flops']:g} operations)"
    )
    if train["too_long"]:
        lines.append(f"          {train['too_long']} of the examples counted are too long: sft would refuse them")
    lines.append("disk      " + ", ".join(f"{name} {value:g} GB" for name, value in disk.items()))
    return lines + [f"assumed   {one}" for one in report["assumptions"]]


def _usd(report: dict[str, Any]) -> str:
    parts = [part for part in (report["annotate"], report["train"]) if part is not None]
    known = [part["usd"] for part in parts if part["usd"] is not None]
    return f"{sum(known):,.2f} USD" if known else "no prices given"
