"""Examples -> batches for `sft`: tokens counted and kept once, pictures normalised when a batch is built.

TRL's own collator runs the chat template and the image processor anew in every step, which costs more than a step of
a small model. This one does the same work once; `check_parity` compares it with the processor's own output. Arrays
only: `sft` makes tensors of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm2vla_schema.processors import TOKEN_TYPES, answers_at_once, end_of_turn, template_options
from vlm2vla_training.curation.dataset import ExampleSet
from vlm2vla_training.errors import DataError, UsageError

_IGNORED = -100
NAMED = 5
"""Of the examples that are too long so many are named."""


@dataclass(frozen=True)
class Tokens:
    """One example as token ids: prompt with its image tokens, then the answer with its end of turn."""

    prompt: NDArray[np.int32]
    answer: NDArray[np.int32]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.prompt) + len(self.answer)


def image_token(processor: Any) -> int:
    """The id of a picture's soft tokens. `processor.image_token_id` of Gemma 3 is that of <start_of_image> instead: the
    token that stands for a picture before it is expanded.
    """
    return int(processor.image_token_ids[0])


class Encoder:
    """Turns prompts and completions into token ids with a processor's chat template; equal prompts are encoded once."""

    def __init__(self, processor: Any, image_size: int) -> None:
        """Read the template's pieces, and what a picture of `image_size` pixels a side becomes, from `processor`.

        Raises:
            UsageError: the template does not let the model answer at once, or ends no turn by a token of its own.
        """
        if not answers_at_once(processor):
            raise UsageError(
                "the base's chat template opens a thought where the answer should begin; take a model that answers at "
                "once (of Qwen's, Instruct and not Thinking)"
            )
        found = end_of_turn(processor)
        if found is None:
            raise UsageError("the base's chat template writes no token of its own behind an answer")
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.end_of_turn = found[1]
        blank = processor.image_processor([Image.new("RGB", (image_size, image_size))], return_tensors="np")
        self._picture = str(processor.replace_image_token(blank, 0))
        ids = [*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids]
        self._foreign = frozenset(int(token) for token in ids if token is not None)
        self._prompts: dict[tuple[str, int], NDArray[np.int32]] = {}

    def prompt_text(self, prompt: str, images: int) -> str:
        """Render one user turn with its pictures in front, ready for the answer."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        turns, options = [{"role": "user", "content": content}], template_options(self.processor)
        return str(self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **options))

    def encode(self, prompt: str, completion: str, images: int) -> Tokens:
        """Encode one example.

        Raises:
            DataError: the answer holds an image token, which would carry loss, or the prompt one that is no picture's.
        """
        key = (prompt, images)
        if key not in self._prompts:
            self._prompts[key] = self._prompt(prompt, images)
        # Some templates trim text, hence so do we.
        answer = self._ids(completion.strip() + self.end_of_turn)
        if not self._foreign.isdisjoint(answer.tolist()):
            raise DataError(f"the answer {completion[:80]!r} holds an image token; answers are text only")
        return Tokens(self._prompts[key], answer)

    def _prompt(self, prompt: str, images: int) -> NDArray[np.int32]:
        if not self._foreign.isdisjoint(self._ids(prompt).tolist()) or self.processor.image_token in prompt:
            raise DataError(f"the prompt {prompt[:80]!r} holds an image token as text")
        return self._ids(self.prompt_text(prompt, images).replace(self.processor.image_token, self._picture))

    def _ids(self, text: str) -> NDArray[np.int32]:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def encode_all(examples: ExampleSet, encoder: Encoder, max_tokens: int) -> list[Tokens]:
    """Encode every example and count before training: text cut by a length limit would train silently.

    Raises:
        DataError: an example is longer than `max_tokens`; the message names the five longest.
    """
    encoded = [
        encoder.encode(prompt, completion, len(images))
        for prompt, completion, images in zip(examples.prompts, examples.completions, examples.images, strict=True)
    ]
    over = [place for place, tokens in enumerate(encoded) if len(tokens) > max_tokens]
    if over:
        longest = sorted(over, key=lambda place: -len(encoded[place]))[:NAMED]
        names = [f"{examples.kinds[i]} of {examples.episode_keys[i]} ({len(encoded[i])})" for i in longest]
        raise DataError(
            f"{len(over)} of {len(encoded)} examples exceed {max_tokens} tokens; the longest: {', '.join(names)}. "
            "Nothing is cut: curate shorter examples or raise --max-tokens"
        )
    return encoded


class Collator:
    """Builds batches from rows {"example": index}: right-padded ids, labels on the answer only, pixel values."""

    def __init__(self, examples: ExampleSet, encoded: Sequence[Tokens] | Mapping[int, Tokens], processor: Any) -> None:
        """Keep what batches are made of; `encoded` is looked up by example number."""
        self._examples = examples
        self._encoded = encoded
        self._pad = int(processor.tokenizer.pad_token_id)
        self._image_token = image_token(processor)
        self._kinds = [name for name in TOKEN_TYPES if name in processor(text=["?"])]
        image = self._image_processor = processor.image_processor
        # Of most models a picture is one array, and only its colours are changed; of others it becomes rows of patches.
        size = examples.pixels.shape[1] if len(examples.pixels) else 0
        blank = image([Image.new("RGB", (size, size))], return_tensors="np")["pixel_values"] if size else np.zeros(0)
        self._is_plain = blank.shape == (1, 3, size, size)
        scale = float(image.rescale_factor)
        mean, std = np.asarray(image.image_mean), np.asarray(image.image_std)
        self._gain = (scale / std).astype(np.float32).reshape(1, 3, 1, 1)
        self._bias = (-mean / std).astype(np.float32).reshape(1, 3, 1, 1)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
        """Return input_ids, attention_mask, labels and the marks of image tokens by their name [B, L]; `pictures`."""
        indices = [int(row["example"]) for row in rows]
        width = max(len(self._encoded[index]) for index in indices)
        ids = np.full((len(indices), width), self._pad, dtype=np.int64)
        mask = np.zeros((len(indices), width), dtype=np.int64)
        labels = np.full((len(indices), width), _IGNORED, dtype=np.int64)
        for place, index in enumerate(indices):
            tokens = self._encoded[index]
            start, end = len(tokens.prompt), len(tokens)
            ids[place, :start], ids[place, start:end] = tokens.prompt, tokens.answer
            labels[place, start:end] = tokens.answer
            mask[place, :end] = 1
        batch: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
        }
        batch |= dict.fromkeys(self._kinds, (ids == self._image_token).astype(np.int64))
        pictures = [number for index in indices for number in self._examples.images[index]]
        return batch | self.pictures(self._examples.pixels[pictures]) if pictures else batch

    def pictures(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Turn uint8 [N, S, S, 3] into what the model takes, by name: pixel_values [N, 3, S, S], or the processor's own
        arrays where these are others: pixel_values [patches, values] and a grid [N, 3] of time, rows and columns.
        """
        if self._is_plain:
            return {"pixel_values": self.pixel_values(pixels)}
        made = self._image_processor([Image.fromarray(one) for one in pixels], return_tensors="np")
        return {str(name): np.asarray(array) for name, array in made.items()}

    def pixel_values(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalise uint8 [N, S, S, 3] as the processor would, to float32 [N, 3, S, S]."""
        scaled: NDArray[np.float32] = pixels.transpose(0, 3, 1, 2).astype(np.float32) * self._gain + self._bias
        return scaled


def dump(examples: ExampleSet, collator: Collator, encoder: Encoder, count: int) -> str:
    """Up to `count` examples of each kind, spread over the set, as `decoded` shows them: for people to read."""
    blocks = []
    for kind in sorted(set(examples.kinds)) if count else ():
        places = [place for place, name in enumerate(examples.kinds) if name == kind]
        chosen = sorted({places[i * len(places) // count] for i in range(count)})
        blocks += [decoded(examples, collator, encoder, place) for place in chosen]
    return "\n".join(blocks)


def decoded(examples: ExampleSet, collator: Collator, encoder: Encoder, index: int) -> str:
    """One example as the model gets it: decoded ids, what carries loss between "[[[" and "]]]", runs of image tokens as
    the token's text and " x N". Read from a batch's labels, not from what they were made of.
    """
    batch = collator([{"example": index}])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    soft = image_token(encoder.processor)
    text, start = "", 0
    edges = np.flatnonzero((np.diff(ids == soft) != 0) | (np.diff(labels != _IGNORED) != 0))
    for end in [*(int(edge) + 1 for edge in edges), len(ids)]:
        piece = encoder.tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False)
        if ids[start] == soft:
            piece = f"{encoder.tokenizer.convert_ids_to_tokens(soft)} x {end - start}"
        text += piece if labels[start] == _IGNORED else f"[[[{piece}]]]"
        start = end
    tokens, loss = len(ids), int(np.count_nonzero(labels != _IGNORED))
    head = f"--- {examples.kinds[index]} of {examples.episode_keys[index]}: {tokens} tokens, {loss} carry loss"
    return f"{head}\n{text}\n"


def check_parity(examples: ExampleSet, collator: Collator, encoder: Encoder) -> None:
    """Compare prompts, token types and pictures of some examples with what the processor itself makes of them.

    Raises:
        DataError: ids or pixel values differ; training and serving would then see different inputs.
    """
    for index in {0, len(examples) // 2, len(examples) - 1}:
        images = [Image.fromarray(examples.pixels[number]) for number in examples.images[index]]
        text = encoder.prompt_text(examples.prompts[index], len(images))
        theirs = encoder.processor(
            text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="np"
        )
        ours = encoder.encode(examples.prompts[index], "", len(images)).prompt
        if theirs["input_ids"][0].tolist() != ours.tolist():
            raise DataError(f"example {index}: our prompt tokens differ from the processor's; the template has changed")
        batch = collator([{"example": index}])
        for name in (name for name in TOKEN_TYPES if name in theirs):
            types = batch.get(name, np.full((1, len(ours) + 1), -1))[0]
            if theirs[name][0].tolist() != types[: len(ours)].tolist() or types[len(ours) :].any():
                raise DataError(
                    f"example {index}: other tokens count as a picture's than the processor's: the attention differs"
                )
        mine = collator.pictures(examples.pixels[examples.images[index]]) if images else {}
        for name, array in mine.items():
            if array.shape != theirs[name].shape or not np.allclose(array, theirs[name], atol=1e-4):
                raise DataError(
                    f"example {index}: our {name.replace('_', ' ')} {array.shape} differ from the processor's "
                    f"{theirs[name].shape}; is the base's image_size that of its processor?"
                )
