"""The twin's base model: a small Gemma-3 trained from nothing on pictures of the twin and questions about them.

Three pieces stand here in the order in which they run: the model, the batches, the training loop. Besides the language
loss, linear heads on the vision tower's tokens say which things a patch shows and where things stand; they give the
tower something to learn before the language model can read it, and are thrown away at the end. No robot action is in
this data. The command line is in :mod:`vlm2vla_training.pretrain_command`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from vlm2vla_schema.prompts import PROMPT_VERSIONS
from vlm2vla_schema.types import ModelCard
from vlm2vla_training import pretrain_data
from vlm2vla_training.cpu_attention import CPU_ATTENTION
from vlm2vla_training.errors import DataError
from vlm2vla_training.pretrain_data import IMAGE_SIZE
from vlm2vla_training.pretrain_settings import Settings
from vlm2vla_training.servable import weights_hash, write_servable_names
from vlm2vla_training.twin_tokenizer import CHAT_TEMPLATE, train_tokenizer
from vlm2vla_twin.scene import CARDS, KINDS
from vlm2vla_twin.truth import Truth

PATCHES = IMAGE_SIZE // 14
TOKENS = PATCHES // 2
"""Image tokens a side: Gemma's projector averages two patches by two."""
IMAGE_TOKENS = TOKENS * TOKENS
THINGS = ("gripper", *KINDS, *(f"card {name}" for name in CARDS))


# --- the model --------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The twin's tokenizer with Gemma's special tokens and chat template, as transformers and vLLM know it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def config_for(tokenizer: PreTrainedTokenizerFast) -> Gemma3Config:
    """The Gemma-3 architecture at twin size: some 2 million parameters, 112x112 pictures, 16 image tokens."""
    width, ids = 128, tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": width, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "query_pre_attn_scalar": 32, "sliding_window": 1024, "max_position_embeddings": 4096,
        "bos_token_id": ids("<bos>"), "eos_token_id": ids("<eos>"), "pad_token_id": ids("<pad>"),
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": IMAGE_SIZE, "patch_size": 14,
    }  # fmt: skip
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        eos_token_id=[ids("<eos>"), ids("<end_of_turn>")], bos_token_id=ids("<bos>"), pad_token_id=ids("<pad>"),
        tie_word_embeddings=True,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Gemma3ForConditionalGeneration:
    """Random weights; the multimodal projection leaves its zero initialisation, or pictures could never be seen."""
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config_for(tokenizer))
    projector = model.model.multi_modal_projector
    nn.init.normal_(projector.mm_input_projection_weight, std=0.06)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[0] != model.config.text_config.vocab_size:
            nn.init.normal_(module.weight, std=0.06)
    nn.init.normal_(model.model.vision_tower.get_input_embeddings().weight, std=0.04)
    places: Any = model.model.vision_tower
    places.embeddings.position_embedding.weight.data.copy_(smooth_places(model.config.vision_config.hidden_size, seed))
    nn.init.normal_(model.get_input_embeddings().weight, std=0.06)
    for layer in model.model.language_model.layers:
        # Queries and keys are normalised: at the usual start no token can attend sharply to one patch of many.
        nn.init.constant_(layer.self_attn.q_norm.weight, 0.7)
        nn.init.constant_(layer.self_attn.k_norm.weight, 0.7)
    generation: Any = model.generation_config
    generation.eos_token_id = model.config.eos_token_id
    generation.bos_token_id, generation.pad_token_id = model.config.bos_token_id, model.config.pad_token_id
    return model


def smooth_places(width: int, seed: int) -> Tensor:
    """Position embeddings [64, width] to start from: random mixtures of waves over rows and columns.

    From independent random ones a tower takes several times as long to learn where a patch lies.
    """
    column, row = np.meshgrid(np.arange(PATCHES) + 0.5, np.arange(PATCHES) + 0.5)
    waves = [
        wave(np.pi * frequency / PATCHES * axis).reshape(-1)
        for frequency in (0.5, 1, 2, 3, 4, 5, 6, 7)
        for axis in (column, row)
        for wave in (np.sin, np.cos)
    ]
    mixture = np.random.default_rng([17, seed]).normal(size=(len(waves), width)) * np.sqrt(2.0 / len(waves))
    return torch.from_numpy((np.stack(waves, axis=-1) @ mixture).astype(np.float32))


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Gemma3Processor:
    """Gemma's processor at twin size: squash to 112x112, mean and deviation one half, pan-and-scan off."""
    image = Gemma3ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=1,
        do_pan_and_scan=False,
        image_seq_length=IMAGE_TOKENS,
    )
    return Gemma3Processor(image, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=IMAGE_TOKENS)


