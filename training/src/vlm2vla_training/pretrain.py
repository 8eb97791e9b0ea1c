"""The twin's base model: a small Gemma-3 trained from nothing on pictures of the twin and questions about them.

The network is in :mod:`vlm2vla_training.twin_model`, its batches in :mod:`vlm2vla_training.pretrain_batches`, the
command line in :mod:`vlm2vla_training.pretrain_command`. Besides the language loss, linear heads on the vision tower's
tokens say which things a patch shows and where things stand; they give the tower something to learn before the language
model can read it, and are thrown away at the end. No robot action is in this data.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from vlm2vla_training.cpu_attention import CPU_ATTENTION
from vlm2vla_training.pretrain_batches import (
    DIGIT_CLASSES,
    DIGIT_WEIGHTS,
    THINGS,
    Batch,
    Batcher,
    DenseTargets,
    Stills,
    independent_turns,
    to_pixels,
)
from vlm2vla_training.pretrain_settings import Settings
from vlm2vla_training.twin_model import TOKENS, build_model, build_tokenizer, save_base


class DenseHeads(nn.Module):
    """Linear readings of the vision tower: what a patch shows and how far beside it, and where things stand.

    Every image token is also the slot of one thing. Numbers are read from a slot by the same weights for every thing,
    as values and as decimal digits: what the language model has to say later lies ready at a place that it can learn.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.here = nn.Linear(width, len(THINGS))
        self.aside = nn.Linear(width, 2 * len(THINGS))
        self.held = nn.Linear(width, len(THINGS))
        self.there = nn.Linear(width, 1)
        self.value = nn.Linear(width, 7)
        self.digit = nn.Linear(width, 7 * sum(DIGIT_CLASSES))
        self.said = nn.Linear(width, 3)

    def forward(self, patches: Tensor, targets: DenseTargets) -> tuple[Tensor, Tensor, float]:
        """Losses of what [B, 64, width] shows and of positions, and the mean horizontal offset error in millimetres."""
        binary, smooth = nn.functional.binary_cross_entropy_with_logits, nn.functional.smooth_l1_loss
        shows = binary(self.here(patches), targets.here.float(), pos_weight=torch.tensor(8.0))
        aside = self.aside(patches).unflatten(-1, (len(THINGS), 2))[targets.here]
        shows = shows + 2.0 * smooth(aside, targets.aside[targets.here], beta=0.1)
        held = targets.held[:, None].expand_as(targets.here)[targets.here]
        shows = shows + binary(self.held(patches)[targets.here], held, pos_weight=torch.tensor(2.0))
        slots = patches.view(-1, TOKENS, 2, TOKENS, 2, patches.shape[-1]).mean(dim=(2, 4)).flatten(1, 2)
        shows = shows + 0.5 * binary(self.there(slots)[..., 0], targets.there.float())
        slots, values, digits = slots[targets.there], targets.values[targets.there], targets.digits[targets.there]
        guess = self.value(slots)
        position = 2.0 * smooth(guess, values, beta=0.1)
        logits = self.digit(slots).view(-1, 7, sum(DIGIT_CLASSES)).split(DIGIT_CLASSES, dim=-1)
        for index, part in enumerate(logits):
            weight = DIGIT_WEIGHTS[index]
            position = position + weight * nn.functional.cross_entropy(part.flatten(0, 1), digits[..., index].flatten())
        distance = (guess - values)[:, :2].norm(dim=-1).mean()
        return shows, position, float(distance.detach()) * 100.0

    def reading(self, states: Tensor, vectors: Tensor) -> Tensor:
        """Loss of reading the vector that is being said off a language layer's states [B, T, width]."""
        known = ~vectors.isnan()
        error = nn.functional.smooth_l1_loss(self.said(states), vectors.nan_to_num(), reduction="none", beta=0.1)
        return (error * known).sum() / known.sum().clamp(min=1)


