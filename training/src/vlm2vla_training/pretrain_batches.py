"""Stills and questions about them as batches of tensors for `pretrain`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlm2vla_training import pretrain_data
from vlm2vla_training.errors import DataError
from vlm2vla_training.pretrain_settings import Settings
from vlm2vla_training.twin_model import IMAGE_TOKENS, PATCHES
from vlm2vla_twin.scene import CARDS, KINDS
from vlm2vla_twin.truth import Truth

THINGS = ("gripper", *KINDS, *(f"card {name}" for name in CARDS))


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
