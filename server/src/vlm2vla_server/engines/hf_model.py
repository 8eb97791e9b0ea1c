"""A Hugging Face vision-language model with PEFT adapters, run synchronously by one thread.

Written for Gemma 3 (`AutoModelForImageTextToText`, `AutoProcessor`); another model whose processor has a chat template
and whose image tokens are marked by `token_type_ids` is configuration. Everything here blocks: `transformers_engine`
runs it on its worker thread.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from vlm2vla_server.engines.adapters import LoadedAdapter, load_adapter
from vlm2vla_server.engines.base import Conversation, EngineStartError, GenerationError, PromptRefused, PromptTooLong
from vlm2vla_server.engines.decoding import control_tokens

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
    """A prompt as the model takes it. ids: int64 [1, T]; kinds: int64 [1, T], 1 on image tokens; pixels: float
    [N, 3, S, S] or None; split: number of leading tokens up to and including the last image token."""

    ids: torch.Tensor
    kinds: torch.Tensor
    pixels: torch.Tensor | None
    split: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.ids.shape[1])


class HFModel:
    """The loaded model. One thread only."""

    def __init__(self, options: ModelOptions) -> None:
        self.device = _device(options.device)
        self.dtype_name = options.dtype if options.dtype != "auto" else ("float32", "bfloat16")[self.device != "cpu"]
        if self.dtype_name not in DTYPES:
            raise EngineStartError(f"dtype {options.dtype!r}: expected auto, {', '.join(DTYPES)}")
        torch.set_num_threads(max(1, options.threads))
        self.processor = quietly_load(transformers.AutoProcessor, options.model)
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
        self.stop_ids = stop_ids(getattr(base.generation_config, "eos_token_id", None), self.tokenizer)
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
            processor_kwargs={"do_pan_and_scan": False} if images else {},
        )
        ids = inputs["input_ids"].to(self.device)
        kinds = inputs.get("token_type_ids")
        kinds = torch.zeros_like(ids) if kinds is None else kinds.to(self.device)
        marked = torch.nonzero(kinds[0] == 1)
        split = int(marked[-1]) + 1 if len(marked) else 0
        pixels = inputs.get("pixel_values")
        if pixels is not None:
            pixels = pixels.to(self.device, DTYPES[self.dtype_name])
        prompt = Prompt(ids, kinds, pixels, split)
        if prompt.length >= self.context_tokens:
            raise PromptTooLong(
                f"the images and the text take {prompt.length} tokens; this model's context holds {self.context_tokens}"
            )
        return prompt

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

    def prefill(self, prompt: Prompt) -> tuple[torch.Tensor, Any, int]:
        """Read the prompt. Returns (logits [vocabulary] of the next token, cache, tokens taken from the prefix cache).

        The prompt is always read in two parts, cut after the last image token, so that a prefix taken from the cache
        gives bit for bit what reading it again gives. The second part is plain causal text; only image tokens attend
        in both directions, and they all lie in the first part.
        """
        cache, reused = self._prefix(prompt)
        logits = self._forward(prompt.ids[:, prompt.split :], cache)
        return logits, cache, reused

    def step(self, token: int, cache: Any) -> torch.Tensor:
        """Append one token; the logits [vocabulary] of the next. cache changes in place."""
        return self._forward(torch.tensor([[token]], device=self.device), cache)

    def _forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        output = self.network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1].to("cpu", torch.float32)
        return logits

    def _prefix(self, prompt: Prompt) -> tuple[Any, int]:
        if prompt.split == 0 or prompt.pixels is None:
            return transformers.DynamicCache(config=self.network.config), 0
        key = self._prefix_key(prompt)
        known = self._prefixes.get(key)
        if known is not None:
            self._prefixes.move_to_end(key)
            return _branch(known), prompt.split
        cache = transformers.DynamicCache(config=self.network.config)
        self.network(
            input_ids=prompt.ids[:, : prompt.split],
            token_type_ids=prompt.kinds[:, : prompt.split],
            pixel_values=prompt.pixels,
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
        assert prompt.pixels is not None
        digest.update(prompt.pixels.to("cpu", torch.float32).numpy().tobytes())
        return digest.digest()

    def completion_ids(self, completion: str) -> list[int]:
        """The completion's tokens and the end of turn after them."""
        ids: list[int] = self.tokenizer(completion, add_special_tokens=False)["input_ids"] if completion else []
        return [*ids, self.stop_ids[0]]

    def log_probabilities(self, prompt: Prompt, completion: Sequence[int]) -> list[float]:
        """Natural-log probability of each token of the completion, given the prompt."""
        logits, cache, _ = self.prefill(prompt)
        values: list[float] = []
        for token in completion:
            values.append(float(torch.log_softmax(logits, dim=-1)[token]))
            logits = self.step(token, cache)
        return values


def apply_template(
    processor: Any, images: Sequence[NDArray[np.uint8]], conversation: Conversation, **options: Any
) -> Any:
    """The model's own chat template around a conversation, with the answer about to begin. Raises PromptRefused."""
    try:
        return processor.apply_chat_template(_messages(images, conversation), add_generation_prompt=True, **options)
    except jinja2.TemplateError as problem:
        raise PromptRefused(
            "the model's chat template refuses this order of turns; most want user and assistant in turn, the user "
            "first, after at most one system message"
        ) from problem


def _messages(images: Sequence[NDArray[np.uint8]], conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as processors take it."""
    waiting = iter(images)

    def part(text: str | None) -> dict[str, Any]:
        if text is None:
            return {"type": "image", "image": Image.fromarray(next(waiting))}
        return {"type": "text", "text": text}

    return [{"role": turn.role, "content": [part(text) for text in turn.parts]} for turn in conversation]


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


def quietly_load(factory: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` from a local folder, never from the network and never running code from the folder."""
    try:
        return factory.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as problem:
        raise EngineStartError(f"cannot load {factory.__name__} from {folder}: {problem}") from problem


def stop_ids(configured: Any, tokenizer: Any) -> list[int]:
    """End-of-turn first, then whatever else ends an answer. configured: `eos_token_id` of the checkpoint's generation
    settings: one id, several, or None. Raises EngineStartError when nothing ends an answer."""
    wanted: list[int] = []
    vocabulary = tokenizer.get_vocab()
    if "<end_of_turn>" in vocabulary:
        wanted.append(int(vocabulary["<end_of_turn>"]))
    for source in (configured, tokenizer.eos_token_id):
        many = source if isinstance(source, list) else [source]
        wanted.extend(int(i) for i in many if i is not None)
    if not wanted:
        raise EngineStartError("the model names no end-of-turn and no end-of-sequence token")
    return list(dict.fromkeys(wanted))


def folder_hash(folder: Path) -> str:
    """sha256 of the weight file; of several, over their own sha256 digests in the order of their names. It is what
    `base_hash` of an adapter's card names."""
    digests = [_file_hash(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
