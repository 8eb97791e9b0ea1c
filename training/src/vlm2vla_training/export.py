"""`export`: a finished run -> a model artifact: adapter or whole model, model_card.json, README and notices."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm2vla_schema.images import to_base64
from vlm2vla_schema.prompts import PROMPT_VERSIONS
from vlm2vla_schema.types import ModelCard, ReferenceLogprobs, Stage
from vlm2vla_training.curation.dataset import ExampleSet, encode_png, load_examples
from vlm2vla_training.curation.examples import DIGIT_MAP
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import read_json, sha256_of_files
from vlm2vla_training.progress import finish
from vlm2vla_training.servable import write_servable_names
from vlm2vla_training.sft import ADAPTER_SCOPE
from vlm2vla_training.sft_data import Collator, Encoder, Tokens

_GEMMA_NOTICE = """Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms

This folder is a model derivative of Gemma: it was fine-tuned from the base model named in model_card.json. Whoever
passes it on must pass on these terms, mark changed files, and hold recipients to the use restrictions of
https://ai.google.dev/gemma/prohibited_use_policy
"""
_TRAINING_FACTS = (
    "preset", "examples", "kinds", "tokens", "steps", "loss", "seed", "variant", "plan_source", "max_steps",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def run_export(args: argparse.Namespace) -> int:
    """`export`: write the artifact; --out is replaced as a whole when everything is written."""
    started = time.monotonic()
    summary = read_json(args.run / "summary.json")
    if summary.get("command") != "sft":
        raise DataError(f"{args.run}/summary.json is not of a finished sft run")
    base = args.base or Path(summary["base_path"])
    base_card = ModelCard.read(base)
    if base_card.base_hash != summary["base_hash"]:
        raise UsageError(f"{base} is not the base of this run: its hash differs; give --base")
    metrics = read_json(args.metrics) if args.metrics else {}
    if args.references and not args.examples:
        raise UsageError("--references needs --examples, the folder of curate to take them from")
    if args.dry_run:
        print(f"export: would write {summary['artifact']} of {args.run} as {args.name!r} to {args.out}")
        return 0
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = getattr(torch, args.dtype)
    _copy_weights(args.run / summary["artifact"], partial, dtype, base_card.name)
    if summary["full_finetune"]:
        write_servable_names(partial)
    references = _references(base, partial, summary, args) if args.references else None
    card = model_card(args, summary, base_card, metrics, references)
    card.write(partial)
    _write_texts(partial, card, base, summary)
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(partial, args.out)
    weights = sorted(args.out.glob("*.safetensors"))
    size_mb = sum(path.stat().st_size for path in weights) / 1e6
    facts = {"name": card.name, "weights_hash": sha256_of_files(weights), "megabytes": round(size_mb, 2)}
    finish("export", args.out, facts, started, f"{card.name}: {card.adapted_modules} modules, {size_mb:.2f} MB")
    return 0


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
    training = {key: summary[key] for key in _TRAINING_FACTS}
    return ModelCard(
        name=args.name,
        base_model=base.name,
        base_hash=base.base_hash,
        adapter_scope="full" if summary["full_finetune"] else ADAPTER_SCOPE,
        adapted_modules=summary["adapted_modules"],
        representation="tokens" if variant == "at" else "text",
        digit_map=dict(DIGIT_MAP) if variant == "at" else None,
        stages=stages,
        image_size=base.image_size,
        prompt_versions=dict(PROMPT_VERSIONS),
        policy=True,
        reference_logprobs=references,
        data_hash=summary["data_hash"],
        training=training,
        metrics=metrics,
        licence=args.licence or base.licence,
    )


def _copy_weights(source: Path, target: Path, dtype: torch.dtype, base_name: str) -> None:
    """Copy weights in `dtype`; of an adapter only its two files, with the base's name instead of a path."""
    if not (source / _ADAPTER_FILES[0]).exists():
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, target / path.name)
        _set_dtype(target / "config.json", dtype)
    for path in source.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in load_file(path).items()}
        save_file(tensors, target / path.name, metadata={"format": "pt"})
        (target / path.name).chmod(0o644)
    if (source / _ADAPTER_FILES[0]).exists():
        config = read_json(source / _ADAPTER_FILES[0])
        config["base_model_name_or_path"] = base_name
        (target / _ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = read_json(path)
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _references(
    base: Path, artifact: Path, summary: dict[str, Any], args: argparse.Namespace
) -> list[ReferenceLogprobs]:
    """Measure log-probabilities of a few training answers under the stored adapter and under the base, in float32."""
    if summary["full_finetune"]:
        raise UsageError("--references compares an adapter with its base; a full fine-tune has none")
    processor = AutoProcessor.from_pretrained(base)
    examples = load_examples(args.examples, ModelCard.read(base).image_size, ("actions",))
    encoder = Encoder(processor)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(artifact)).eval()
    stride = max(1, len(examples) // args.references)
    chosen = list(range(0, len(examples), stride))[: args.references]
    return [_reference(examples, index, encoder, adapted) for index in chosen]


def _reference(examples: ExampleSet, index: int, encoder: Encoder, adapted: PeftModel) -> ReferenceLogprobs:
    tokens = encoder.encode(examples.prompts[index], examples.completions[index], len(examples.images[index]))
    collator = Collator(examples, {index: tokens}, encoder.processor)
    batch = {name: torch.from_numpy(array) for name, array in collator([{"example": index}]).items()}
    with adapted.disable_adapter():
        base = _answer_logprobs(adapted, batch, tokens)
    return ReferenceLogprobs(
        prompt=examples.prompts[index],
        image=to_base64(encode_png(examples.pixels[examples.images[index][0]])),
        completion=examples.completions[index],
        token_ids=[int(token) for token in tokens.answer],
        logprobs=_answer_logprobs(adapted, batch, tokens),
        base_logprobs=base,
    )


@torch.no_grad()
def _answer_logprobs(model: PeftModel, batch: dict[str, torch.Tensor], tokens: Tokens) -> list[float]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits[0].float()
    start = len(tokens.prompt)
    rows = torch.log_softmax(logits[start - 1 : start + len(tokens.answer) - 1], dim=-1)
    answer = batch["input_ids"][0, start : start + len(tokens.answer)]
    return [round(float(value), 6) for value in rows.gather(1, answer[:, None])[:, 0]]


def _write_texts(folder: Path, card: ModelCard, base: Path, summary: dict[str, Any]) -> None:
    """Write README.md, and for anything derived from Gemma its terms."""
    lines = [
        f"# {card.name}",
        "",
        f"A policy that acts in text: {'every weight' if summary['full_finetune'] else 'a LoRA adapter'} trained on "
        f"`{card.base_model}` with {summary['examples']} examples. Facts are in `model_card.json`; serve it with",
        "`vlm2vla-server serve`.",
        "",
        f"Licence: {card.licence or 'that of the base model'}.",
    ]
    if any(name.startswith("bridge") for name in summary.get("sources", [])):
        lines += [
            "",
            "Trained on data derived from BridgeData V2 (Walke et al., CC BY 4.0), relabelled, merged and rescaled.",
        ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if "gemma" in f"{card.licence} {card.base_model}".lower():
        (folder / "NOTICE").write_text(_GEMMA_NOTICE, encoding="utf-8")
        for path in base.glob("*"):
            if path.is_file() and path.stem.upper() in ("LICENSE", "TERMS", "USE_POLICY"):
                shutil.copyfile(path, folder / path.name)
