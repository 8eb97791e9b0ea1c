"""A Hugging Face vision-language model with PEFT adapters, run synchronously by one thread.

Any model of `AutoModelForImageTextToText` whose processor has a chat template and marks image tokens (`TOKEN_TYPES`);
the architectures of Gemma 3 and Qwen3-VL have been run. Everything here blocks: `transformers_engine` runs it on its
worker thread.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from vlm2vla_schema.processors import TOKEN_TYPES
from vlm2vla_server.engines.adapters import LoadedAdapter, load_adapter
from vlm2vla_server.engines.base import Conversation, EngineStartError, GenerationError, PromptTooLong
from vlm2vla_server.engines.decoding import control_tokens
from vlm2vla_server.engines.processors import apply_template, load_processor, picture_options, quietly_load, stop_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelOptions:
    """How to load and run the model. device: "cpu", "cuda", "cuda:N" or "auto"; dtype: "float32", "bfloat16",
    "float16" or "auto" (float32 on a CPU, bfloat16 on a GPU); prefix_cache_entries: image prefixes kept."""

    model: Path
    adapters: tuple[tuple[str, Path], ...] = ()
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 1
    prefix_cache_entries: int = 4


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it.

    ids: int64 [1, T]. kinds: the processor's mark of image tokens, int64 [1, T], by its name. pictures: whatever else
    the processor made, by name: pixel values, and for some models their grid; empty without images. positions: int64
    [axes, 1, T] for models that lay pictures out over several axes, else None: the model then counts tokens. split:
    number of leading tokens up to and including the last image token.
    """

    ids: torch.Tensor
    kinds: Mapping[str, torch.Tensor]
    pictures: Mapping[str, torch.Tensor]
    positions: torch.Tensor | None
    split: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.ids.shape[1])


@dataclass
class Reading:
    """What the model has read. cache: keys and values, which grow in place. next_place: position of the token that
    comes next, int64 [axes, 1, 1], or None where the model counts by itself."""

    cache: Any
    next_place: torch.Tensor | None