def train(stills: Stills, held_out: Stills, out: Path, settings: Settings) -> dict[str, Any]:
    """Pre-train and write the base to ``out/base``; resumes from ``out/state.pt`` where a run stopped.

    Blocks for an hour. First the tower alone learns to see, then the whole model learns to speak about what it sees.

    Returns:
        the metrics that also go into the model card.
    """
    torch.set_num_threads(settings.threads)
    run = Run(stills, out, settings)
    began, total = time.monotonic(), settings.tower_steps + settings.steps
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        for step in range(run.start, total):
            run.set_learning_rates(step)
            line = run.see(step) if step < settings.tower_steps else run.speak(step - settings.tower_steps)
            if step % 50 == 0 or step == total - 1:
                line = {"step": step, **line, "seconds": round(time.monotonic() - began, 1)}
                if step % 500 == 0 and step > settings.tower_steps:
                    line |= offset_errors(run.model, run.tokenizer, held_out)
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(line, flush=True)
            if step % 250 == 249 or step == total - 1:
                run.save(step + 1)
    spread_unmet(run.model, run.met, settings.seed)
    metrics = offset_errors(run.model, run.tokenizer, held_out, most=400)
    save_base(run.model, run.tokenizer, out / "base", {**asdict(settings), "stills": len(stills.truths)}, metrics)
    return metrics


