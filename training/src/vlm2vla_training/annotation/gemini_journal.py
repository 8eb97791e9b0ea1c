"""calls.jsonl: every request to Gemini and what came of it, on disk before anything is made of it.

A run that was killed asks nothing again that it has paid for: answers are found by what was asked. A request whose
answer never came down is counted at the most that it can have cost, because Google may bill it all the same.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vlm2vla_schema.gemini import GeminiAnswer, Price, Tokens, cost_usd
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import JsonlAppender, read_jsonl

CALLS_FILE = "calls.jsonl"


@dataclass
class Spent:
    """The sum over all calls that may be billed. `uncounted` of them have no token counts; `uncounted_usd` is the most
    that these can cost. `refused`: error answers, which are free.
    """

    calls: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    thought_tokens: int = 0
    usd: float = 0.0
    uncounted: int = 0
    uncounted_usd: float = 0.0

    def add(self, tokens: Tokens, usd: float | None, bound_usd: float) -> None:
        """Count one answered call; without counts of tokens, or lost on the line, at its bound."""
        self.calls += 1
        if tokens.prompt is None or usd is None:
            self.uncounted += 1
            self.uncounted_usd += bound_usd
            return
        self.prompt_tokens += tokens.prompt
        self.output_tokens += tokens.output or 0
        self.thought_tokens += tokens.thought or 0
        self.usd += usd

    def mean_output_tokens(self) -> float | None:
        """Tokens of an answer so far, thoughts included; None before the first."""
        counted = self.calls - self.uncounted
        return (self.output_tokens + self.thought_tokens) / counted if counted else None

    def at_most_usd(self) -> float:
        """What has been spent at the most."""
        return self.usd + self.uncounted_usd

    def text(self) -> str:
        """The sum for people."""
        unsure = f" and at most {self.uncounted_usd:.4f} for {self.uncounted} unanswered" if self.uncounted else ""
        return f"{self.calls} calls, {self.usd:.4f} USD{unsure}"

    def to_json(self) -> dict[str, Any]:
        """Return the values for summary.json; dollars to a millionth."""
        return {**vars(self), "usd": round(self.usd, 6), "uncounted_usd": round(self.uncounted_usd, 6)}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to `folder` while the block runs; the end of the process, however it comes,
    lets go.

    Raises:
        UsageError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "calls.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another annotate is writing to {folder}; wait for it or choose another --out") from None
        yield


class Journal:
    """Append-only record of calls. Safe to use from several threads; the caller holds the folder (`held`)."""

    def __init__(self, folder: Path, price: Price, finished: Container[str] = ()) -> None:
        """Open or create the journal in `folder` and add up what earlier runs spent.

        Args:
            folder: of the run.
            price: of the model, for new calls; recorded calls keep their own.
            finished: contents whose recorded answers nobody will ask for.

        Raises:
            DataError: the file is not what this class writes.
        """
        self._lock = threading.Lock()
        self._price = price
        self.spent = Spent()
        self._answers: dict[tuple[str, int], GeminiAnswer] = {}
        path = folder / CALLS_FILE
        self._next = self._read(path, finished) if path.exists() else 0
        self._file = JsonlAppender(path, durable=True)

    def _read(self, path: Path, finished: Container[str]) -> int:
        open_calls: dict[int, dict[str, Any]] = {}
        following = 0
        for line in read_jsonl(path):
            number = int(line["call"])
            if line["event"] == "asked":
                open_calls[number] = line
                following = number + 1
                continue
            if number not in open_calls:
                raise DataError(f"{path} tells what came of call {number}, which was never asked; it has been changed")
            asked = open_calls.pop(number)
            if line["event"] == "refused":
                self.spent.refused += 1
                continue
            tokens = Tokens(*(line[f"{name}_tokens"] for name in ("prompt", "output", "thought")))
            self.spent.add(tokens, line["usd"], asked["bound_usd"])
            if line["event"] == "answered" and asked["content"] not in finished:
                answer = GeminiAnswer(line["outcome"], line["text"], line["finish_reason"], line["message"], tokens)
                self._answers[asked["content"], asked["round"]] = answer
        for asked in open_calls.values():
            self.spent.add(Tokens(), None, asked["bound_usd"])
        return following

    def recorded(self, content: str, turn: int) -> GeminiAnswer | None:
        """Return the answer that an earlier run got for this content, or None."""
        return self._answers.get((content, turn))

    def asked(self, episode_key: str, content: str, turn: int, model: str, bound_usd: float) -> int:
        """Record a request that is about to leave; return its number."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._file.append(
                {"event": "asked", "call": number, "episode_key": episode_key, "content": content, "round": turn,
                 "model": model, "bound_usd": bound_usd}
            )  # fmt: skip
            return number

    def answered(self, number: int, answer: GeminiAnswer, bound_usd: float) -> float:
        """Record an answer; return what it cost in dollars, its bound when Google counted nothing."""
        usd = cost_usd(answer.tokens, self._price)
        with self._lock:
            self._close("answered", number, answer, usd, bound_usd)
        return bound_usd if usd is None else usd

    def refused(self, number: int, message: str) -> None:
        """Record an error answer, which is not billed."""
        with self._lock:
            self._file.append({"event": "refused", "call": number, "message": message})
            self.spent.refused += 1

    def lost(self, number: int, message: str, bound_usd: float) -> None:
        """Record that no answer came: the call counts at its bound."""
        with self._lock:
            self._close("lost", number, GeminiAnswer("invalid", message=message), None, bound_usd)

    def _close(self, event: str, number: int, answer: GeminiAnswer, usd: float | None, bound_usd: float) -> None:
        tokens = {f"{name}_tokens": count for name, count in vars(answer.tokens).items()}
        told = {"outcome": answer.outcome, "finish_reason": answer.finish_reason, "message": answer.message}
        self._file.append({"event": event, "call": number, **told, "text": answer.text, **tokens, "usd": usd})
        self.spent.add(answer.tokens, usd, bound_usd)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
