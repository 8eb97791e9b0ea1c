"""The training run (paper, appendix E): curated examples -> LoRA adapter, by TRL's SFTTrainer and PEFT.

Read top to bottom: presets, what is adapted, the run. The loss is on the answer and its end of turn only. Nothing is
ever cut: lengths are counted first and an overflow is an error (appendix E prints a maximum of 1024 tokens).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PrinterCallback,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig, SFTTrainer

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.bases import copy_processor, curated_size, load_processor, read_base
from vlm2vla_training.cpu_attention import CPU_ATTENTION
from vlm2vla_training.curation.dataset import ExampleSet, load_examples
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import read_json, read_jsonl, sha256_of_files, write_json
from vlm2vla_training.progress import finish
from vlm2vla_training.sft_data import Collator, Encoder, check_parity, dump, encode_all

# The paper's seven names, and the same of the language model alone. A plain list of names also hits the vision tower's
# q, k, v, which some servers then load wrongly without an error.
PAPER_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
ADAPTER_SCOPE = r"^model\.language_model\..*\.(q|k|v|o|up|down|gate)_proj$"
SCOPES: dict[str, str | list[str]] = {
    "language_model": ADAPTER_SCOPE,
    "paper": list(PAPER_NAMES),
    "all_linear": "all-linear",
}
"""What PEFT is told for each scope; only `language_model` is loaded rightly by every server."""
SETTINGS_FILE = "run.json"
LOG_FILE = "log.jsonl"
DUMP_FILE = "loss.txt"


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of a run; the defaults are Table 4: AdamW (0.9, 0.999, 1e-8), linear decay, bfloat16, and
    micro-batch 1 x accumulation 2 x 4 GPUs = 8.

    `full_learning_rate` is used when every weight is trained (`full`); `bf16` is the precision of the computation
    (autocast), `weights` the type in which the base is loaded, "nf4" 4-bit (QLoRA). `variant` is the only kind of
    example set that the preset takes, None any; `model_type` likewise of the base's config.
    """

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 5e-5
    full_learning_rate: float = 1e-5
    batch_size: int = 1
    accumulation: int = 2
    epochs: float = 1.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_tokens: int = 1024
    weights: str = "bfloat16"
    bf16: bool = True
    gradient_checkpointing: bool = True
    max_grad_norm: float = 1.0
    scope: str = "language_model"
    full: bool = False
    variant: str | None = None
    model_type: str | None = None


PRESETS = {
    # As printed: the seven names wherever they occur. Its adapter runs in transformers and PEFT only.
    "paper": Preset(scope="paper", variant="main"),
    # The same in the language model alone, which vLLM loads rightly too.
    "servable": Preset(variant="main"),
    # Section 4's ablations, "trained identically": action tokens (B.3) and no reasoning.
    "at": Preset(variant="at"),
    "nr": Preset(variant="nr"),
    # VLM2VLA-Q: "identical data and hyperparameters".
    "qwen": Preset(variant="main", model_type="qwen3_vl"),
    "full_finetune": Preset(full=True),
    # One 24 GB GPU: the base in 4 bits, all eight examples of a step on it.
    "qlora": Preset(weights="nf4", accumulation=8),
    # A model of some million parameters on a CPU: same adapter, larger steps; bfloat16 products are twice as quick.
    "twin": Preset(
        learning_rate=1e-3, full_learning_rate=3e-4, batch_size=32, accumulation=1, epochs=3.0, warmup_steps=50,
        weights="float32", gradient_checkpointing=False,
    ),
}  # fmt: skip


def expected_modules(config: Any, scope: str) -> int:
    """How many linears `scope` must adapt, from a base's config alone; docs/train.md derives the counts by hand.

    Raises:
        UsageError: the scope reaches into a vision tower whose linears are not counted here.
    """
    text = config.get_text_config()
    vision: Any = getattr(config, "vision_config", None)
    language = len(PAPER_NAMES) * int(text.num_hidden_layers)
    if scope == "language_model":
        return language
    tower = getattr(vision, "model_type", None)
    if tower == "siglip_vision_model":  # q, k, v have the paper's names; out_proj, fc1, fc2 have not
        return language + (3 if scope == "paper" else 6) * int(vision.num_hidden_layers)
    if tower in ("qwen3_vl", "qwen3_vl_vision"):  # attn.qkv, attn.proj, linear_fc1, linear_fc2: none has
        mergers = 1 + len(vision.deepstack_visual_indexes)
        return language + (0 if scope == "paper" else 4 * int(vision.depth) + 2 * mergers)
    raise UsageError(f"scope {scope!r} is not counted for a vision tower {tower!r}; use --scope language_model")


