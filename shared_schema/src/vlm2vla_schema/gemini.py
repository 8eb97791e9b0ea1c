"""What verifier and annotator share of Gemini: whether an answer is one, whether to ask again, and what it cost.

Google's library is not imported here: its answers and errors are read as they come, by attribute. It is trusted with
the wire only: its ``response.parsed`` is None for an answer that is no JSON, without an error, and by default it
retries nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

#: In the order in which Google's own library looks for them.
KEY_VARIABLES = ("GOOGLE_API_KEY", "GEMINI_API_KEY")
#: Finish reasons that mean "I will not answer this".
BLOCKING = frozenset(
    {
        "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT", "MODEL_ARMOR", "ESCALATION", "PUP_LIMITED_DISABLED",
    }
)  # fmt: skip
#: Answers of Google's that another attempt may mend; the other ones (a wrong key, an unknown model) stay as they are.
PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
#: Whose errors mean that the line failed; those of others mean that what came over it was no answer.
TRANSPORTS = ("httpx", "httpcore", "requests", "urllib3", "google.auth")
_LONGEST_WAIT_S = 3600.0

AnswerOutcome: TypeAlias = Literal["text", "blocked", "cut", "invalid"]


class Price(BaseModel):
    """US dollars per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    input_usd: float = Field(ge=0)
    output_usd: float = Field(ge=0)


@dataclass(frozen=True)
class Tokens:
    """What one call used, as Google counts it. ``None`` where no answer said it (the call may still be billed)."""

    prompt: int | None = None
    output: int | None = None
    thought: int | None = None


@dataclass(frozen=True)
class GeminiAnswer:
    """One GenerateContentResponse.

    Attributes:
        outcome: text when the answer was finished, whatever the text holds.
        text: of the answer's parts without thoughts; None without a candidate.
        finish_reason: None when the prompt itself was refused, or nothing came.
        message: why it is no answer; empty for text.
    """

    outcome: AnswerOutcome
    text: str | None = None
    finish_reason: str | None = None
    message: str = ""
    tokens: Tokens = field(default_factory=Tokens)


def read_answer(response: Any) -> GeminiAnswer:
    """Read a ``google.genai.types.GenerateContentResponse``; only a finished answer is text."""
    tokens = _tokens(response)
    feedback = response.prompt_feedback
    if feedback is not None and feedback.block_reason is not None:
        message = f"Gemini refused the pictures or the words ({_name(feedback.block_reason)})"
        return GeminiAnswer("blocked", message=message, tokens=tokens)
    if not response.candidates:
        return GeminiAnswer("invalid", message="Gemini's answer holds no candidate", tokens=tokens)
    candidate = response.candidates[0]
    reason = _name(candidate.finish_reason)
    parts = (candidate.content.parts if candidate.content is not None else None) or []
    text = "".join(part.text for part in parts if part.text and not part.thought)
    if reason in BLOCKING:
        return GeminiAnswer("blocked", text, reason, f"Gemini stopped its answer ({reason})", tokens)
    if reason == "MAX_TOKENS":
        return GeminiAnswer("cut", text, reason, "Gemini's answer was cut at max_output_tokens", tokens)
    if reason != "STOP":
        return GeminiAnswer("invalid", text, reason, f"Gemini did not finish its answer ({reason})", tokens)
    return GeminiAnswer("text", text, reason, "", tokens)


def is_transport_error(error: Exception) -> bool:
    """True when the line to Google failed, False when what came over it could not be read."""
    return isinstance(error, OSError) or type(error).__module__.startswith(TRANSPORTS)


def asked_to_wait_s(error: Any) -> float:
    """Google's own wish in a ``google.genai.errors.APIError``, from the header or from ``RetryInfo`` in the body; 0
    when it named none.
    """
    headers = getattr(error.response, "headers", None) or {}
    wishes = [headers.get("retry-after", "")]
    body = error.details.get("error", error.details) if isinstance(error.details, dict) else {}
    details = body.get("details") if isinstance(body, dict) else None
    for item in details if isinstance(details, list) else []:
        if isinstance(item, dict):
            wishes.append(str(item.get("retryDelay", "")).removesuffix("s"))
    return max(map(_seconds, wishes))


def cost_usd(tokens: Tokens, price: Price | None) -> float | None:
    """Dollars for one call; thoughts count as output. None without a price or without counts.

    Prompt tokens that Google served from its cache are counted in full, so this never says too little.
    """
    if price is None or tokens.prompt is None:
        return None
    output = (tokens.output or 0) + (tokens.thought or 0)
    return (tokens.prompt * price.input_usd + output * price.output_usd) / 1e6


def api_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The API key from the environment, or None."""
    for name in KEY_VARIABLES:
        if environment.get(name, "").strip():
            return environment[name].strip()
    return None


def _tokens(response: Any) -> Tokens:
    usage = response.usage_metadata
    if usage is None or usage.prompt_token_count is None:
        return Tokens()
    return Tokens(usage.prompt_token_count, usage.candidates_token_count or 0, usage.thoughts_token_count or 0)


def _name(reason: Any) -> str:
    return str(getattr(reason, "name", reason))


def _seconds(text: str) -> float:
    try:
        return min(max(float(text), 0.0), _LONGEST_WAIT_S)
    except ValueError:
        return 0.0
