"""The size of a Gemma-3 model, from the ``config.json`` that its folder holds; parameters and bytes that follow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vlm2vla_client.errors import ConfigurationError

PUBLISHED = ("gemma-3-12b",)
DEFAULT_PATTERN = 6


@dataclass(frozen=True)
class Decoder:
    """The language model. ``global_layers`` of its ``layers`` see the whole context, the others ``window`` tokens."""

    layers: int
    global_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    vocabulary: int
    tied: bool

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's seven matrices: q, k, v, o, gate, up, down."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_norms(self) -> int:
        """Parameters of one layer's norms: four over the hidden width, and those of queries and keys."""
        return 4 * self.hidden + 2 * self.head_dim

    @property
    def head(self) -> int:
        """Parameters of the matrix from hidden width to vocabulary (the embedding, when tied)."""
        return self.vocabulary * self.hidden

    @property
    def read_per_token(self) -> int:
        """Parameters that one decoding step reads: all layers, the last norm, the head; of the embedding one row."""
        return self.layers * (self.layer_matrices + self.layer_norms) + self.hidden + self.head

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.read_per_token + (0 if self.tied else self.head)

    def kv_bytes(self, context: int, number_bytes: float) -> float:
        """Keys and values that attention reads when ``context`` tokens are in the cache."""
        tokens = self.global_layers * context + (self.layers - self.global_layers) * min(context, self.window)
        return 2 * self.kv_heads * self.head_dim * number_bytes * tokens

    def attention_flops(self, context: int) -> float:
        """Operations of one token that looks at ``context`` tokens, in all layers: scores and weighted sum."""
        keys = self.global_layers * context + (self.layers - self.global_layers) * min(context, self.window)
        return 4.0 * self.heads * self.head_dim * keys


@dataclass(frozen=True)
class Tower:
    """The SigLIP vision tower and the projection of its patches to ``image_tokens`` tokens."""

    layers: int
    hidden: int
    intermediate: int
    image_px: int
    patch_px: int
    image_tokens: int

    @property
    def patches(self) -> int:
        """Patches of one picture."""
        return (self.image_px // self.patch_px) ** 2

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's six matrices, without biases."""
        return 4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate

    @property
    def embedding(self) -> int:
        """Parameters of the patch embedding, without bias."""
        return 3 * self.patch_px * self.patch_px * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters: matrices with biases, layer norms, positions."""
        small = 4 * self.hidden + self.intermediate + self.hidden + 4 * self.hidden
        edges = self.embedding + self.hidden + self.patches * self.hidden + 2 * self.hidden
        return self.layers * (self.layer_matrices + small) + edges


@dataclass(frozen=True)
class ModelShape:
    """Decoder, tower, and the projection between them."""

    name: str
    decoder: Decoder
    tower: Tower

    @property
    def projection(self) -> int:
        """Parameters between tower and decoder: a matrix and a norm."""
        return self.tower.hidden * self.decoder.hidden + self.tower.hidden

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.decoder.parameters + self.tower.parameters + self.projection


def read_shape(source: str) -> ModelShape:
    """A published model by name, or the ``config.json`` of a Gemma-3 folder.

    Raises:
        ConfigurationError: no such file, or a field is missing.
    """
    path = Path(source)
    try:
        if source in PUBLISHED:
            text = resources.files(__package__).joinpath(f"{source}.json").read_text(encoding="utf-8")
        else:
            text = (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
        return _shape(source if source in PUBLISHED else _name(path), json.loads(text))
    except OSError as error:
        known = ", ".join(PUBLISHED)
        raise ConfigurationError(f"--floor {source}: {error.strerror}; give {known} or a config.json") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"--floor {source} is not the config.json of a Gemma-3 model: {error}") from None
    except KeyError as error:
        raise ConfigurationError(f"--floor {source}: the file has no {error}; is it Gemma-3's config.json?") from None


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name == "config.json" else path.stem


def _shape(name: str, config: Mapping[str, Any]) -> ModelShape:
    text, vision = config["text_config"], config["vision_config"]
    layers = _whole(text, "num_hidden_layers")
    decoder = Decoder(
        layers=layers,
        global_layers=_global_layers(text, layers),
        hidden=_whole(text, "hidden_size"),
        intermediate=_whole(text, "intermediate_size"),
        heads=_whole(text, "num_attention_heads"),
        kv_heads=_whole(text, "num_key_value_heads"),
        head_dim=_whole(text, "head_dim"),
        window=_whole(text, "sliding_window"),
        vocabulary=_whole(text, "vocab_size"),
        tied=bool(text.get("tie_word_embeddings", True)),
    )
    tower = Tower(
        layers=_whole(vision, "num_hidden_layers"),
        hidden=_whole(vision, "hidden_size"),
        intermediate=_whole(vision, "intermediate_size"),
        image_px=_whole(vision, "image_size"),
        patch_px=_whole(vision, "patch_size"),
        image_tokens=_whole(config, "mm_tokens_per_image"),
    )
    return ModelShape(name, decoder, tower)


def _whole(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a whole number from 1 on, found {value!r}")
    return value


def _global_layers(text: Mapping[str, Any], layers: int) -> int:
    """Newer configurations list every layer's kind; older ones say that every n-th is global."""
    kinds = text.get("layer_types")
    if kinds is not None:
        return sum(kind == "full_attention" for kind in kinds)
    return layers // int(text.get("sliding_window_pattern", text.get("_sliding_window_pattern", DEFAULT_PATTERN)))