def save_base(
    model: Gemma3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    training: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write the base as a Hugging Face folder in bfloat16, with its processor and model card."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(dtype)
    build_processor(tokenizer).save_pretrained(folder)
    write_servable_names(folder)
    digest = weights_hash(folder)
    ModelCard(
        name="twin-base",
        base_model="twin-base",
        base_hash=digest,
        adapter_scope="none",
        adapted_modules=0,
        representation="text",
        digit_map=None,
        stages=["subtasks", "motion_plan", "actions"],
        image_size=IMAGE_SIZE,
        prompt_versions=dict(PROMPT_VERSIONS),
        policy=False,
        reference_logprobs=None,
        data_hash=None,
        training=training,
        metrics=metrics,
        licence="Apache-2.0",
    ).write(folder)


def write_random_base(folder: Path, seed: int = 0) -> None:
    """A servable base with random weights: for tests, and as the floor that a trained model is measured against."""
    tokenizer = build_tokenizer()
    save_base(build_model(tokenizer, seed), tokenizer, folder, {"steps": 0, "seed": seed}, {})


# --- the batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stills:
    """Pictures uint8 [N, 112, 112, 3], what is true of each, and where each of K things shows and stands.

    ``pixels`` [N, K, 2] are fractions of width and height, NaN for a thing that is not there; ``where`` [N, K, 3] is in
    decimetres; ``held`` [N, K] is 1 for what the gripper holds, and its first column how far the gripper is open.
    """

    pictures: NDArray[np.uint8]
    truths: list[Truth]
    pixels: NDArray[np.float32]
    where: NDArray[np.float32]
    held: NDArray[np.float32]

    @classmethod
    def load(cls, folder: Path, most: int | None = None) -> Stills:
        """Read the shards that :func:`pretrain_data.render` wrote, in order, until there are at least ``most``.

        Raises:
            DataError: the folder holds no stills.
        """
        pictures, truths, count = [], [], 0
        for path in sorted(folder.glob("stills-*[0-9].npz")):
            with np.load(path) as shard:
                pictures.append(shard["pictures"])
                truths += [Truth.from_dict(json.loads(str(text))) for text in shard["truths"]]
            count += len(pictures[-1])
            if most is not None and count >= most:
                break
        if count == 0:
            raise DataError(
                f"no stills in {folder}: expected stills-*.npz, made by `vlm2vla-train pretrain --render N`"
            )
        pixels = np.full((count, len(THINGS), 2), np.nan, dtype=np.float32)
        where = np.zeros((count, len(THINGS), 3), dtype=np.float32)
        held = np.array(
            [[truth.gripper_fraction, *(truth.held == n for n in THINGS[1:])] for truth in truths], np.float32
        )
        for index, truth in enumerate(truths):
            for name, place in truth.pixels.items():
                slot = THINGS.index(name)
                pixels[index, slot] = place
                where[index, slot] = np.asarray(truth.position(name.removeprefix("card "))) * 10.0
        return cls(np.concatenate(pictures), truths, pixels, where, held)

    def dense_targets(self, picks: NDArray[np.int64]) -> DenseTargets:
        """What the tower's dense heads are taught about the picked stills."""
        centres = (np.arange(PATCHES) + 0.5) / PATCHES
        v, u = np.meshgrid(centres, centres, indexing="ij")
        aside = self.pixels[picks][:, None] - np.stack([u, v], axis=-1).reshape(1, PATCHES * PATCHES, 1, 2)
        distance = np.nan_to_num(np.abs(aside).max(axis=-1), nan=9.0)
        there = ~np.isnan(self.pixels[picks, :, 0])[:, SLOTS]
        where = self.where[picks]
        own, gripper = where[:, SLOTS], where[:, :1]
        above = np.broadcast_to(0.7 - gripper[..., 2:], own[..., :1].shape)
        values = np.concatenate([own - gripper, above, own], axis=-1)
        return DenseTargets(
            torch.from_numpy(distance < REACH), torch.from_numpy((aside * PATCHES).astype(np.float32)),
            torch.from_numpy(there), torch.from_numpy(values), torch.from_numpy(_digits(values)),
            torch.from_numpy(self.held[picks]),
        )  # fmt: skip


@dataclass(frozen=True)
class DenseTargets:
    """What the tower's dense heads are taught.

    ``here`` [B, 64, K]: which things a patch shows, ``aside`` [B, 64, K, 2] how many patches right and below its middle
    each lies. Every image token is also the slot of one thing: ``there`` [B, 16] says whether that thing is in the
    picture, ``values`` [B, 16, 7] in decimetres its offset from the gripper, the height of the point above and its
    position, and ``digits`` [B, 16, 7, 4] the same as decimal digits. ``held`` [B, K] as in :class:`Stills`.
    """

    here: Tensor
    aside: Tensor
    there: Tensor
    values: Tensor
    digits: Tensor
    held: Tensor


SLOTS = np.arange(IMAGE_TOKENS) % len(THINGS)
REACH = 0.085
DIGIT_CLASSES = (2, 6, 10, 10)
"""Sign, decimetres, centimetres, millimetres."""
DIGIT_WEIGHTS = (0.15, 0.15, 0.15, 0.05)
"""Of their losses; the last digit is mostly noise until the others are right."""


def _digits(values_dm: NDArray[np.float32]) -> NDArray[np.int64]:
    """Sign and three digits of numbers in decimetres, as they are written in metres with three decimals."""
    millimetres = np.rint(np.abs(values_dm) * 100.0).astype(np.int64)
    negative = ((values_dm < 0) & (millimetres > 0)).astype(np.int64)
    return np.stack([negative, np.minimum(millimetres // 100, 5), millimetres // 10 % 10, millimetres % 10], axis=-1)


@dataclass(frozen=True)
class Batch:
    """One training batch; ``labels`` is -100 wherever no loss falls, ``picks`` number the stills of ``pictures``."""

    input_ids: Tensor
    image_mask: Tensor
    labels: Tensor
    pictures: Tensor
    picks: NDArray[np.int64]
    vectors: Tensor
    turns: Tensor


Vector = tuple[float, float, float]
NO_VECTOR: Vector = (float("nan"), float("nan"), float("nan"))
_AXES = {"forward": (0, 1), "backward": (0, -1), "left": (1, 1), "right": (1, -1), "up": (2, 1), "down": (2, -1)}


def answer_vector(answer: str) -> Vector:
    """The displacement or position that an answer states, in decimetres, NaN for axes it does not mention."""
    if answer.startswith("["):
        x, y, z = json.loads(answer)
        return (10.0 * x, 10.0 * y, 10.0 * z)
    values = list(NO_VECTOR)
    if " cm" in answer:
        for part in answer.split(", "):
            number, _, *word = part.split()
            axis, sign = _AXES[word[0]] if word else (2, 1)
            values[axis] = sign * float(number) / 10.0
    return (values[0], values[1], values[2])


class Batcher:
    """Turns stills into conversations of token ids, without end and reproducibly from a seed."""

    def __init__(self, stills: Stills, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> None:
        self._stills, self._settings = stills, settings
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        ids = tokenizer.convert_tokens_to_ids
        self.pad, self.soft = int(ids("<pad>")), int(ids("<image_soft_token>"))
        self._picture = self._ids("\n\n<start_of_image>") + [self.soft] * IMAGE_TOKENS + self._ids("<end_of_image>\n\n")

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[text]

    def chat(self, pictures: int, pairs: list[pretrain_data.Pair]) -> Chat:
        """One conversation about ``pictures`` pictures, every turn as if it were the first."""
        ids = self._ids("<bos>") + self._ids("<start_of_turn>user\n") + self._picture * pictures
        chat = Chat(ids, [-100] * len(ids), [NO_VECTOR] * len(ids), [0] * len(ids))
        for index, (question, answer) in enumerate(pairs):
            asked, end = self._ids(question), self._ids("<end_of_turn>\n<start_of_turn>model\n")
            told = self._ids(answer) + self._ids("<end_of_turn>")
            chat.ids.extend(asked + end + told)
            chat.labels.extend([-100] * len(asked + end) + told)
            # Only before the answer: once a number is said, it could be read off the text.
            chat.vectors.extend([NO_VECTOR] * len(asked) + [answer_vector(answer)] * len(end) + [NO_VECTOR] * len(told))
            chat.turns.extend([index + 1] * len(asked + end + told))
        return chat

    def batch(self, step: int) -> Batch:
        """The batch of one step, a pure function of the settings' seed and ``step``."""
        rng = np.random.default_rng([11, self._settings.seed, step])
        rows: list[Chat] = []
        chosen: list[int] = []
        texts, doubles = min(self._settings.text_rows, self._settings.batch - 1), self._settings.double_rows
        for row in range(self._settings.batch):
            if row < texts:
                ids = self._ids("<bos>") + self._ids("<start_of_turn>user\n") + self._ids(pretrain_data.user_text(rng))
                ids = ids + self._ids("<end_of_turn>\n")
                rows.append(Chat(ids, [-100, *ids[1:]], [NO_VECTOR] * len(ids), [0] * len(ids)))
                continue
            two = row >= self._settings.batch - doubles
            picks = [int(i) for i in rng.integers(len(self._stills.truths), size=2 if two else 1)]
            truth, *earlier = (self._stills.truths[pick] for pick in reversed(picks))
            pairs = pretrain_data.conversation(truth, rng, self._settings.turns, *earlier)
            chosen += picks
            rows.append(self.chat(len(picks), pairs))
        width = max(len(chat.ids) for chat in rows)
        ids_ = torch.full((len(rows), width), self.pad)
        labels_ = torch.full((len(rows), width), -100)
        vectors_ = torch.full((len(rows), width, 3), float("nan"))
        turns_ = torch.full((len(rows), width), -1)
        for row, chat in enumerate(rows):
            length = len(chat.ids)
            ids_[row, :length], labels_[row, :length] = torch.tensor(chat.ids), torch.tensor(chat.labels)
            vectors_[row, :length], turns_[row, :length] = torch.tensor(chat.vectors), torch.tensor(chat.turns)
        picks_ = np.asarray(chosen)
        pictures = to_pixels(self._stills.pictures[picks_])
        return Batch(ids_, ids_ == self.soft, labels_, pictures, picks_, vectors_, turns_)


@dataclass(frozen=True)
class Chat:
    """Token ids, labels, the vector that is being said where one is, and the turn (0 for what all turns share)."""

    ids: list[int]
    labels: list[int]
    vectors: list[Vector]
    turns: list[int]


def independent_turns(batch: Batch) -> tuple[Tensor, Tensor]:
    """Attention mask [B, 1, T, T] and positions [B, T] that let every turn see the pictures and itself alone.

    Otherwise a later answer could be copied from an earlier one about the same thing, and no picture need be read.
    """
    turns, width = batch.turns, batch.turns.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    shared = turns == 0
    seen = causal & (shared[:, None, :] | (turns[:, :, None] == turns[:, None, :])) & (turns >= 0)[:, None, :]
    starts = batch.image_mask & ~torch.nn.functional.pad(batch.image_mask, (1, 0))[:, :-1]
    image = torch.cumsum(starts, dim=1) * batch.image_mask
    seen |= (image[:, :, None] == image[:, None, :]) & batch.image_mask[:, :, None]
    seen |= torch.eye(width, dtype=torch.bool)
    prefix = shared.sum(dim=1, keepdim=True)
    position = torch.arange(width).expand_as(turns)
    first = torch.where(turns[:, :, None] == turns[:, None, :], position[:, None, :], width).amin(dim=2)
    return seen[:, None], torch.where(turns > 0, position - first + prefix, position)


def to_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [N, H, W, 3] to what the tower takes, float [N, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


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


# --- the training loop ------------------------------------------------------------------------------------------------


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
            seeing = settings.tower_learning_rate * _schedule(step, settings.warmup, settings.tower_steps)
        else:
            speaking = settings.learning_rate * _schedule(spoken, settings.warmup, settings.steps)
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
        seen, positions = independent_turns(batch)
        told = batch.labels[:, 1:] != -100
        self.met[batch.input_ids] = True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = self.model.model(
                input_ids=batch.input_ids, attention_mask={"full_attention": seen, "sliding_attention": seen},
                position_ids=positions, pixel_values=batch.pictures,
                token_type_ids=batch.image_mask.long(), use_cache=False,
            )  # fmt: skip
            # Scores over the vocabulary only where a loss falls: two thirds of the tokens are asked, not told.
            logits = self.model.lm_head(output.last_hidden_state[:, :-1][told])
        language = nn.functional.cross_entropy(logits.float(), batch.labels[:, 1:][told])
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


def _schedule(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
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
