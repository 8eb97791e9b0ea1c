"""calls.jsonl: every request to Gemini and what came of it, on disk before anything is made of it.

A run that was killed asks nothing again that it has paid for: answers are found by what was asked. A request whose
answer never came down is counted at the most that it can have cost, because Google may bill it all the same. Requests
in a job of Batch mode stay open until the job has ended, over as many runs as that takes.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class Job:
    """One job of Batch mode: `batch` is our name for it, set before it is submitted, `name` Google's, None until it is
    known that the job was created. `file` holds the requests at Google's. `calls`: what was asked and has not ended.
    """

    batch: str
    name: str | None = None
    file: str | None = None
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)


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
        self.jobs: dict[str, Job] = {}
        self._answers: dict[tuple[str, int], GeminiAnswer] = {}
        path = folder / CALLS_FILE
        self._next = self._read(path, finished) if path.exists() else 0
        self._file = JsonlAppender(path, durable=True)

    def _read(self, path: Path, finished: Container[str]) -> int:
        open_calls: dict[int, dict[str, Any]] = {}
        following = 0
        names: dict[str, tuple[str, str]] = {}
        for line in read_jsonl(path):
            if line["event"] == "job":
                names[line["batch"]] = (line["name"], line["file"])
                continue
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
        for number, asked in open_calls.items():
            if "batch" in asked:
                batch = asked["batch"]
                self.jobs.setdefault(batch, Job(batch, *names.get(batch, (None, None)))).calls[number] = asked
            else:
                self.spent.add(Tokens(), None, asked["bound_usd"])
        return following

    def recorded(self, content: str, turn: int) -> GeminiAnswer | None:
        """Return the answer that an earlier run got for this content, or None."""
        return self._answers.get((content, turn))

    def waiting(self) -> dict[tuple[str, int], str]:
        """Return what jobs of Batch mode have been asked and have not answered: (content, round) -> episode."""
        calls = (asked for job in self.jobs.values() for asked in job.calls.values())
        return {(asked["content"], asked["round"]): asked["episode_key"] for asked in calls}

    def waiting_usd(self) -> float:
        """Return the most that the open jobs can cost."""
        return sum(float(asked["bound_usd"]) for job in self.jobs.values() for asked in job.calls.values())

    def asked(
        self, episode_key: str, content: str, turn: int, model: str, bound_usd: float, batch: str | None = None
    ) -> int:
        """Record a request that is about to leave, in the job `batch` when one is named; return its number."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            line = {
                "event": "asked", "call": number, "episode_key": episode_key, "content": content, "round": turn,
                "model": model, "bound_usd": bound_usd,
            }  # fmt: skip
            if batch is not None:
                line["batch"] = batch
                self.jobs.setdefault(batch, Job(batch)).calls[number] = line
            self._file.append(line)
            return number

    def named(self, job: Job, name: str, file: str) -> None:
        """Record that Google has created the job."""
        with self._lock:
            self._file.append({"event": "job", "batch": job.batch, "name": name, "file": file})
            job.name, job.file = name, file

    def answered(self, number: int, answer: GeminiAnswer, bound_usd: float) -> float:
        """Record an answer; return what it cost in dollars, its bound when Google counted nothing."""
        usd = cost_usd(answer.tokens, self._price)
        with self._lock:
            self._remember(number, answer)
            self._close("answered", number, answer, usd, bound_usd)
        return bound_usd if usd is None else usd

    def refused(self, number: int, message: str) -> None:
        """Record an error answer, which is not billed."""
        with self._lock:
            self._file.append({"event": "refused", "call": number, "message": message})
            self.spent.refused += 1
            self._ended(number)

    def lost(self, number: int, message: str, bound_usd: float) -> None:
        """Record that no answer came: the call counts at its bound."""
        with self._lock:
            self._close("lost", number, GeminiAnswer("invalid", message=message), None, bound_usd)

    def _close(self, event: str, number: int, answer: GeminiAnswer, usd: float | None, bound_usd: float) -> None:
        tokens = {f"{name}_tokens": count for name, count in vars(answer.tokens).items()}
        told = {"outcome": answer.outcome, "finish_reason": answer.finish_reason, "message": answer.message}
        self._file.append({"event": event, "call": number, **told, "text": answer.text, **tokens, "usd": usd})
        self.spent.add(answer.tokens, usd, bound_usd)
        self._ended(number)

    def _remember(self, number: int, answer: GeminiAnswer) -> None:
        """Whoever waited for a job asks the journal for the answer."""
        for job in self.jobs.values():
            if (asked := job.calls.get(number)) is not None:
                self._answers[asked["content"], asked["round"]] = answer

    def _ended(self, number: int) -> None:
        for job in [job for job in self.jobs.values() if number in job.calls]:
            del job.calls[number]
            if not job.calls:
                del self.jobs[job.batch]

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
