"""What annotating a dataset with Gemini will cost, said before the first request."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice

from vlm2vla_schema.gemini import Price
from vlm2vla_training.annotation.gemini_budget import (
    EXPECTED_CHARS_A_TOKEN,
    EXPECTED_THOUGHTS,
    dollars,
    expected_output_tokens,
    image_tokens,
)
from vlm2vla_training.annotation.gemini_request import RequestSettings, image_size, question_about
from vlm2vla_training.episodes.parquet import EpisodeDataset

_SAMPLED = 16


@dataclass(frozen=True)
class AnnotationEstimate:
    """Expected tokens and US dollars of one request an episode; a repaired episode costs about twice as much.

    `basis` says what the figures rest on.
    """

    episodes: int
    prompt_tokens: int
    output_tokens: int
    usd: float
    basis: str

    def text(self) -> str:
        """The estimate for people."""
        tokens = f"{self.prompt_tokens:,} tokens in, {self.output_tokens:,} out"
        return f"{self.episodes} episodes, {tokens}, about {self.usd:.2f} USD ({self.basis})"


def estimate_annotation(
    dataset: EpisodeDataset,
    left: Collection[str],
    settings: RequestSettings,
    price: Price,
    measured_output: float | None = None,
) -> AnnotationEstimate:
    """Estimate the episodes `left` of a dataset from some of them, read with their images.

    Args:
        dataset: where they are.
        left: keys of the episodes that will be asked about.
        settings: of the request.
        price: of the model.
        measured_output: mean tokens of an answer, thoughts included, from earlier calls; None for an assumption.
    """
    steps = dataset.steps()
    rows_left = sum(steps[key] for key in left)
    skip = frozenset(steps.keys() - set(left))
    rows = prompt = 0
    output = 0.0
    for episode in islice(dataset.episodes(skip), _SAMPLED):
        question = question_about(episode, settings)
        rows += len(episode)
        prompt += sum(image_tokens(*image_size(data)) for _, data in question.frames)
        prompt += round(len(question.prompt) / EXPECTED_CHARS_A_TOKEN)
        output += measured_output or expected_output_tokens(settings.version, len(episode))
    scale = rows_left / rows if rows else 0.0
    prompt_tokens, output_tokens = round(prompt * scale), round(output * scale)
    basis = "answers as long as those so far" if measured_output else f"{EXPECTED_THOUGHTS} tokens of thought assumed"
    usd = dollars(prompt_tokens, output_tokens, price)
    return AnnotationEstimate(len(left), prompt_tokens, output_tokens, usd, basis)
