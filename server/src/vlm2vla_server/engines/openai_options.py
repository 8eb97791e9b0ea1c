"""Options of the openai engine: how an endpoint is reached and addressed, and what it can do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from vlm2vla_server.engines.openai_wire import Dialect, GrammarField
from vlm2vla_server.errors import ConfigurationError

KEY_VARIABLE = "VLM2VLA_UPSTREAM_API_KEY"
_RESERVED = re.compile(r"<unused\d+>")
# Turn and image marks of Gemma, Qwen and Llama, for when the model folder has no tokenizer to read them from.
KNOWN_CONTROL_TOKENS = frozenset(
    {
        *("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
        *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
        *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>"),
    }
)


@dataclass(frozen=True)
class EndpointOptions:
    """How to reach and address the endpoint.

    url: up to and including its version, e.g. http://router:8000/v1. dialect: "vllm" also sends vLLM's fields (top_k,
    repetition_penalty, prompt_logprobs, grammars), "openai" none of them. grammar: vLLM's field for a grammar, or
    "off": the text is then free and the strict parser alone decides. base: the endpoint's name of the base; None takes
    "base" when it is offered, else the only model that is no adapter. adapters: (our name, the endpoint's name).
    dtype: what the endpoint is said to compute in, which cannot be seen from outside.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    dialect: Dialect = "vllm"
    grammar: GrammarField = "structured_outputs"
    base: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    model: Path | None = None
    dtype: str = "unknown"
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    start_timeout_s: float = 120.0


def read_options(
    options: Mapping[str, str], adapters: tuple[str, ...], model: Path, environment: Mapping[str, str]
) -> EndpointOptions:
    """`--engine-option`s as EndpointOptions. Raises ConfigurationError."""
    known = {"url", "dialect", "grammar", "base", "dtype", "connect_timeout_s", "read_timeout_s", "start_timeout_s"}
    unknown = [key for key in options if key not in known and not key.startswith("model.")]
    strangers = [key for key in options if key.startswith("model.") and key[len("model.") :] not in adapters]
    if unknown or strangers:
        raise ConfigurationError(
            f"--engine-option {', '.join(sorted(unknown + strangers))}: the openai engine has "
            f"{', '.join(sorted(known))}, and model.NAME for each --adapter NAME"
        )
    url = options.get("url", "").rstrip("/")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise ConfigurationError("the openai engine needs --engine-option url=http://HOST:PORT/v1 (http or https)")
    dialect = _one_of(options, "dialect", ("vllm", "openai"))
    default = "structured_outputs" if dialect == "vllm" else "off"
    return EndpointOptions(
        url=url,
        api_key=environment.get(KEY_VARIABLE) or None,
        dialect=cast("Dialect", dialect),
        grammar=cast(
            "GrammarField", _one_of(options, "grammar", (default, "structured_outputs", "guided_grammar", "off"))
        ),
        base=options.get("base"),
        adapters=tuple((name, options.get(f"model.{name}", name)) for name in adapters),
        model=model,
        dtype=options.get("dtype", "unknown"),
        **{key: _seconds(key, options[key]) for key in options if key.endswith("_timeout_s")},
    )


def _one_of(options: Mapping[str, str], key: str, values: tuple[str, ...]) -> str:
    value = options.get(key, values[0])
    if value not in values:
        raise ConfigurationError(f"--engine-option {key}={value}: expected one of {', '.join(dict.fromkeys(values))}")
    return value


def _seconds(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600.0:
        raise ConfigurationError(f"--engine-option {key}: expected 0.1 to 3600 seconds")
    return value


def control_tokens(folder: Path | None) -> frozenset[str]:
    """KNOWN_CONTROL_TOKENS and the special tokens of a folder's tokenizer.json, the reserved `<unusedN>` apart.

    Raises ConfigurationError."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return KNOWN_CONTROL_TOKENS
    try:
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
        names = [str(token["content"]) for token in added if token.get("special")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ConfigurationError(f"{folder / 'tokenizer.json'} cannot be read: {problem}") from problem
    return KNOWN_CONTROL_TOKENS | {name for name in names if name and not _RESERVED.fullmatch(name)}
