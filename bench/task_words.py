"""An experiment with the twin's base: it goes on with questions about what a task means, in four languages.

    vlm2vla-train pretrain --out work/none --stills work/stills --render 12000 --steps 1 --tower-steps 0    # the stills
    python bench/task_words.py train --base models/twin/base --stills work/stills --steps 2200 --out work/words
    python bench/task_words.py ask --base work/words/base --stills work/stills

The robot data speak English, so an adapter learns to copy the thing's name from the task into its list of subtasks, and
a foreign task has nothing to copy (models/twin/README.md). Here the base itself is taught which thing a task means,
and more about what lies above which card; no plan, list of subtasks or action is in it. The committed base is not
changed (round 16 had stills of seeds 200,000 to 211,999). `train` goes on with the language loss alone, the tower at a
tenth of the learning rate; it resumes from OUT/state.pt. `ask` prints right answers of the base to the new questions
on held-out stills, by language.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vlm2vla_training import pretrain_data
from vlm2vla_training.cpu_attention import CPU_ATTENTION
from vlm2vla_training.pretrain import language_loss, learning_rate_share, offset_errors, spread_unmet
from vlm2vla_training.pretrain_batches import Batcher, Stills, to_pixels
from vlm2vla_training.pretrain_data import GRASPABLE, HOVER_M, NAMES, Pair, list_m, q_card
from vlm2vla_training.pretrain_settings import Settings
from vlm2vla_training.twin_model import save_base
from vlm2vla_twin.scene import KINDS
from vlm2vla_twin.truth import Truth

TAKE = (
    ("pick up the {}", "recoge la {}", "拿起{}", "{} उठाओ"),
    ("take the {}", "toma la {}", "拿{}", "{} लो"),
    ("lift the {}", "levanta la {}", "举起{}", "{} ऊपर उठाओ"),
    ("grasp the {}", "agarra la {}", "抓住{}", "{} पकड़ो"),
    ("bring me the {}", "tráeme la {}", "把{}给我", "मुझे {} दो"),
)
PLACE = (
    ("put the {} in the {}", "pon la {} en la {}", "把{}放进{}", "{} को {} में रखो"),
    ("put the {} on the {}", "coloca la {} sobre la {}", "把{}放在{}上", "{} को {} पर रखो"),
    ("move the {} to the {}", "mueve la {} a la {}", "把{}移到{}", "{} को {} तक ले जाओ"),
)
"""English, Spanish, Mandarin, Hindi; the article is always "la", as in `pretrain`."""
SPANISH = re.compile("'(" + "|".join(texts[1].split()[0] for texts in (*TAKE, *PLACE)) + ") ")
WEIGHTS = {"q_translate": 1.0, "q_card": 9.0}
TASK_WEIGHT = 5.0


def named(name: str, language: int, rng: np.random.Generator) -> str:
    """A thing's name in a language; English ones sometimes as titles."""
    word = NAMES[name][language]
    return word.title() if language == 0 and rng.random() < 0.2 else word


def task_of(truth: Truth, rng: np.random.Generator) -> tuple[str, str] | None:
    """A task in words and the thing that it means, the first of two; None where a card was wanted and there is none."""
    language = int(rng.integers(4))
    if truth.cards and rng.random() < 0.2:
        card = str(rng.choice(list(truth.cards)))
        above = truth.above_card(card)
        verb = TAKE[int(rng.integers(4))][0]
        return None if above is None else (verb.format(f"item above the {card}"), above)
    one = str(rng.choice(GRASPABLE))
    if rng.random() < 0.6:
        return TAKE[int(rng.integers(len(TAKE)))][language].format(named(one, language, rng)), one
    other = str(rng.choice([name for name in KINDS if name != one]))
    words = (named(name, language, rng) for name in (one, other))
    return PLACE[int(rng.integers(len(PLACE)))][language].format(*words), one


def q_task(truth: Truth, rng: np.random.Generator) -> Pair | None:
    """Which thing a task means, by name or by where it is."""
    found = task_of(truth, rng)
    if found is None:
        return None
    task, thing = found
    name, kind = NAMES[thing][0], int(rng.integers(4))
    if kind == 1:
        return f"Task: '{task}'. Which object is taken?", name.title()
    if kind == 2:
        return f"What must the gripper go to for the overall task '{task}'?", f"the {name}"
    if kind == 3 and thing in truth.objects:
        dx, dy, _ = truth.offset(thing)
        above = list_m((dx, dy, HOVER_M - truth.gripper_m[2]))
        return f"Offset in metres from the gripper to the point above what the task '{task}' means?", above
    return f"Which object does the task '{task}' mean first?", name


def ask_for_tasks() -> None:
    """Let `pretrain`'s conversations hold the new questions and more about cards."""
    usual = tuple((make, WEIGHTS.get(make.__name__, weight)) for make, weight in pretrain_data.QUESTIONS)
    pretrain_data.QUESTIONS = (*usual, (q_task, TASK_WEIGHT))


