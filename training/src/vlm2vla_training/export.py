"""`export`: a finished run -> a model artifact: adapter or whole model, model_card.json, README and notices.

An adapter's card also holds reference log-probabilities (transformers and PEFT, float32) of fixed prompts, under
adapter and base: a server compares its own with them before it becomes ready. `export --adapter` measures them for an
artifact that was exported earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm2vla_schema.images import to_base64
from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image
from vlm2vla_schema.prompts import PROMPT_VERSIONS
from vlm2vla_schema.types import ModelCard, ReferenceLogprobs, Stage
from vlm2vla_training.curation.dataset import encode_png
from vlm2vla_training.curation.examples import DIGIT_MAP
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.export_report import Prediction, measured, predicted, write_report
from vlm2vla_training.jsonio import read_json, sha256_of_files
from vlm2vla_training.progress import finish
from vlm2vla_training.servable import write_servable_names
from vlm2vla_training.sft import SCOPES
from vlm2vla_training.sft_data import Encoder, image_token

_GEMMA_NOTICE = """Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms

This folder is a model derivative of Gemma: it was fine-tuned from the base model named in model_card.json. Whoever
passes it on must pass on these terms, mark changed files, and hold recipients to the use restrictions of
https://ai.google.dev/gemma/prohibited_use_policy
"""
_TRAINING_FACTS = (
    "preset", "examples", "kinds", "tokens", "steps", "loss", "seed", "variant", "plan_source", "max_steps",
)  # fmt: skip
REFERENCE_TOKENS = 32
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def run_export(args: argparse.Namespace) -> int:
    """`export`: write the artifact; --out is replaced as a whole when everything is written."""
    return _export_adapter(args) if args.adapter is not None else _export_run(args)


def _export_run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    summary = read_json(args.run / "summary.json")
    if summary.get("command") != "sft":
        raise DataError(f"{args.run}/summary.json is not of a finished sft run")
    _refuse_unservable(args, summary)
    if (args.episodes is None) != (args.annotated is None):
        raise UsageError("predicted paths need both --episodes and --annotated")
    base = args.base or Path(summary["base_path"])
    base_card = ModelCard.read(base)
    if base_card.base_hash != summary["base_hash"]:
        raise UsageError(f"{base} is not the base of this run: its hash differs; give --base")
    metrics = read_json(args.metrics) if args.metrics else {}
    if args.dry_run:
        print(f"export: would write {summary['artifact']} of {args.run} as {args.name!r} to {args.out}")
        return 0
    partial = _partial(args.out)
    partial.mkdir(parents=True)
    _copy_weights(args.run / summary["artifact"], partial, getattr(torch, args.dtype), base_card.name)
    if summary["full_finetune"]:
        write_servable_names(partial)
    measure = args.references and not summary["full_finetune"]
    references = measure_references(base, partial, base_card.image_size, args.device) if measure else None
    card = model_card(args, summary, base_card, metrics, references)
    found = _predicted(args, base, partial, card) if args.episodes is not None else []
    if found:
        card = card.model_copy(update={"metrics": {**card.metrics, "predict": measured(found)}})
    card.write(partial)
    write_report(partial, card, args.run, summary, found)
    _write_texts(partial, card, base, summary)
    _finish(args.out, partial, card, started)
    return 0


def _predicted(args: argparse.Namespace, base: Path, stored: Path, card: ModelCard) -> list[Prediction]:
    is_adapter = (stored / _ADAPTER_FILES[0]).is_file()
    return predicted(args, base if is_adapter else stored, stored if is_adapter else None, card)


def _export_adapter(args: argparse.Namespace) -> int:
    """Write an exported adapter again, with reference log-probabilities in its card; nothing else changes."""
    started = time.monotonic()
    card = ModelCard.read(args.adapter)
    if not all((args.adapter / name).is_file() for name in _ADAPTER_FILES):
        raise DataError(f"{args.adapter} is not an exported adapter: expected {' and '.join(_ADAPTER_FILES)} in it")
    if args.base is None or not args.references:
        raise UsageError("--adapter adds references, measured on its base: it needs --base and no --no-references")
    found = ModelCard.read(args.base).base_hash
    if card.base_hash is not None and found != card.base_hash:
        raise UsageError(f"{args.base} is not the base of {card.name!r}: its card names another hash; give --base")
    if args.dry_run:
        print(f"export: would write {args.adapter} with reference log-probabilities to {args.out}")
        return 0
    partial = _partial(args.out)
    shutil.copytree(args.adapter, partial)
    references = measure_references(args.base, partial, card.image_size, args.device)
    card = card.model_copy(update={"reference_logprobs": references})
    card.write(partial)
    _finish(args.out, partial, card, started)
    return 0


def _partial(out: Path) -> Path:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def _finish(out: Path, partial: Path, card: ModelCard, started_s: float) -> None:
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    weights = sorted(out.glob("*.safetensors"))
    size_mb = sum(path.stat().st_size for path in weights) / 1e6
    facts = {"name": card.name, "weights_hash": sha256_of_files(weights), "megabytes": round(size_mb, 2)}
    finish("export", out, facts, started_s, f"{card.name}: {card.adapted_modules} modules, {size_mb:.2f} MB")


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
        policy=True,
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
    if scope not in ("full", "language_model") and not args.unservable:
        raise UsageError(
            f"this adapter has scope {scope!r}: vLLM leaves its vision tower's part out or mixes it up without an "
            "error. Train with --scope language_model, or give --unservable for an adapter that only transformers and "
            "PEFT load rightly"
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


def measure_references(base: Path, adapter: Path, image_size: int, device: str = "cpu") -> list[ReferenceLogprobs]:
    """Log-probabilities of the adapter's own greedy answers to the eight probes, under adapter and base.

    Args:
        base: base model folder. adapter: folder of the stored adapter: what a server will load, rounding included.
        image_size: side of the probe pictures in pixels. device: of torch; the model is loaded in float32.
    """
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(adapter)).to(device).eval()
    encoder = Encoder(processor)
    return [
        _reference(prompt, encode_png(probe_image(index, image_size)), Image.fromarray(probe_image(index, image_size)),
                   encoder, adapted)
        for index, prompt in enumerate(PROBE_PROMPTS)
    ]  # fmt: skip


@torch.no_grad()
def _reference(prompt: str, png: bytes, image: Image.Image, encoder: Encoder, adapted: PeftModel) -> ReferenceLogprobs:
    inputs = encoder.processor(
        text=[encoder.prompt_text(prompt, 1)], images=[[image]], add_special_tokens=False, return_tensors="pt"
    ).to(adapted.device)
    start = inputs["input_ids"].shape[1]
    written = adapted.generate(**inputs, do_sample=False, max_new_tokens=REFERENCE_TOKENS)[0, start:].tolist()
    control = set(encoder.tokenizer.all_special_ids) | {image_token(encoder.processor)}
    stop = encoder.tokenizer.convert_tokens_to_ids(encoder.end_of_turn)
    text = encoder.tokenizer.decode(
        [token for token in written if token != stop and token not in control], skip_special_tokens=False
    ).strip()
    # The text is what is stored and scored: its tokens may be others than those that the model chose.
    answer = encoder.encode(prompt, text, 1).answer.astype(np.int64)
    with adapted.disable_adapter():
        base = _answer_logprobs(adapted, inputs, answer)
    return ReferenceLogprobs(
        prompt=prompt,
        image=to_base64(png),
        completion=text,
        token_ids=[int(token) for token in answer],
        logprobs=_answer_logprobs(adapted, inputs, answer),
        base_logprobs=base,
    )


def _answer_logprobs(model: PeftModel, prompt: Any, answer: NDArray[np.int64]) -> list[float]:
    """ln p of each token of the answer [T] after the processor's prompt."""
    tail = torch.from_numpy(answer).to(model.device)[None]
    start, inputs = prompt["input_ids"].shape[1], dict(prompt)
    inputs["input_ids"] = torch.cat([prompt["input_ids"], tail], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.cat([prompt["token_type_ids"], torch.zeros_like(tail)], dim=1)
    logits = model(**inputs).logits[0, start - 1 : -1].float()
    rows = torch.log_softmax(logits, dim=-1)
    return [round(float(value), 6) for value in rows.gather(1, tail[0][:, None])[:, 0]]


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
    if _scope(summary) not in ("full", "language_model"):
        lines += ["", f"Its scope is `{_scope(summary)}`: use it with `--engine transformers`, not with vLLM."]
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
