"""The training run (paper, appendix E): curated examples -> LoRA adapter, by TRL's SFTTrainer and PEFT.

Read top to bottom: presets, what is adapted, the run. The loss is on the answer and its end of turn only. Nothing is
ever cut: lengths are counted first and an overflow is an error (appendix E prints a maximum of 1024 tokens).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.cpu_attention import CPU_ATTENTION
from vlm2vla_training.curation.dataset import ExampleSet, load_examples
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import read_json, write_json
from vlm2vla_training.progress import finish
from vlm2vla_training.sft_data import Collator, Encoder, check_parity, encode_all

# The seven linears of every language layer. The paper's plain list of names would also hit the vision tower's q, k, v,
# which servers then load wrongly without an error.
ADAPTER_SCOPE = r"^model\.language_model\..*\.(q|k|v|o|up|down|gate)_proj$"
LINEARS_PER_LAYER = 7
SETTINGS_FILE = "run.json"
LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of a run. `full_learning_rate` is used when every weight is trained; `bf16` is the precision of
    the computation (autocast), `weights` the type in which the base is loaded.
    """

    rank: int
    alpha: int
    learning_rate: float
    full_learning_rate: float
    batch_size: int
    accumulation: int
    epochs: float
    warmup_steps: int
    weight_decay: float
    max_tokens: int
    weights: str
    bf16: bool
    gradient_checkpointing: bool
    max_grad_norm: float


PRESETS = {
    # Table 4: AdamW (0.9, 0.999, 1e-8), linear decay, bfloat16; micro-batch 1 x accumulation 2 x 4 GPUs = 8.
    "paper": Preset(16, 32, 5e-5, 1e-5, 1, 2, 1.0, 0, 0.0, 1024, "bfloat16", True, True, 1.0),
    # A model of some million parameters on a CPU: same adapter, larger steps; bfloat16 products are twice as quick.
    "twin": Preset(16, 32, 1e-3, 3e-4, 32, 1, 3.0, 50, 0.0, 1024, "float32", True, False, 1.0),
}


def run_sft(args: argparse.Namespace) -> int:
    """`sft`: train, resuming from the newest checkpoint in --out."""
    started = time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    preset = chosen_preset(args)
    card = ModelCard.read(args.base)
    kinds = tuple(args.kinds.split(",")) if args.kinds else None
    examples = merged([load_examples(folder, card.image_size, kinds) for folder in args.examples])
    settings = run_settings(args, preset, card)
    processor = AutoProcessor.from_pretrained(args.base)
    encoder = Encoder(processor)
    encoded = encode_all(examples, encoder, preset.max_tokens)
    lengths = [len(tokens) for tokens in encoded]
    counts = {"examples": len(examples), "images": len(examples.pixels), "kinds": dict(Counter(examples.kinds))}
    counts["tokens"] = {"mean": round(float(np.mean(lengths)), 1), "max": max(lengths)}
    if args.dry_run:
        print(f"sft: would train on {json.dumps(counts)} with {json.dumps(settings['preset'])}")
        return 0
    _check_same_run(args.out, settings)
    collator = Collator(examples, encoded, processor)
    check_parity(examples, collator, encoder)
    trainer, adapted = build_trainer(args, preset, processor, collator, lengths)
    checkpoint = newest_checkpoint(args.out)
    trim_log(args.out / LOG_FILE, checkpoint)
    print(f"sft: {json.dumps(counts)}, {adapted} adapted modules, resume from {checkpoint}", file=sys.stderr)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    target = args.out / ("model" if args.full_finetune else "adapter")
    save(trainer, processor, target)
    summary = {
        **counts,
        "adapted_modules": adapted,
        "steps": int(result.global_step),
        "loss": round(float(result.training_loss), 5),
        "artifact": target.name,
        **settings,
    }
    finish("sft", args.out, summary, started, f"{result.global_step} steps, mean loss {result.training_loss:.4f}")
    return 0


def chosen_preset(args: argparse.Namespace) -> Preset:
    """Apply the command line to the preset."""
    preset = PRESETS[args.preset]
    rate = args.learning_rate
    if rate is None:
        rate = preset.full_learning_rate if args.full_finetune else preset.learning_rate
    changes: dict[str, Any] = {"learning_rate": rate}
    for option, name in (
        ("epochs", "epochs"),
        ("batch_size", "batch_size"),
        ("rank", "rank"),
        ("max_tokens", "max_tokens"),
        ("warmup_steps", "warmup_steps"),
    ):
        if getattr(args, option) is not None:
            changes[name] = getattr(args, option)
    if args.rank is not None:
        changes["alpha"] = 2 * args.rank
    return dataclasses.replace(preset, **changes)


def run_settings(args: argparse.Namespace, preset: Preset, base: ModelCard) -> dict[str, Any]:
    """Collect what identifies a run: a resumed run must have the same."""
    summaries = [read_json(folder / "summary.json") for folder in args.examples]
    variants = {summary["options"]["variant"] for summary in summaries}
    if len(variants) != 1:
        raise UsageError(f"the example folders hold different variants: {sorted(variants)}")
    hashes = [summary["data_hash"] for summary in summaries]
    return {
        "base": base.name,
        "base_path": str(args.base),
        "base_hash": base.base_hash,
        "variant": variants.pop(),
        "sources": sorted({name for summary in summaries for name in summary.get("sources", [])}),
        "plan_source": summaries[0]["options"]["plan_source"],
        "data_hash": hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "full_finetune": bool(args.full_finetune),
        "max_steps": args.max_steps,
        "seed": args.seed,
        "kinds_chosen": args.kinds,
        "preset": {"name": args.preset, **dataclasses.asdict(preset)},
    }


