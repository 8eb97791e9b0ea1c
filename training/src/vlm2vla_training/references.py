"""Reference log-probabilities: by them a server proves that what it loaded is what was exported (see `probes`).

An adapter's are measured on its base; a whole model's on its own stored weights, rounding included, and then compared
with what was trained: a merge or a quantisation that changes the answers is not exported. All of it in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlm2vla_schema.images import to_base64
from vlm2vla_schema.probes import CLOSER_THAN_BASE, PROBE_PROMPTS, probe_image, tolerance_nat
from vlm2vla_schema.processors import TOKEN_TYPES
from vlm2vla_schema.types import ReferenceLogprobs
from vlm2vla_training.bases import load_processor
from vlm2vla_training.curation.dataset import encode_png
from vlm2vla_training.errors import DataError
from vlm2vla_training.sft_data import Encoder, image_token

REFERENCE_TOKENS = 32


@dataclass(frozen=True)
class Agreement:
    """How far stored weights are from what was trained, over the probes' answers, in nat a token.

    distance_nat: of the probe where it is largest. mean_distance_nat, base_distance_nat: over all tokens, of the stored
    weights and of the untouched base. dtype: of the stored weights.
    """

    dtype: str
    distance_nat: float
    mean_distance_nat: float
    base_distance_nat: float

    def check(self) -> None:
        """Raises DataError beyond the tolerance of the server's proof, or when the base is nearly as close."""
        limit = tolerance_nat(self.dtype)
        if not self.distance_nat <= limit:
            raise DataError(
                f"in {self.dtype} the model is {self.distance_nat:.3g} nat a token from what was trained, expected at "
                f"most {limit:g}; nothing was exported"
            )
        if not self.mean_distance_nat * CLOSER_THAN_BASE <= self.base_distance_nat:
            raise DataError(
                f"in {self.dtype} the model is {self.mean_distance_nat:.3g} nat from what was trained, the base "
                f"{self.base_distance_nat:.3g}; expected it to be at least {CLOSER_THAN_BASE:g} times closer"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def measure_references(base: Path, adapter: Path, image_size: int, device: str = "cpu") -> list[ReferenceLogprobs]:
    """Log-probabilities of the adapter's own greedy answers to the eight probes, under adapter and base.

    Args:
        base: base model folder. adapter: folder of the stored adapter: what a server will load, rounding included.
        image_size: side of the probe pictures in pixels. device: of torch; the model is loaded in float32.
    """
    asked = _Asked(base, adapter, image_size, device)
    answers = asked.answers()
    ours = asked.log_probabilities(answers)
    return _references(answers, image_size, asked.encoder, ours, asked.log_probabilities(answers, untouched=True))


def measure_whole(
    stored: Path, base: Path, trained: Path, dtype: str, image_size: int, device: str = "cpu"
) -> tuple[list[ReferenceLogprobs], Agreement]:
    """The same of a whole model, and how far it is from what was trained.

    Args:
        stored: the model that a server will load. base: the untouched one.
        trained: what came out of training: an adapter's folder, or a model's.
        dtype: of the stored weights: float32, bfloat16 or fp8. image_size, device: as for `measure_references`.
    """
    asked = _Asked(stored, None, image_size, device)
    answers = asked.answers()
    ours, encoder = asked.log_probabilities(answers), asked.encoder
    del asked  # one model at a time in memory
    if (trained / "adapter_config.json").is_file():
        asked = _Asked(base, trained, image_size, device)
        exact, untouched = asked.log_probabilities(answers), asked.log_probabilities(answers, untouched=True)
    else:
        exact = _Asked(trained, None, image_size, device).log_probabilities(answers)
        untouched = _Asked(base, None, image_size, device).log_probabilities(answers)
    far = max(float(np.mean(np.abs(np.subtract(a, b)))) for a, b in zip(ours, exact, strict=True))
    agreement = Agreement(dtype, far, _apart(ours, exact), _apart(untouched, exact))
    return _references(answers, image_size, encoder, ours, untouched), agreement


def _apart(one: Sequence[list[float]], other: Sequence[list[float]]) -> float:
    return float(np.mean(np.abs(np.concatenate(one) - np.concatenate(other))))


def _references(
    answers: list[str], image_size: int, encoder: Encoder, ours: list[list[float]], base: list[list[float]]
) -> list[ReferenceLogprobs]:
    return [
        ReferenceLogprobs(
            prompt=prompt,
            image=to_base64(encode_png(probe_image(index, image_size))),
            completion=answer,
            token_ids=[int(token) for token in encoder.encode(prompt, answer, 1).answer],
            logprobs=ours[index],
            base_logprobs=base[index],
        )
        for index, (prompt, answer) in enumerate(zip(PROBE_PROMPTS, answers, strict=True))
    ]


class _Asked:
    """A model that answers the probes."""

    def __init__(self, model: Path, adapter: Path | None, image_size: int, device: str) -> None:
        self.encoder = Encoder(load_processor(model), image_size)
        network = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        if adapter is not None:
            network = PeftModel.from_pretrained(network, str(adapter))
        self._model: Any = network.to(device).eval()
        self._pictures = [Image.fromarray(probe_image(index, image_size)) for index in range(len(PROBE_PROMPTS))]

    @torch.no_grad()
    def answers(self) -> list[str]:
        """The greedy answer to each probe. The text is what is stored and scored: its tokens may be others than those
        that the model chose.
        """
        tokenizer = self.encoder.tokenizer
        control = {*tokenizer.all_special_ids, image_token(self.encoder.processor)}
        control.add(tokenizer.convert_tokens_to_ids(self.encoder.end_of_turn))
        found = []
        for index in range(len(PROBE_PROMPTS)):
            inputs = self._inputs(index)
            start = inputs["input_ids"].shape[1]
            written = self._model.generate(**inputs, do_sample=False, max_new_tokens=REFERENCE_TOKENS)[0, start:]
            kept = [token for token in written.tolist() if token not in control]
            found.append(str(tokenizer.decode(kept, skip_special_tokens=False)).strip())
        return found

    @torch.no_grad()
    def log_probabilities(self, answers: list[str], untouched: bool = False) -> list[list[float]]:
        """ln p of each token of each answer and its end of turn; `untouched` without the adapter."""
        if untouched:
            with self._model.disable_adapter():
                return self.log_probabilities(answers)
        return [
            self._scored(self._inputs(index), self.encoder.encode(PROBE_PROMPTS[index], answer, 1).answer)
            for index, answer in enumerate(answers)
        ]

    def _inputs(self, index: int) -> Any:
        return self.encoder.processor(
            text=[self.encoder.prompt_text(PROBE_PROMPTS[index], 1)], images=[[self._pictures[index]]],
            add_special_tokens=False, return_tensors="pt",
        ).to(self._model.device)  # fmt: skip

    def _scored(self, prompt: Any, answer: NDArray[np.int32]) -> list[float]:
        tail = torch.from_numpy(answer.astype(np.int64)).to(self._model.device)[None]
        start, inputs = prompt["input_ids"].shape[1], dict(prompt)
        inputs["input_ids"] = torch.cat([prompt["input_ids"], tail], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in (name for name in TOKEN_TYPES if name in inputs):
            inputs[name] = torch.cat([prompt[name], torch.zeros_like(tail)], dim=1)
        logits = self._model(**inputs).logits[0, start - 1 : -1].float()
        rows = torch.log_softmax(logits, dim=-1)
        return [round(float(value), 6) for value in rows.gather(1, tail[0][:, None])[:, 0]]
