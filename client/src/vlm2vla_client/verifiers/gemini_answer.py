"""What one answer of Gemini's is worth: a verdict, or why not, whether asking again may help, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm2vla_client.verifiers.gemini_settings import Tokens
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.parsing import parse_verdict
from vlm2vla_schema.types import Verdict

if TYPE_CHECKING:
    from google.genai.types import GenerateContentResponse

MAX_MESSAGE_CHARS = 300
#: Finish reasons that mean "I will not answer this"; asking again would not help.
BLOCKING = frozenset(
    {
        "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT", "MODEL_ARMOR", "ESCALATION", "PUP_LIMITED_DISABLED",
    }
)  # fmt: skip



@dataclass(frozen=True)
class Call:
    """One request and what came of it; recorded as the event ``verifier_call``.

    Attributes:
        outcome: verdict, invalid, cut, blocked, refused, http_error, timeout or network.
        again: whether another attempt may help.
        wait_s: how long Google asked to wait before it.
    """

    outcome: str
    message: str = ""
    again: bool = False
    wait_s: float = 0.0
    verdict: Verdict | None = None
    finish_reason: str | None = None
    text: str | None = None
    tokens: Tokens = field(default_factory=Tokens)


@dataclass
class Cost:
    """The sum over all calls so far. ``uncounted``: calls whose tokens nobody told; they may be billed all the same."""

    calls: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    thought_tokens: int = 0
    usd: float | None = None
    uncounted: int = 0

    def add(self, tokens: Tokens, usd: float | None) -> None:
        """One more call."""
        self.calls += 1
        self.prompt_tokens += tokens.prompt or 0
        self.output_tokens += tokens.output or 0
        self.thought_tokens += tokens.thought or 0
        self.uncounted += tokens.prompt is None
        if usd is not None:
            self.usd = (self.usd or 0.0) + usd

    def text(self) -> str:
        """The sum in one line, for people."""
        money = "cost unknown: no price in client.toml" if self.usd is None else f"{self.usd:.4f} USD"
        unsure = f", and {self.uncounted} calls of unknown size" if self.uncounted else ""
        tokens = f"{self.prompt_tokens} tokens in, {self.output_tokens} out, {self.thought_tokens} thought"
        return f"{self.calls} calls, {tokens}; {money}{unsure}"


def judge(response: GenerateContentResponse) -> Call:
    """A verdict only from a finished answer whose text is exactly one."""
    tokens = _tokens(response)
    feedback = response.prompt_feedback
    if feedback is not None and feedback.block_reason is not None:
        message = f"Gemini refused the pictures or the words ({_name(feedback.block_reason)})"
        return Call("blocked", message, tokens=tokens)
    if not response.candidates:
        return Call("invalid", "Gemini's answer holds no candidate", again=True, tokens=tokens)
    candidate = response.candidates[0]
    reason = _name(candidate.finish_reason)
    parts = (candidate.content.parts if candidate.content is not None else None) or []
    text = "".join(part.text for part in parts if part.text and not part.thought)

    def call(outcome: str, message: str, again: bool, verdict: Verdict | None = None) -> Call:
        return Call(outcome, message, again, 0.0, verdict, reason, text, tokens)

    if reason in BLOCKING:
        return call("blocked", f"Gemini stopped its answer ({reason})", False)
    if reason == "MAX_TOKENS":
        return call("cut", "Gemini's answer was cut at max_output_tokens; raise it under [gemini] in client.toml", True)
    if reason != "STOP":
        return call("invalid", f"Gemini did not finish its answer ({reason})", True)
    try:
        return call("verdict", "", False, parse_verdict(text))
    except ParseError as error:
        return call("invalid", f"Gemini's answer is no verdict: {error}"[:MAX_MESSAGE_CHARS], True)


def _tokens(response: GenerateContentResponse) -> Tokens:
    usage = response.usage_metadata
    if usage is None or usage.prompt_token_count is None:
        return Tokens()
    return Tokens(usage.prompt_token_count, usage.candidates_token_count or 0, usage.thoughts_token_count or 0)


def _name(reason: Any) -> str:
    return str(getattr(reason, "name", reason))


def asked_to_wait_s(error: Any) -> float:
    """Google's own wish, from the header or from ``RetryInfo`` in the body; 0 when it named none."""
    headers = getattr(error.response, "headers", None) or {}
    wishes = [headers.get("retry-after", "")]
    body = error.details.get("error", error.details) if isinstance(error.details, dict) else {}
    details = body.get("details") if isinstance(body, dict) else None
    for item in details if isinstance(details, list) else []:
        if isinstance(item, dict):
            wishes.append(str(item.get("retryDelay", "")).removesuffix("s"))
    return max(map(_seconds, wishes))


def _seconds(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 3600.0)
    except ValueError:
        return 0.0