class HFModel:
    """The loaded model. One thread only."""

    def __init__(self, options: ModelOptions) -> None:
        self.device = _device(options.device)
        self.dtype_name = options.dtype if options.dtype != "auto" else ("float32", "bfloat16")[self.device != "cpu"]
        if self.dtype_name not in DTYPES:
            raise EngineStartError(f"dtype {options.dtype!r}: expected auto, {', '.join(DTYPES)}")
        torch.set_num_threads(max(1, options.threads))
        self.processor = load_processor(options.model)
        self.tokenizer = self.processor.tokenizer
        base = quietly_load(transformers.AutoModelForImageTextToText, options.model, dtype=DTYPES[self.dtype_name])
        self.network: Any = base.to(self.device).eval()
        self.model_hash = folder_hash(options.model)
        self.adapters: dict[str, LoadedAdapter] = {}
        self._peft: Any = None  # a peft.PeftModel once there is an adapter; its methods are typed as tensors
        for number, (name, folder) in enumerate(options.adapters):
            # PEFT's names become attribute names, where a dot is not allowed; ours are the caller's.
            self._peft, self.adapters[name] = load_adapter(self._peft or self.network, name, f"adapter{number}", folder)
        self._active: str | None = None
        if self._peft is not None:
            self._peft.eval()
            self._peft.base_model.disable_adapter_layers()
        text_config = base.config.get_text_config()
        self.logit_width = int(text_config.vocab_size)
        self.context_tokens = int(getattr(text_config, "max_position_embeddings", 131072))
        self.stop_ids = stop_ids(getattr(base.generation_config, "eos_token_id", None), self.processor)
        control = control_tokens(self.tokenizer, self.stop_ids)
        self.control_ids, self.control_texts = frozenset(control), frozenset(control.values())
        self._prefixes: OrderedDict[bytes, Any] = OrderedDict()
        self._prefix_entries = options.prefix_cache_entries

    def encode(self, images: Sequence[NDArray[np.uint8]], conversation: Conversation) -> Prompt:
        """The chat template around the conversation, with the answer about to begin. The template writes the only BOS;
        pan-and-scan is off. Raises PromptTooLong, PromptRefused."""
        inputs = apply_template(
            self.processor,
            images,
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=picture_options(self.processor) if images else {},
        )
        ids = inputs.pop("input_ids").to(self.device)
        inputs.pop("attention_mask", None)
        kinds = {name: inputs.pop(name).to(self.device) for name in TOKEN_TYPES if name in inputs}
        marked = [int(torch.nonzero(kind[0])[-1]) + 1 for kind in kinds.values() if kind.any()]
        floats = DTYPES[self.dtype_name]
        pictures = {
            name: value.to(self.device, floats if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        prompt = Prompt(ids, kinds, pictures, self._positions(ids, kinds, pictures), max(marked, default=0))
        if prompt.length >= self.context_tokens:
            raise PromptTooLong(
                f"the images and the text take {prompt.length} tokens; this model's context holds {self.context_tokens}"
            )
        return prompt

    def _positions(
        self, ids: torch.Tensor, kinds: Mapping[str, torch.Tensor], pictures: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """Positions of the prompt's tokens on every axis, where the model has several. Left to itself such a model
        keeps the offset of the last picture that it was given, and counts another request's tokens from there."""
        count = getattr(self.network.model, "get_rope_index", None)
        if count is None:
            return None
        grids = {name: value for name, value in pictures.items() if name.endswith("_grid_thw")}
        positions: torch.Tensor = count(ids, **kinds, **grids)[0]
        return positions

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run the block under one adapter, or under the untouched base."""
        self._select(adapter)
        with torch.inference_mode():
            yield

    def _select(self, adapter: str | None) -> None:
        if adapter is not None and adapter not in self.adapters:
            raise GenerationError(f"the engine has no adapter {adapter!r}; it has {', '.join(self.adapters) or 'none'}")
        if adapter == self._active or self._peft is None:
            return
        if adapter is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(self.adapters[adapter].internal_name)
        self._active = adapter

    def prefill(self, prompt: Prompt) -> tuple[torch.Tensor, Reading, int]:
        """Read the prompt. Returns (logits [vocabulary] of the next token, reading, tokens taken from the prefixes).

        The prompt is always read in two parts, cut after the last image token, so that a prefix taken from the cache
        gives bit for bit what reading it again gives. The second part is plain causal text; only image tokens attend
        in both directions, and they all lie in the first part.
        """
        cache, reused = self._prefix(prompt)
        rest, place = prompt.positions, None
        if rest is not None:
            place = torch.full_like(rest[:, :, :1], int(rest.max()) + 1)
            rest = rest[:, :, prompt.split :]
        return self._forward(prompt.ids[:, prompt.split :], cache, rest), Reading(cache, place), reused

    def step(self, token: int, reading: Reading) -> torch.Tensor:
        """Append one token; the logits [vocabulary] of the next. The reading changes in place."""
        place = reading.next_place
        if place is not None:
            reading.next_place = place + 1
        return self._forward(torch.tensor([[token]], device=self.device), reading.cache, place)

    def _forward(self, ids: torch.Tensor, cache: Any, positions: torch.Tensor | None) -> torch.Tensor:
        output = self.network(
            input_ids=ids, **_placed(positions), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = output.logits[0, -1].to("cpu", torch.float32)
        return logits

    def _prefix(self, prompt: Prompt) -> tuple[Any, int]:
        if prompt.split == 0 or not prompt.pictures:
            return transformers.DynamicCache(config=self.network.config), 0
        key = self._prefix_key(prompt)
        known = self._prefixes.get(key)
        if known is not None:
            self._prefixes.move_to_end(key)
            return _branch(known), prompt.split
        cache, positions = transformers.DynamicCache(config=self.network.config), prompt.positions
        self.network(
            input_ids=prompt.ids[:, : prompt.split],
            **{name: kind[:, : prompt.split] for name, kind in prompt.kinds.items()},
            **prompt.pictures,
            **_placed(None if positions is None else positions[:, :, : prompt.split]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if self._prefix_entries > 0:
            self._prefixes[key] = _branch(cache)
            while len(self._prefixes) > self._prefix_entries:
                self._prefixes.popitem(last=False)
        return cache, 0

    def _prefix_key(self, prompt: Prompt) -> bytes:
        digest = hashlib.sha256(f"{self._active!r};".encode())
        digest.update(prompt.ids[:, : prompt.split].cpu().numpy().tobytes())
        for name, value in sorted(prompt.pictures.items()):
            digest.update(f"{name}{tuple(value.shape)};".encode())
            plain = value.to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
            digest.update(plain.numpy().tobytes())
        return digest.digest()

    def completion_ids(self, completion: str) -> list[int]:
        """The completion's tokens and the end of turn after them."""
        ids: list[int] = self.tokenizer(completion, add_special_tokens=False)["input_ids"] if completion else []
        return [*ids, self.stop_ids[0]]

    def log_probabilities(self, prompt: Prompt, completion: Sequence[int]) -> list[float]:
        """Natural-log probability of each token of the completion, given the prompt."""
        logits, reading, _ = self.prefill(prompt)
        values: list[float] = []
        for token in completion:
            values.append(float(torch.log_softmax(logits, dim=-1)[token]))
            logits = self.step(token, reading)
        return values


def _placed(positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {} if positions is None else {"position_ids": positions}


def _branch(cache: Any) -> Any:
    """A copy of a cache that can grow by itself. Layers grow by concatenation, never in place: tensors are shared."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EngineStartError(f"device {name!r}: this torch sees no CUDA device; use --engine-option device=cpu")
    return name


def folder_hash(folder: Path) -> str:
    """sha256 of the weight file; of several, over their own sha256 digests in the order of their names. It is what
    `base_hash` of an adapter's card names."""
    digests = [_file_hash(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
