"""Proof that an adapter is active, before the server says it is ready.

Engines accept an adapter whose names match nothing and then answer as the base does, without any error; others apply it
wrongly. So log-probabilities are measured under base and adapter and compared with those that `export` stored in the
adapter's card (transformers and PEFT, float32). A card without such references gets the weaker proof: over eight fixed
prompts the adapter must differ from the base at all.

A whole model (merged, fp8, every weight trained) has no base beside it: what the base says comes from the card too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.errors import ImageError
from vlm2vla_schema.images import decode_image, from_base64, to_model_square
from vlm2vla_schema.probes import CLOSER_THAN_BASE, PROBE_PROMPTS, probe_image, tolerance_nat
from vlm2vla_schema.types import ModelCard, ReferenceLogprobs
from vlm2vla_server.engines.base import Engine, GenerationRequest, ScoreRequest
from vlm2vla_server.settings import BASE_MODEL_NAME

MIN_MEAN_DIFFERENCE_NAT = 1e-3
ANSWER_TOKENS = 12
_OUTSIDE_LANGUAGE_MODEL = re.compile(r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector)\.")
_MAX_HEADER_BYTES = 64 * 2**20

ProofKind = Literal["references", "difference"]


@dataclass(frozen=True)
class Proof:
    """What was measured for one adapter, in nat a token.

    mean_difference_nat: mean absolute difference between adapter and base on this server.
    distance_nat: of the probe where it is largest, the mean absolute difference between this server's adapter and the
    card's references; None without references. base_distance_nat and mean_distance_nat: over all tokens of all probes,
    the base's and the adapter's mean distance from the same references. problem: None when the adapter is proven.
    """

    adapter: str
    kind: ProofKind
    mean_difference_nat: float
    distance_nat: float | None = None
    mean_distance_nat: float | None = None
    base_distance_nat: float | None = None
    tolerance_nat: float | None = None
    problem: str | None = None


async def prove(engine: Engine, cards: Mapping[str, ModelCard]) -> dict[str, Proof]:
    """Measure every adapter, by name, against the base. Raises what the engine raises."""
    proofs = {}
    for name, card in cards.items():
        if card.reference_logprobs:
            proofs[name] = await _by_references(engine, name, card, card.reference_logprobs)
        else:
            proofs[name] = await _by_difference(engine, name, card)
    return proofs


async def prove_whole(engine: Engine, name: str, card: ModelCard) -> Proof | None:
    """Measure the engine's own weights against the references of their card; None for a card without any."""
    if not card.reference_logprobs:
        return None
    return await _by_references(engine, name, card, card.reference_logprobs, whole=True)


async def _by_references(
    engine: Engine, name: str, card: ModelCard, references: Sequence[ReferenceLogprobs], *, whole: bool = False
) -> Proof:
    """whole: the model that is served is the one to prove, and the base's log-probabilities are those of the card."""
    limit = tolerance_nat(engine.info().dtype)
    ours: list[NDArray[np.float64]] = []
    base: list[NDArray[np.float64]] = []
    stored: list[NDArray[np.float64]] = []
    for number, reference in enumerate(references, start=1):
        images = _images(reference, card.image_size)
        if images is None:
            return _unusable(name, f"the picture of its reference {number} cannot be read")
        asked = ((None, ours),) if whole else ((name, ours), (None, base))
        for adapter, values in asked:
            score = await engine.score(ScoreRequest(images, reference.prompt, reference.completion, adapter))
            values.append(np.asarray(score))
        if whole:
            base.append(np.asarray(reference.base_logprobs))
        stored.append(np.asarray(reference.logprobs))
        if not len(ours[-1]) == len(base[-1]) == len(stored[-1]) > 0:
            return _unusable(
                name,
                f"its reference {number} has {len(stored[-1])} tokens, this server counts {len(ours[-1])} (base "
                f"{len(base[-1])}): another tokenizer than where it was made",
            )
    apart = [float(np.mean(np.abs(a - b))) for a, b in zip(ours, stored, strict=True)]
    measured = Proof(
        adapter=name,
        kind="references",
        mean_difference_nat=_apart(ours, base),
        distance_nat=max(apart),
        mean_distance_nat=_apart(ours, stored),
        base_distance_nat=_apart(base, stored),
        tolerance_nat=limit,
    )
    return _judged(measured, engine.info().dtype)


