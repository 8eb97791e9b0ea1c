"""What the analysis commands share: a loaded model that answers or scores, and folders that resume one run only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlm2vla_training.bases import load_processor
from vlm2vla_training.sft_data import Encoder, image_token


class LoadedModel:
    """A base, with or without an adapter, and its encoder."""

    def __init__(
        self, base: Path, adapter: Path | None, image_size: int, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        """Load from local folders; `image_size` is the card's, `device` and `dtype` are torch's names."""
        self.encoder = Encoder(load_processor(base), image_size)
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=getattr(torch, dtype))
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        self._model = model.to(device).eval()
        tokenizer = self.encoder.tokenizer
        self._stop = int(tokenizer.convert_tokens_to_ids(self.encoder.end_of_turn))
        # Action tokens (Table 2) may be special tokens too: only what frames turns and pictures is no text.
        self._control = {
            int(token) for token in (*tokenizer.all_special_ids, self._stop, image_token(self.encoder.processor))
        } - {int(tokenizer.convert_tokens_to_ids(name)) for name in tokenizer.get_vocab() if name.startswith("<unused")}

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that frame turns and pictures."""
        return frozenset(self._control)

    @torch.no_grad()
    def answer(self, prompt: str, pixels: NDArray[np.uint8], max_tokens: int) -> tuple[str, bool]:
        """The greedy answer to one picture and a prompt, without a grammar, and whether it ended by itself.

        Args:
            prompt: the user's turn. pixels: uint8 [S, S, 3] in the model's own size. max_tokens: where it is cut.
        """
        encoder = self.encoder
        inputs = encoder.processor(
            text=[encoder.prompt_text(prompt, 1)], images=[[Image.fromarray(pixels)]], add_special_tokens=False,
            return_tensors="pt",
        ).to(self._model.device)  # fmt: skip
        start = inputs["input_ids"].shape[1]
        written = self._model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)[0, start:].tolist()
        ended = bool(written) and written[-1] in self._control
        kept = [token for token in written if token not in self._control]
        return str(encoder.tokenizer.decode(kept, skip_special_tokens=False)), ended

    @torch.no_grad()
    def log_probabilities(self, batch: dict[str, NDArray[Any]]) -> list[torch.Tensor]:
        """ln p over the vocabulary at each answer position of a batch of `Collator`: one float32 [T, V] an example."""
        tensors = {name: torch.from_numpy(array).to(self._model.device) for name, array in batch.items()}
        labels = tensors.pop("labels")
        logits = self._model(**tensors).logits
        return [
            torch.log_softmax(logits[row, torch.nonzero(marked)[:, 0] - 1].float(), dim=-1)
            for row, marked in enumerate(labels != -100)
        ]