def lora_config(preset: Preset) -> LoraConfig:
    """The adapter of a preset. The paper names no dropout: none."""
    targets = SCOPES[preset.scope]
    return LoraConfig(
        r=preset.rank, lora_alpha=preset.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )


def adapted_modules(model: torch.nn.Module) -> list[str]:
    """Names of the modules that carry an adapter."""
    return [name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")]


def check_adapted(model: torch.nn.Module, config: Any, scope: str) -> int:
    """Count the adapted modules.

    Raises:
        DataError: the scope did not hit exactly what it should.
    """
    found, expected = len(adapted_modules(model)), expected_modules(config, scope)
    if found != expected:
        raise DataError(f"scope {scope!r} adapted {found} modules of {config.model_type}; expected {expected}")
    return found


def continued_from(adapter: Path | None, base: ModelCard, preset: Preset, variant: str) -> dict[str, str] | None:
    """Identify the exported adapter that a run begins with; None for a fresh one.

    Raises:
        UsageError: it is of another base, variant, rank or scope than this run, or every weight is to be trained.
    """
    if adapter is None:
        return None
    if preset.full:
        raise UsageError("--adapter begins with an adapter's weights; a full fine-tune has none")
    card = ModelCard.read(adapter)
    expected: dict[str, Any] = {"base_hash": base.base_hash, "variant": variant, "rank": preset.rank,
                                "alpha": preset.alpha, "scope": SCOPES[preset.scope]}  # fmt: skip
    stored = read_json(adapter / "adapter_config.json")
    found: dict[str, Any] = {"base_hash": card.base_hash, "variant": card.training.get("variant", variant),
                             "rank": stored["r"], "alpha": stored["lora_alpha"],
                             "scope": stored["target_modules"]}  # fmt: skip
    if isinstance(found["scope"], list) and isinstance(expected["scope"], list):
        found["scope"], expected["scope"] = sorted(found["scope"]), sorted(expected["scope"])
    other = [f"{key} {found[key]!r}, not {expected[key]!r}" for key in expected if found[key] != expected[key]]
    if other:
        raise UsageError(f"{adapter} cannot be continued by this run: its {'; its '.join(other)}")
    return {"name": card.name, "weights_hash": sha256_of_files(sorted(adapter.glob("*.safetensors")))}


def run_sft(args: argparse.Namespace) -> int:
    """`sft`: train, resuming from the newest checkpoint in --out."""
    started = time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    preset = chosen_preset(args)
    card = read_base(args.base, curated_size(args.examples[0]))
    kinds = tuple(args.kinds.split(",")) if args.kinds else None
    examples = merged([load_examples(folder, card.image_size, kinds) for folder in args.examples])
    settings = run_settings(args, preset, card)
    check_base(args, preset)
    processor = load_processor(args.base)
    encoder = Encoder(processor, card.image_size)
    encoded = encode_all(examples, encoder, preset.max_tokens)
    lengths = [len(tokens) for tokens in encoded]
    training, held_out = split_by_episode(examples.episode_keys, args.held_out)
    collator = Collator(examples, encoded, processor)
    counts: dict[str, Any] = {
        "examples": len(examples),
        "images": len(examples.pixels),
        "kinds": dict(Counter(examples.kinds)),
        "image_size": card.image_size,
    }
    counts["held_out_examples"] = len(held_out)
    counts["tokens"] = {"mean": round(float(np.mean(lengths)), 1), "max": max(lengths)}
    if args.dry_run:
        print(f"sft: would train on {json.dumps(counts)} with {json.dumps(settings['preset'])}")
        print(dump(examples, collator, encoder, args.dump), end="")
        return 0
    first = int(os.environ.get("RANK", "0")) == 0  # of several processes one writes
    checkpoint = newest_checkpoint(args.out)
    _check_same_run(args.out, settings, write=first)
    check_parity(examples, collator, encoder)
    if first:
        trim_log(args.out / LOG_FILE, checkpoint)
        if args.dump:
            (args.out / DUMP_FILE).write_text(dump(examples, collator, encoder, args.dump), encoding="utf-8")
    model = load_base(args.base, preset)
    trainer, adapted = build_trainer(args, preset, model, processor, collator, rows_of(training), rows_of(held_out))
    print(f"sft: {json.dumps(counts)}, {adapted} adapted modules, resume from {checkpoint}", file=sys.stderr)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if held_out:
        trainer.evaluate()
    if not first:
        return 0
    target = args.out / ("model" if preset.full else "adapter")
    if preset.full:
        trainer.model.to(getattr(torch, preset.weights))
    save(trainer, args.base, target)
    losses = logged(args.out / LOG_FILE, "loss") or [float(result.training_loss)]
    held_out_losses = logged(args.out / LOG_FILE, "eval_loss")
    summary = {
        **counts,
        "adapted_modules": adapted,
        "steps": int(result.global_step),
        "loss": round(float(np.mean(losses)), 5),
        "held_out_loss": held_out_losses[-1] if held_out_losses else None,
        "artifact": target.name,
        **settings,
    }
    finish("sft", args.out, summary, started, f"{result.global_step} steps, mean loss {summary['loss']}")
    return 0


def split_by_episode(keys: list[str], fraction: float) -> tuple[list[int], list[int]]:
    """Example numbers to train on and to hold out. Whole episodes are held out: frames of one episode are alike. Which
    depends on the keys alone, so that two runs on the same data hold out the same.

    Raises:
        UsageError: `fraction` is not in [0, 1), or leaves a side empty.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"--held-out {fraction}: expected at least 0 and less than 1")
    episodes = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    held = set(episodes[: round(fraction * len(episodes))])
    if fraction and len(held) in (0, len(episodes)):
        raise UsageError(f"--held-out {fraction} of {len(episodes)} episodes leaves one side empty")
    places = range(len(keys))
    return [i for i in places if keys[i] not in held], [i for i in places if keys[i] in held]


def rows_of(numbers: list[int]) -> Dataset | None:
    """What the collator turns into batches; None when there is nothing."""
    return Dataset.from_dict({"example": numbers}) if numbers else None


def logged(path: Path, key: str) -> list[float]:
    """Every value of `key` in log.jsonl, across resumptions."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [float(value[key]) for value in map(json.loads, lines) if key in value]


def chosen_preset(args: argparse.Namespace) -> Preset:
    """Apply the command line to the preset."""
    preset = PRESETS[args.preset]
    full = preset.full or bool(args.full_finetune)
    rate = args.learning_rate
    if rate is None:
        rate = preset.full_learning_rate if full else preset.learning_rate
    changes: dict[str, Any] = {"learning_rate": rate, "full": full}
    for name in ("epochs", "batch_size", "accumulation", "rank", "max_tokens", "warmup_steps", "scope"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    if args.rank is not None:
        changes["alpha"] = 2 * args.rank
    return dataclasses.replace(preset, **changes)


def run_settings(args: argparse.Namespace, preset: Preset, base: ModelCard) -> dict[str, Any]:
    """Collect what identifies a run: a resumed run must have the same."""
    summaries = [read_json(folder / "summary.json") for folder in args.examples]
    variants = {summary["options"]["variant"] for summary in summaries}
    if len(variants) != 1:
        raise UsageError(f"the example folders hold different variants: {sorted(variants)}")
    if preset.variant is not None and variants != {preset.variant}:
        raise UsageError(
            f"preset {args.preset!r} is for examples of variant {preset.variant!r}, these are {variants.pop()!r}; "
            "choose another preset, or curate with --variant"
        )
    hashes = [summary["data_hash"] for summary in summaries]
    variant = str(variants.pop())
    continued = continued_from(args.adapter, base, preset, variant)
    return {
        "base": base.name,
        "base_path": str(args.base),
        "base_hash": base.base_hash,
        "variant": variant,
        "sources": sorted({name for summary in summaries for name in summary.get("sources", [])}),
        "plan_source": summaries[0]["options"]["plan_source"],
        "data_hash": hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "full_finetune": preset.full,
        "max_steps": args.max_steps,
        "seed": args.seed,
        "kinds_chosen": args.kinds,
        "held_out": args.held_out,
        "continued_from": continued,
        "preset": {"name": args.preset, **dataclasses.asdict(preset)},
    }


def check_base(args: argparse.Namespace, preset: Preset) -> None:
    """Refuse a base that the preset is not for, before anything large is read.

    Raises:
        UsageError: see the message.
    """
    config = AutoConfig.from_pretrained(args.base)
    if preset.model_type not in (None, config.model_type):
        raise UsageError(f"preset {args.preset!r} is for {preset.model_type}, {args.base} is {config.model_type}")
    if not preset.full:
        expected_modules(config, preset.scope)
    if preset.weights == "nf4" and (importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available()):
        raise UsageError(
            f"preset {args.preset!r} needs a CUDA GPU and bitsandbytes; install vlm2vla-training[qlora] there"
        )


def _check_same_run(out: Path, settings: dict[str, Any], write: bool) -> None:
    path = out / SETTINGS_FILE
    if path.exists():
        before = read_json(path)
        changed = sorted(key for key in settings if key != "base_path" and before.get(key) != settings[key])
        if changed:
            raise UsageError(f"{out} holds a run with other settings ({', '.join(changed)}); choose another --out")
    if write:
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
    args: argparse.Namespace,
    preset: Preset,
    model: Any,
    processor: Any,
    collator: Callable[[list[dict[str, Any]]], dict[str, NDArray[Any]]],
    training: Dataset,
    held_out: Dataset | None,
) -> tuple[SFTTrainer, int]:
    """Wrap a loaded base. Returns the trainer and the number of adapted modules (0 for a full fine-tune).

    Raises:
        DataError: the scope did not hit exactly the modules that it should.
    """
    config = model.config
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, str(args.adapter), is_trainable=True)
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(args, preset, held_out is not None),
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=lambda rows: {name: torch.from_numpy(array) for name, array in collator(rows).items()},
        processing_class=processor,
        peft_config=None if preset.full or args.adapter is not None else lora_config(preset),
        callbacks=callbacks(args),
    )
    if args.compile:
        whole = trainer.model if preset.full else trainer.model.get_base_model()
        for layer in whole.model.language_model.layers:
            layer.compile(dynamic=True)
    trainer.remove_callback(PrinterCallback)  # JsonlLog says the same in one line
    return trainer, 0 if preset.full else check_adapted(trainer.model, config, preset.scope)


