"""`export`: a finished run -> a model artifact: adapter or whole model, model_card.json, README and notices.

The card also holds reference log-probabilities (transformers and PEFT, float32) of fixed prompts: a server compares its
own with them before it becomes ready. `export --adapter` starts from an artifact that was exported earlier: it adds the
references, or merges.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlm2vla_schema.prompts import PROMPT_VERSIONS
from vlm2vla_schema.types import ModelCard, ReferenceLogprobs, Stage
from vlm2vla_training.bases import read_base
from vlm2vla_training.curation.examples import DIGIT_MAP
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.export_report import Prediction, measured, predicted, write_report
from vlm2vla_training.export_texts import write_texts
from vlm2vla_training.jsonio import read_json, sha256_of_files
from vlm2vla_training.merge import write_merged
from vlm2vla_training.progress import finish
from vlm2vla_training.references import measure_references, measure_whole
from vlm2vla_training.sft import SCOPES

FORMATS = ("adapter", "merged", "merged-fp8")
_TRAINING_FACTS = (
    "preset", "examples", "kinds", "tokens", "steps", "loss", "seed", "variant", "plan_source", "max_steps",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def run_export(args: argparse.Namespace) -> int:
    """`export`: write the artifact; --out is replaced as a whole when everything is written."""
    return _export_adapter(args) if args.adapter is not None else _export_run(args)


def _export_run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    summary = read_json(args.run / "summary.json")
    if summary.get("command") != "sft":
        raise DataError(f"{args.run}/summary.json is not of a finished sft run")
    chosen = _format(args, bool(summary["full_finetune"]))
    if chosen == "adapter":
        _refuse_unservable(args, summary)
    if (args.episodes is None) != (args.annotated is None):
        raise UsageError("predicted paths need both --episodes and --annotated")
    base = args.base or Path(summary["base_path"])
    base_card = read_base(base, summary.get("image_size"))
    if base_card.base_hash != summary["base_hash"]:
        raise UsageError(f"{base} is not the base of this run: its hash differs; give --base")
    metrics = read_json(args.metrics) if args.metrics else {}
    if args.dry_run:
        print(f"export: would write {summary['artifact']} of {args.run} as {args.name!r}, {chosen}, to {args.out}")
        return 0
    partial = _partial(args.out)
    partial.mkdir(parents=True)
    trained = args.run / summary["artifact"]
    if chosen == "adapter":
        _copy_adapter(trained, partial, getattr(torch, args.dtype), base_card.name)
    card = model_card(args, summary, base_card, metrics, None)
    card = _weighed(args, chosen, base, trained, partial, card)
    found = _predicted(args, base, partial, card) if args.episodes is not None else []
    if found:
        card = card.model_copy(update={"metrics": {**card.metrics, "predict": measured(found)}})
    card.write(partial)
    write_report(partial, card, args.run, summary, found)
    what = chosen.replace("merged", "full") if summary["full_finetune"] else chosen
    servable = chosen != "adapter" or _scope(summary) == "language_model"
    write_texts(partial, card, base, what, servable)
    _finish(args.out, partial, card, chosen, started)
    return 0


def _format(args: argparse.Namespace, full: bool) -> str:
    """What is written: --format, by default the adapter, and of a full fine-tune the whole model."""
    if full and args.format == "adapter":
        raise UsageError("a full fine-tune has no adapter; give --format merged or merged-fp8")
    return str(args.format or ("merged" if full else "adapter"))


def _weighed(
    args: argparse.Namespace, chosen: str, base: Path, trained: Path, partial: Path, card: ModelCard
) -> ModelCard:
    """The card with references. A whole model is written first, and refused when it answers unlike `trained`."""
    if chosen == "adapter":
        if not args.references:
            return card
        references = measure_references(base, partial, card.image_size, args.device)
        return card.model_copy(update={"reference_logprobs": references})
    fp8 = chosen == "merged-fp8"
    is_adapter = (trained / _ADAPTER_FILES[0]).is_file()
    source, adapter = (base, trained) if is_adapter else (trained, None)
    write_merged(source, adapter, partial, getattr(torch, args.dtype), fp8=fp8)
    if not args.references:
        return card.model_copy(update={"reference_logprobs": None})
    dtype = "fp8" if fp8 else args.dtype
    references, agreement = measure_whole(partial, base, trained, dtype, card.image_size, args.device)
    agreement.check()
    metrics = {**card.metrics, "stored_weights": agreement.to_json()}
    return card.model_copy(update={"reference_logprobs": references, "metrics": metrics})


def _predicted(args: argparse.Namespace, base: Path, stored: Path, card: ModelCard) -> list[Prediction]:
    is_adapter = (stored / _ADAPTER_FILES[0]).is_file()
    return predicted(args, base if is_adapter else stored, stored if is_adapter else None, card)


def _export_adapter(args: argparse.Namespace) -> int:
    """Write an exported adapter again, with reference log-probabilities in its card and else unchanged, or merged."""
    started = time.monotonic()
    chosen = _format(args, full=False)
    card = ModelCard.read(args.adapter)
    if not all((args.adapter / name).is_file() for name in _ADAPTER_FILES):
        raise DataError(f"{args.adapter} is not an exported adapter: expected {' and '.join(_ADAPTER_FILES)} in it")
    if args.base is None or (chosen == "adapter" and not args.references):
        raise UsageError(
            "--adapter adds references, measured on its base, or merges with it: it needs --base and, without --format "
            "merged or merged-fp8, no --no-references"
        )
    found = read_base(args.base, card.image_size).base_hash
    if card.base_hash is not None and found != card.base_hash:
        raise UsageError(f"{args.base} is not the base of {card.name!r}: its card names another hash; give --base")
    if args.dry_run:
        extra = "with reference log-probabilities" if args.references else "without reference log-probabilities"
        print(f"export: would write {args.adapter}, {chosen}, {extra} to {args.out}")
        return 0
    partial = _partial(args.out)
    if chosen == "adapter":
        shutil.copytree(args.adapter, partial)
    else:
        partial.mkdir(parents=True)
    card = _weighed(args, chosen, args.base, args.adapter, partial, card)
    card.write(partial)
    if chosen != "adapter":
        _take_notices(args.adapter, partial)
        write_texts(partial, card, args.base, chosen, servable=True)
    _finish(args.out, partial, card, chosen, started)
    return 0


def _take_notices(adapter: Path, folder: Path) -> None:
    """What the adapter's maker passes on, goes on: terms, notices, the report."""
    for path in adapter.iterdir():
        if path.is_file() and path.stem.upper() in ("LICENSE", "NOTICE", "TERMS", "USE_POLICY", "REPORT"):
            shutil.copyfile(path, folder / path.name)