# --- training ---------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Go on from a base; OUT/base is the new one."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    ask_for_tasks()
    settings = Settings(
        tower_steps=0, steps=args.steps, learning_rate=args.learning_rate, tower_share=0.1, seed=args.seed,
        threads=args.threads, compile=True,
    )  # fmt: skip
    stills, held_out = (Stills.load(args.stills / part) for part in ("train", "dev"))
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForImageTextToText.from_pretrained(args.base, dtype=torch.float32).train()
    met = steps(model, Batcher(stills, tokenizer, settings), settings, args.out)
    spread_unmet(model, met, args.seed)
    metrics = offset_errors(model, tokenizer, held_out, most=200)
    print(metrics)
    save_base(model, tokenizer, args.out / "base", {**asdict(settings), "stills": len(stills.truths)}, metrics)
    return 0


def steps(model: Any, batcher: Batcher, settings: Settings, out: Path) -> torch.Tensor:
    """All steps, from out/state.pt on where there is one; which tokens were met, bool [vocabulary]."""
    model.set_attn_implementation(CPU_ATTENTION)
    for layer in model.model.vision_tower.encoder.layers:
        layer.compile(dynamic=False)
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)
    optimizer, state = optimizer_of(model, settings), out / "state.pt"
    met, start = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool), 0
    out.mkdir(parents=True, exist_ok=True)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, met = int(saved["step"]), saved["met"]
    began, smooth = time.monotonic(), float("nan")
    for step in range(start, settings.steps):
        rate = settings.learning_rate * learning_rate_share(step, settings.warmup, settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        batch = batcher.batch(step)
        met[batch.input_ids] = True
        loss = language_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = float(loss) if step == start else 0.98 * smooth + 0.02 * float(loss)
        if step % 25 == 0:
            pace = (step - start + 1) / (time.monotonic() - began)
            print(f"step {step}/{settings.steps}, loss {smooth:.4f}, {pace:.2f} steps/s", flush=True)
        if step % 250 == 249 or step == settings.steps - 1:
            part = state.with_suffix(".part")
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "met": met}
            torch.save(kept, part)
            part.replace(state)
    return met


def optimizer_of(model: Any, settings: Settings) -> torch.optim.AdamW:
    """As in `pretrain`, but the tower's weights do not decay; "share" is of the learning rate."""
    tower = list(model.model.vision_tower.parameters())
    seeing = set(map(id, tower))
    speaking = [parameter for parameter in model.parameters() if id(parameter) not in seeing]
    return torch.optim.AdamW([
        {"params": tower, "weight_decay": 0.0, "share": settings.tower_share},
        {"params": [one for one in speaking if one.dim() > 1], "weight_decay": settings.weight_decay, "share": 1.0},
        {"params": [one for one in speaking if one.dim() <= 1], "weight_decay": 0.0, "share": 1.0},
    ], betas=(0.9, 0.98))  # fmt: skip


# --- asking -----------------------------------------------------------------------------------------------------------


def language_of(question: str) -> str:
    """By its script, or by the verb of a Spanish task."""
    if "above the" in question and "point above" not in question:
        return "item above a card"
    for language, script in (("Mandarin", "[\u4e00-\u9fff]"), ("Hindi", "[\u0900-\u097f]")):
        if re.search(script, question):
            return language
    return "Spanish" if SPANISH.search(question) else "English"


def ask(args: argparse.Namespace) -> int:
    """Print how many of the new questions, and of those about cards, a base answers rightly on held-out stills."""
    torch.set_num_threads(args.threads)
    stills, rng = Stills.load(args.stills / "dev"), np.random.default_rng(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForImageTextToText.from_pretrained(args.base, dtype=torch.float32).eval()
    batcher = Batcher(stills, tokenizer, Settings())
    right: dict[str, list[bool]] = defaultdict(list)
    for make in (q_task, q_card):
        asked = 0
        while asked < args.questions:
            number = int(rng.integers(len(stills.truths)))
            pair = make(stills.truths[number], rng)
            if pair is None or (make is q_card and "above" not in pair[0]):
                continue
            asked += 1
            ids = torch.tensor([batcher.chat(1, [(pair[0], "")]).ids[:-1]])
            with torch.no_grad():
                said = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=(ids == batcher.soft).long(),
                    pixel_values=to_pixels(stills.pictures[[number]]), max_new_tokens=28, do_sample=False,
                )  # fmt: skip
            text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
            sort = "card" if make is q_card else f"task, {language_of(pair[0])}"
            right[f"{sort}, where" if pair[1].startswith("[") else sort].append(agrees(text, pair[1]))
    for sort, answers in sorted(right.items()):
        print(f"{sort}: {sum(answers)} of {len(answers)}")
    return 0


def agrees(said: str, expected: str) -> bool:
    """The same words; of places within 2 cm on the counter."""
    if not expected.startswith("["):
        return said == expected
    try:
        (x, y, _), (there_x, there_y, _) = json.loads(said), json.loads(expected)
        return math.hypot(x - there_x, y - there_y) < 0.02
    except (ValueError, TypeError):
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Train or ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "ask"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--stills", type=Path, required=True, help="of `pretrain --render`: train/ and dev/ in it")
    parser.add_argument("--out", type=Path, default=None, help="of train")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=300, help="of each of the two sorts to ask")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.what == "train" and args.out is None:
        parser.error("train needs --out")
    return train(args) if args.what == "train" else ask(args)


if __name__ == "__main__":
    sys.exit(main())