def callbacks(args: argparse.Namespace) -> list[TrainerCallback]:
    """What writes the losses down; of several processes the first."""
    found: list[TrainerCallback] = [JsonlLog(args.out / LOG_FILE)]
    if not args.no_tensorboard and int(os.environ.get("RANK", "0")) == 0:
        found.append(TensorBoardCallback(SummaryWriter(str(args.out / "tensorboard"))))
    return found


def load_base(folder: Path, preset: Preset) -> Any:
    """Load the base in the preset's type: as a mere path it would be float32 whatever the preset says.

    A full fine-tune needs float32 weights: an update of 1e-5 is lost in bfloat16. ZeRO keeps such weights itself.
    """
    if preset.weights == "nf4":
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=quantized, dtype=torch.bfloat16)
    kept_elsewhere = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    weights = "float32" if preset.full and not kept_elsewhere else preset.weights
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, weights))
    if not torch.cuda.is_available():
        model.set_attn_implementation(CPU_ATTENTION)
    return model


def training_arguments(args: argparse.Namespace, preset: Preset, held_out: bool) -> SFTConfig:
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
        # A checkpoint holds no half of an average: a resumed run logs the same losses as an uninterrupted one.
        logging_steps=math.gcd(args.save_steps, 10),
        eval_strategy="steps" if held_out else "no",
        eval_steps=args.save_steps,
        per_device_eval_batch_size=preset.batch_size,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to="none",  # `callbacks` writes the logs, TensorBoard's to this run's own folder
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
        if not state.is_world_process_zero:
            return
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
    found = [path for path in out.glob("checkpoint-*") if _is_complete(path / "trainer_state.json")]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_complete(state: Path) -> bool:
    """The trainer writes this file last, but not at once: a kill can leave a part of it."""
    try:
        return "global_step" in json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def trim_log(path: Path, checkpoint: Path | None) -> None:
    """Drop log lines behind the checkpoint that a run resumes from: those steps are taken again."""
    if not path.exists():
        return
    last = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    lines = [json.dumps(line) for line in read_jsonl(path) if line["step"] <= last]  # a torn last line is left out
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, path)


def save(trainer: SFTTrainer, base: Path, target: Path) -> None:
    """Write the adapter or the whole model; a full model gets its processor, an adapter uses the base's."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    trainer.model.save_pretrained(partial)
    if target.name == "model":
        copy_processor(base, partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