def _check_same_run(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS_FILE
    if path.exists():
        before = read_json(path)
        changed = sorted(key for key in settings if key != "base_path" and before.get(key) != settings[key])
        if changed:
            raise UsageError(f"{out} holds a run with other settings ({', '.join(changed)}); choose another --out")
    write_json(path, settings)


def merged(sets: list[ExampleSet]) -> ExampleSet:
    """Join example sets; the picture numbers of later ones move up."""
    if len(sets) == 1:
        return sets[0]
    result = ExampleSet(np.concatenate([one.pixels for one in sets]), [], [], [], [], [])
    offset = 0
    for one in sets:
        result.images += [[number + offset for number in images] for images in one.images]
        result.prompts += one.prompts
        result.completions += one.completions
        result.kinds += one.kinds
        result.episode_keys += one.episode_keys
        offset += len(one.pixels)
    return result


def build_trainer(
    args: argparse.Namespace, preset: Preset, processor: Any, collator: Collator, lengths: list[int]
) -> tuple[SFTTrainer, int]:
    """Load the base and wrap it. Returns the trainer and the number of adapted modules (0 for a full fine-tune).

    Raises:
        DataError: the scope did not hit the seven linears of every language layer.
    """
    # As a string the model would load in float32 whatever the preset says.
    model = AutoModelForImageTextToText.from_pretrained(args.base, dtype=getattr(torch, preset.weights))
    if not torch.cuda.is_available():
        model.set_attn_implementation(CPU_ATTENTION)
    layers = int(model.config.get_text_config().num_hidden_layers)
    lora = LoraConfig(
        r=preset.rank,
        lora_alpha=preset.alpha,
        lora_dropout=0.0,
        target_modules=ADAPTER_SCOPE,
        task_type="CAUSAL_LM",
    )
    dataset = Dataset.from_dict({"example": list(range(len(lengths))), "length": lengths})
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(args, preset),
        train_dataset=dataset,
        data_collator=lambda rows: {name: torch.from_numpy(array) for name, array in collator(rows).items()},
        processing_class=processor,
        peft_config=None if args.full_finetune else lora,
        callbacks=[JsonlLog(args.out / LOG_FILE)],
    )
    if args.compile:
        whole = trainer.model if args.full_finetune else trainer.model.get_base_model()
        for layer in whole.model.language_model.layers:
            layer.compile(dynamic=True)
    trainer.remove_callback(PrinterCallback)  # JsonlLog says the same in one line
    adapted = sum(name.endswith(".lora_A") for name, _ in trainer.model.named_modules())
    expected = 0 if args.full_finetune else LINEARS_PER_LAYER * layers
    if adapted != expected:
        raise DataError(
            f"the adapter hit {adapted} modules; expected {expected} (7 linears of {layers} language layers)"
        )
    return trainer, adapted


def training_arguments(args: argparse.Namespace, preset: Preset) -> SFTConfig:
    """Translate a preset for TRL. `max_length` stays None: lengths are checked before, nothing is cut."""
    return SFTConfig(
        output_dir=str(args.out),
        per_device_train_batch_size=preset.batch_size,
        gradient_accumulation_steps=preset.accumulation,
        num_train_epochs=preset.epochs,
        max_steps=args.max_steps if args.max_steps is not None else -1,
        learning_rate=preset.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=preset.warmup_steps,
        weight_decay=preset.weight_decay,
        max_grad_norm=preset.max_grad_norm,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        bf16=preset.bf16,
        gradient_checkpointing=preset.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        # Not grouped by length: such batches hold one kind of example each, and their losses swing.
        train_sampling_strategy="random",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=10,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to="none",
        seed=args.seed,
        disable_tqdm=True,
    )


class JsonlLog(TrainerCallback):
    """Appends every logged loss to log.jsonl and shows it with the time left."""

    def __init__(self, path: Path) -> None:
        """Remember where to write."""
        self._path = path
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started, self._first_step = time.monotonic(), int(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line; called by the trainer every `logging_steps`."""
        step = int(state.global_step)
        line = {"step": step, **{key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        rate = (step - self._first_step) / max(time.monotonic() - self._started, 1e-9)
        if "loss" in line and rate > 0:
            left_s = (int(state.max_steps) - step) / rate
            accuracy = line.get("mean_token_accuracy", 0.0)
            print(
                f"sft: step {step}/{state.max_steps}, loss {line['loss']:.4f}, token accuracy {accuracy:.3f}, "
                f"{rate:.2f} steps/s, {left_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def newest_checkpoint(out: Path) -> Path | None:
    """Return the checkpoint-N folder with the largest N that is complete, or None."""
    found = [path for path in out.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def trim_log(path: Path, checkpoint: Path | None) -> None:
    """Drop log lines behind the checkpoint that a run resumes from: those steps are taken again."""
    if not path.exists():
        return
    last = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= last]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)


def save(trainer: SFTTrainer, processor: Any, target: Path) -> None:
    """Write the adapter or the whole model; a full model gets its processor, an adapter uses the base's."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    trainer.model.save_pretrained(partial)
    if target.name == "model":
        processor.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