def _partial(out: Path) -> Path:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def _finish(out: Path, partial: Path, card: ModelCard, chosen: str, started_s: float) -> None:
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    weights = sorted(out.glob("*.safetensors"))
    size_mb = sum(path.stat().st_size for path in weights) / 1e6
    facts = {
        "name": card.name, "format": chosen, "weights_hash": sha256_of_files(weights), "megabytes": round(size_mb, 2)
    }  # fmt: skip
    line = f"{card.name}: {chosen}, {card.adapted_modules} modules, {size_mb:.2f} MB"
    if "stored_weights" in card.metrics:
        facts["stored_weights"] = card.metrics["stored_weights"]
        line += f", {card.metrics['stored_weights']['distance_nat']:.4f} nat from what was trained"
    finish("export", out, facts, started_s, line)


def model_card(
    args: argparse.Namespace,
    summary: dict[str, Any],
    base: ModelCard,
    metrics: dict[str, Any],
    references: list[ReferenceLogprobs] | None,
) -> ModelCard:
    """Build model_card.json from what the run recorded."""
    variant = summary["variant"]
    stages: list[Stage] = ["actions"] if variant == "nr" else ["subtasks", "motion_plan", "actions"]
    training = {**{key: summary[key] for key in _TRAINING_FACTS}, "sources": summary.get("sources", [])}
    if summary.get("continued_from"):
        training["continued_from"] = summary["continued_from"]
    return ModelCard(
        name=args.name,
        base_model=base.name,
        base_hash=base.base_hash,
        adapter_scope=_scope_text(summary),
        adapted_modules=summary["adapted_modules"],
        representation="tokens" if variant == "at" else "text",
        digit_map=dict(DIGIT_MAP) if variant == "at" else None,
        stages=stages,
        image_size=base.image_size,
        prompt_versions=dict(PROMPT_VERSIONS),
        policy="actions" in summary["kinds"],
        reference_logprobs=references,
        data_hash=summary["data_hash"],
        training=training,
        metrics=metrics,
        licence=args.licence or base.licence,
    )


def _scope(summary: dict[str, Any]) -> str:
    """The run's scope; runs from before there was a choice have none recorded."""
    return "full" if summary["full_finetune"] else str(summary["preset"].get("scope", "language_model"))


def _scope_text(summary: dict[str, Any]) -> str:
    """What the card says was adapted: "full", PEFT's expression, or the names."""
    targets = "full" if _scope(summary) == "full" else SCOPES[_scope(summary)]
    return targets if isinstance(targets, str) else ",".join(targets)


def _refuse_unservable(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    scope = _scope(summary)
    if scope != "language_model" and not args.unservable:
        raise UsageError(
            f"this adapter has scope {scope!r}: vLLM leaves its vision tower's part out or mixes it up without an "
            "error. Give --format merged, which every server loads rightly; train with --scope language_model; or give "
            "--unservable for an adapter that only transformers and PEFT load rightly"
        )


def _copy_adapter(source: Path, target: Path, dtype: torch.dtype, base_name: str) -> None:
    """Copy an adapter's two files, weights in `dtype`, with the base's name instead of a path."""
    for path in source.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in load_file(path).items()}
        save_file(tensors, target / path.name, metadata={"format": "pt"})
        (target / path.name).chmod(0o644)
    config = read_json(source / _ADAPTER_FILES[0])
    config["base_model_name_or_path"] = base_name
    (target / _ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