def _apart(one: Sequence[NDArray[np.float64]], other: Sequence[NDArray[np.float64]]) -> float:
    return float(np.mean(np.abs(np.concatenate(one) - np.concatenate(other))))


def _judged(proof: Proof, dtype: str) -> Proof:
    far, mean, base, limit = proof.distance_nat, proof.mean_distance_nat, proof.base_distance_nat, proof.tolerance_nat
    assert far is not None and mean is not None and base is not None and limit is not None
    problem = _difference_problem(proof.adapter, proof.mean_difference_nat)
    if problem is None and not far <= limit:
        problem = (
            f"{_what(proof.adapter)} is not what was exported: its log-probabilities are {far:.3g} nat from the "
            f"references of its card (base: {base:.3g}), expected at most {limit:g} in {dtype}; were its weights, "
            "their names or the base changed?"
        )
    if problem is None and not mean * CLOSER_THAN_BASE <= base:
        problem = (
            f"{_what(proof.adapter)} is not clearly active: it is {mean:.3g} nat from the references of its card, "
            f"the base {base:.3g}; expected it to be at least {CLOSER_THAN_BASE:g} times closer than the base"
        )
    return Proof(**{**vars(proof), "problem": problem})


def _what(name: str) -> str:
    return "what is merged" if name == BASE_MODEL_NAME else f"adapter {name!r}"


def _unusable(name: str, why: str) -> Proof:
    return Proof(name, "references", 0.0, problem=f"{_what(name)} cannot be proven: {why}; export it again")


def _images(reference: ReferenceLogprobs, size: int) -> tuple[NDArray[np.uint8], ...] | None:
    if reference.image is None:
        return ()
    try:
        return (to_model_square(decode_image(from_base64(reference.image)), size),)
    except ImageError:
        return None


async def _by_difference(engine: Engine, name: str, card: ModelCard) -> Proof:
    """The base's own greedy answers, scored under base and adapter, must differ."""
    total = 0.0
    for index, prompt in enumerate(PROBE_PROMPTS):
        images = (probe_image(index, card.image_size),)
        answer = await _greedy(engine, images, prompt)
        base = await engine.score(ScoreRequest(images, prompt, answer, None))
        adapted = await engine.score(ScoreRequest(images, prompt, answer, name))
        total += float(np.mean(np.abs(np.subtract(adapted, base))))
    mean = total / len(PROBE_PROMPTS)
    return Proof(name, "difference", mean, problem=_difference_problem(name, mean))


def _difference_problem(name: str, mean_nat: float) -> str | None:
    if mean_nat >= MIN_MEAN_DIFFERENCE_NAT:
        return None
    return (
        f"{_what(name)} does not change the model: its log-probabilities differ from the base's by {mean_nat:.2e} "
        f"nat on average over {len(PROBE_PROMPTS)} prompts, expected at least {MIN_MEAN_DIFFERENCE_NAT:g}; was it "
        "exported for this base?"
    )


async def _greedy(engine: Engine, images: tuple[NDArray[np.uint8], ...], prompt: str) -> str:
    request = GenerationRequest(
        images=images, prompt=prompt, adapter=None, temperature=0.0, top_p=1.0, seed=0, max_tokens=ANSWER_TOKENS
    )
    return "".join([delta.text async for delta in engine.generate(request)])


def scope_problem(name: str, folder: Path) -> str | None:
    """Why an adapter's file must not be served on any engine: it reaches outside the language model.

    Engines disagree about such modules: PEFT adapts the vision tower's q, k and v, vLLM applies them wrongly or not at
    all (vllm#32758, #48019, #51949). Only the names in the file's header are read. A file that cannot be read is left
    to the engine, which says what is wrong with it.
    """
    path = folder / "adapter_model.safetensors"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                return None
            names = [key for key in json.loads(file.read(length)) if key != "__metadata__"]
    except (OSError, ValueError, TypeError):
        return None
    outside = [key for key in names if _OUTSIDE_LANGUAGE_MODEL.search(key)]
    if not outside:
        return None
    return (
        f"adapter {name!r} adapts modules outside the language model ({len(outside)} of {len(names)} tensors, e.g. "
        f"{outside[0]}), which engines apply differently; train it on the language model's linears only, or merge it "
        "(vlm2vla-train export --format merged)"
    )
