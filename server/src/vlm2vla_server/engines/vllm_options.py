"""The arguments that vLLM is started with: our defaults, the operator's options, and what is ours alone."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from vlm2vla_schema.types import MODEL_CARD_FILE, ModelCard
from vlm2vla_server.engines.adapters import rank_of
from vlm2vla_server.engines.base import EngineStartError
from vlm2vla_server.engines.processors import quietly_load

MAX_IMAGES = 8
CONTEXT_TOKENS = 8192
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM's kernels are built for: an adapter's rank is rounded up to one of these."""
OURS = frozenset(
    {"model", "tokenizer", "runner", "enable_lora", "max_loras", "max_lora_rank", "generation_config",
     "override_generation_config", "skip_tokenizer_init", "trust_remote_code", "enable_log_requests"}
)  # fmt: skip
"""vLLM's options that this engine sets; `--engine-option` refuses them."""


@dataclass(frozen=True)
class VLLMOptions:
    """How to start vLLM.

    threads: of the arithmetic on a CPU. max_concurrency: requests that the server lets in; half of them run at once
    unless engine_options say otherwise, and the others wait in the server, by priority. engine_options: (name, text)
    pairs for vLLM's own AsyncEngineArgs; text that is JSON (numbers, true, {"a": 1}) is read as JSON.
    """

    model: Path
    adapters: tuple[tuple[str, Path], ...] = ()
    threads: int = 1
    max_concurrency: int = 16
    engine_options: tuple[tuple[str, str], ...] = ()


def engine_arguments(
    options: VLLMOptions, known: Sequence[str], *, on_cpu: bool, whole_images: bool = True
) -> dict[str, Any]:
    """The keyword arguments of AsyncEngineArgs: our defaults, the operator's options over them, and what is ours alone.

    known: the names that this vLLM has. whole_images: the tokens of an image attend to one another, so they have to be
    read together. Raises EngineStartError on an option that vLLM does not have or that is ours.
    """
    arguments = _defaults(options, on_cpu, whole_images)
    for name, text in options.engine_options:
        if name in OURS:
            raise EngineStartError(f"--engine-option {name}: the vllm engine sets this itself")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise EngineStartError(f"--engine-option {name}: this vLLM has no such option{hint}")
        arguments[name] = option_value(text)
    return arguments | {
        "model": str(options.model),
        "enable_lora": bool(options.adapters),
        "max_loras": max(1, len(options.adapters)),
        "max_lora_rank": _lora_rank(options.adapters),
        "generation_config": "vllm",  # not the checkpoint's sampling defaults (Gemma: top_k 64)
        "trust_remote_code": False,
        "enable_log_requests": False,
    }


def _defaults(options: VLLMOptions, on_cpu: bool, whole_images: bool) -> dict[str, Any]:
    config = quietly_load(transformers.AutoConfig, options.model).get_text_config()
    found: dict[str, Any] = {
        "dtype": "float32" if on_cpu else "bfloat16",
        "max_model_len": min(int(getattr(config, "max_position_embeddings", CONTEXT_TOKENS)), CONTEXT_TOKENS),
        "max_num_seqs": max(1, options.max_concurrency // 2),
        "limit_mm_per_prompt": {"image": _pictures(options), "video": 0},
        "mm_processor_cache_gb": 0.25,  # a robot's frames never come back after their cycle
        "enable_prefix_caching": True,
        "disable_chunked_mm_input": whole_images,  # a model of pictures of any size would not start with it
        "structured_outputs_config": {"backend": "xgrammar"},
    }
    if on_cpu:
        # vLLM's blocks of 128 tokens on CPUs are longer than what two prompts of a cycle share.
        found |= {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 2**30}
    return found


def _pictures(options: VLLMOptions) -> dict[str, int]:
    """How many pictures a prompt may hold, and how large they are where a card says so: vLLM tries the model on the
    largest that it takes, which is 4096 x 4096 pixels for some, minutes on a CPU and gigabytes on a GPU."""
    folders = [options.model, *(folder for _, folder in options.adapters)]
    sizes = [ModelCard.read(folder).image_size for folder in folders if (folder / MODEL_CARD_FILE).is_file()]
    return {"count": MAX_IMAGES} | ({"width": max(sizes), "height": max(sizes)} if sizes else {})


def option_value(text: str) -> Any:
    """The value of an option: JSON when it reads as JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lora_rank(adapters: Sequence[tuple[str, Path]]) -> int:
    rank = max((rank_of(name, folder) for name, folder in adapters), default=LORA_RANKS[0])
    fitting = [known for known in LORA_RANKS if known >= rank]
    if not fitting:
        raise EngineStartError(f"an adapter has rank {rank}; vLLM serves at most {LORA_RANKS[-1]}")
    return fitting[0]
