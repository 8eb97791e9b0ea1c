"""What one answer of Gemini's is worth: a verdict, or why not, whether asking again may help, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.gemini import Tokens, read_answer
from vlm2vla_schema.parsing import parse_verdict
from vlm2vla_schema.types import Verdict

if TYPE_CHECKING:
    from google.genai.types import GenerateContentResponse

MAX_MESSAGE_CHARS = 300


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
    """A verdict only from a finished answer whose text is exactly one; a refusal is not asked for again."""
    answer = read_answer(response)
    verdict, outcome, message = None, str(answer.outcome), answer.message
    if answer.outcome == "cut":
        message += "; raise it under [gemini] in client.toml"
    elif answer.outcome == "text":
        try:
            verdict, outcome = parse_verdict(answer.text or ""), "verdict"
        except ParseError as error:
            outcome, message = "invalid", f"Gemini's answer is no verdict: {error}"[:MAX_MESSAGE_CHARS]
    again = outcome in ("invalid", "cut")
    return Call(outcome, message, again, 0.0, verdict, answer.finish_reason, answer.text, answer.tokens)