class Run:
    """Model, heads, optimizer and data of one pre-training run, and the two kinds of step it takes."""

    def __init__(self, stills: Stills, out: Path, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        out.mkdir(parents=True, exist_ok=True)
        self.stills, self.settings, self.state = stills, settings, out / "state.pt"
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer, settings.seed).train()
        self.model.set_attn_implementation(CPU_ATTENTION)
        self.tower = self.model.model.vision_tower
        self.heads = DenseHeads(int(self.model.config.vision_config.hidden_size))
        self.batcher = Batcher(stills, self.tokenizer, settings)
        self._patches: list[Tensor] = []
        self._states: list[Tensor] = []
        self.tower.register_forward_hook(lambda module, args, output: self._patches.append(output.last_hidden_state))
        self.model.model.language_model.layers[-2].register_forward_hook(
            lambda module, args, output: self._states.append(output[0] if isinstance(output, tuple) else output)
        )
        seeing = [*self.tower.parameters(), *self.heads.parameters()]
        known = {id(parameter) for parameter in seeing}
        speaking = [parameter for parameter in self.model.parameters() if id(parameter) not in known]
        self.parameters = [*seeing, *speaking]
        groups = [
            {
                "params": [p for p in part if (p.dim() > 1) == decayed],
                "weight_decay": settings.weight_decay * decayed,
                "name": name,
            }
            for name, part in (("seeing", seeing), ("speaking", speaking))
            for decayed in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        if settings.compile:
            for layer in self.tower.encoder.layers:
                layer.compile(dynamic=False)
            for layer in self.model.model.language_model.layers:
                layer.compile(dynamic=True)
        self.start, self.met = 0, torch.zeros(self.model.config.text_config.vocab_size, dtype=torch.bool)
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.heads.load_state_dict(saved["heads"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.start, self.met = int(saved["step"]), saved["met"]

    def set_learning_rates(self, step: int) -> None:
        """Warm-up and cosine, once for the tower alone and once for everything; the tower is then changed gently."""
        settings, spoken = self.settings, step - self.settings.tower_steps
        seeing, speaking = 0.0, 0.0
        if spoken < 0:
            seeing = settings.tower_learning_rate * learning_rate_share(step, settings.warmup, settings.tower_steps)
        else:
            speaking = settings.learning_rate * learning_rate_share(spoken, settings.warmup, settings.steps)
            seeing = speaking * settings.tower_share
        for group in self.optimizer.param_groups:
            group["lr"] = seeing if group["name"] == "seeing" else speaking

    def see(self, step: int) -> dict[str, float]:
        """One step of the tower and the dense heads alone."""
        rng = np.random.default_rng([13, self.settings.seed, step])
        picks = rng.integers(len(self.stills.truths), size=self.settings.tower_batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            patches = self.tower(to_pixels(self.stills.pictures[picks])).last_hidden_state
        presence, position, error_mm = self.heads(patches.float(), self.stills.dense_targets(picks))
        self._step(presence + position)
        return {"presence": _number(presence), "position": _number(position), "tower_error_mm": round(error_mm, 2)}

    def speak(self, step: int) -> dict[str, float]:
        """One step of everything: the language loss and, beside it, the dense ones."""
        batch = self.batcher.batch(step)
        self._patches.clear()
        self._states.clear()
        self.met[batch.input_ids] = True
        language = language_loss(self.model, batch)
        presence, position, error_mm = self.heads(self._patches[0].float(), self.stills.dense_targets(batch.picks))
        reading = self.heads.reading(self._states[0].float(), batch.vectors)
        self._step(language + self.settings.dense_weight * (presence + position + reading))
        return {
            "language": _number(language),
            "reading": _number(reading),
            "presence": _number(presence),
            "position": _number(position),
            "tower_error_mm": round(error_mm, 2),
        }

    def _step(self, loss: Tensor) -> None:
        self._patches.clear()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def save(self, step: int) -> None:
        """Write the state so that a run killed at any moment resumes from the last whole one."""
        part = self.state.with_suffix(".part")
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
            "met": self.met,
        }
        torch.save(state, part)
        part.replace(self.state)


def language_loss(model: Gemma3ForConditionalGeneration, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch's answers, in nat a token; every turn sees the pictures and itself alone."""
    seen, positions = independent_turns(batch)
    told = batch.labels[:, 1:] != -100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.model(
            input_ids=batch.input_ids, attention_mask={"full_attention": seen, "sliding_attention": seen},
            position_ids=positions, pixel_values=batch.pictures,
            token_type_ids=batch.image_mask.long(), use_cache=False,
        )  # fmt: skip
        # Scores over the vocabulary only where a loss falls: two thirds of the tokens are asked, not told.
        logits = model.lm_head(output.last_hidden_state[:, :-1][told])
    return nn.functional.cross_entropy(logits.float(), batch.labels[:, 1:][told])


@torch.no_grad()
def spread_unmet(model: Gemma3ForConditionalGeneration, met: Tensor, seed: int) -> None:
    """Give the tokens that stood in no question and no answer (``met`` [vocabulary] is False) directions of their own.

    The loss only ever pushes them down, all the same way, until no two can be told apart (cosine 0.99). Embeddings are
    tied, and an adapter does not change them: it could then say none of these words clearly, such as a verdict's true
    and false. What is left of the common direction keeps the base from saying them.
    """
    weights = model.get_input_embeddings().weight
    if bool(met.all()):
        return
    normalize = nn.functional.normalize
    common = normalize(weights[~met].mean(dim=0), dim=0)
    own = torch.randn(int((~met).sum()), weights.shape[1], generator=torch.Generator().manual_seed(seed))
    weights[~met] = (common + UNMET_NORM * normalize(own, dim=1)).to(weights.dtype)


UNMET_NORM = 1.2
"""Of their own part; the embeddings of words that are said have about as much."""


def _number(value: Tensor) -> float:
    return round(float(value.detach()), 4)


def learning_rate_share(step: int, warmup: int, steps: int) -> float:
    """Share of the peak at a step: linear warm-up, then a cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return 0.02 + 0.98 * 0.5 * (1.0 + float(np.cos(np.pi * done)))


@torch.no_grad()
def offset_errors(
    model: Gemma3ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, stills: Stills, most: int = 96
) -> dict[str, float]:
    """Ask for the offset to the point above the carrot on held-out pictures; horizontal errors in millimetres.

    Answers that do not parse count as 300 mm. Empty when no picture shows a carrot outside the gripper.
    """
    batcher = Batcher(stills, tokenizer, Settings())
    picks = [i for i, truth in enumerate(stills.truths) if "carrot" in truth.objects and truth.held != "carrot"][:most]
    if not picks:
        return {}
    question = "Offset in metres from the gripper to the point above the carrot?"
    prompt = torch.tensor(batcher.chat(1, [(question, "")]).ids[:-1])
    model.eval()
    errors = []
    for first in range(0, len(picks), 48):
        part = picks[first : first + 48]
        tokens = prompt.expand(len(part), -1)
        answers = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            token_type_ids=(tokens == batcher.soft).long(),
            pixel_values=to_pixels(stills.pictures[part]),
            max_new_tokens=28,
            do_sample=False,
        )
        for index, answer in zip(part, answers[:, tokens.shape[1] :], strict=True):
            dx, dy, _ = stills.truths[index].offset("carrot")
            try:
                guess = json.loads(tokenizer.decode(answer, skip_special_tokens=True))
                errors.append(1000.0 * float(np.hypot(guess[0] - dx, guess[1] - dy)))
            except (ValueError, TypeError, IndexError):
                errors.append(300.0)
    model.train()
    return {
        "offset_median_mm": round(float(np.median(errors)), 1),
        "offset_within_1cm": round(float(np.mean(np.asarray(errors) <= 10.0)), 3),
        "offset_within_2cm": round(float(np.mean(np.asarray(errors) <= 20.0)), 3),
    }
