"""Gemini as an annotator, on a real socket: reads the log it is sent, answers well or badly as its plan says, and keeps
the books of what it would bill.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gemini_server import GeminiServer, Reply, Request, content, error, gemini_server, hang_up, response
from numpy.typing import NDArray

_ROW = re.compile(r"^(\d+): \[(.+)\]$", re.M)
_NAMES = (("forward", "backward"), ("left", "right"), ("up", "down"))

# Of every fault the first answer is bad; "-twice" means that the repaired one is bad too.
FAULTS = (
    "good", "429", "500", "json", "json-twice", "cut", "cut-twice", "place", "place-twice", "refused", "stopped",
    "stopped-twice", "words", "words-twice", "good", "late-429", "good", "good", "good", "good",
)  # fmt: skip
REFUSED_FOR_GOOD = {"json-twice", "cut-twice", "place-twice", "refused", "stopped-twice", "words-twice"}


@dataclass(frozen=True)
class Log:
    """What a request told of its episode."""

    instruction: str
    first: int
    rows: NDArray[np.float64]
    copies: bool
    repair: bool


def read_log(request: Request) -> Log:
    turns = request.body["contents"]
    prompt = next(part["text"] for part in turns[0]["parts"] if "trajectory_log_content" in part.get("text", ""))
    found = _ROW.findall(prompt)
    rows = np.array([[float(value) for value in text.split(",")] for _, text in found])
    instruction = re.search(r"^.*Instruction: (.*)$", prompt, re.M)
    assert instruction is not None
    return Log(instruction[1], int(found[0][0]), rows, "Store these actions" in prompt, len(turns) > 1)


def annotation(log: Log) -> list[dict[str, Any]]:
    """A right annotation: up to the closing, the closing, what follows."""
    close = int(np.argmin(log.rows[:, 3]))
    end_of_log = len(log.rows)
    parts = [("Move to Carrot", 0, close), ("Grasp Carrot", close, close + 1), ("Lift Carrot", close + 1, end_of_log)]
    steps: list[dict[str, Any]] = []
    for name, begin, end in parts:
        moved = log.rows[begin:end, :3].sum(axis=0)
        far = [(value, pair) for value, pair in zip(moved, _NAMES, strict=True) if abs(value) > 0.025]
        words = [pair[0] if value > 0 else pair[1] for value, pair in far]
        gripper = "Close the gripper." if name.startswith("Grasp") else "The gripper stays as it is."
        step: dict[str, Any] = {"step_description": name, "reasoning": "It must."}
        step["main_movements"] = f"{', '.join(words)}. {gripper}"
        if log.copies:
            step["actions"] = log.rows[begin:end].tolist()
        else:
            step |= {"first": log.first + begin, "last": log.first + end - 1}
        steps.append(step)
    return steps


def misplaced(log: Log) -> list[dict[str, Any]]:
    """Ranges that overlap, or copies of rows that the log does not hold."""
    steps = annotation(log)
    if log.copies:
        steps[1]["actions"] = [[0.031, 0.032, 0.033, 0.0]]
        steps[2]["actions"][0][0] += 0.011
    else:
        steps[1]["first"] -= 1
    return steps


def mirrored(log: Log) -> list[dict[str, Any]]:
    steps = annotation(log)
    steps[0]["main_movements"] = steps[0]["main_movements"].replace("left", "right")
    return steps


@dataclass
class Books:
    """`billed`: (prompt, output, thought) tokens of every answer that was made, by serial number, which is also the
    prompt's count less 1000. `asked`: (instruction, repair) of every request. `kill_at`: numbers of requests at which
    `victim` gets `signal` before they are answered.
    """

    faults: Callable[[str], str]
    kill_at: list[int] = field(default_factory=list)
    victim: int | None = None
    signal: signal.Signals = signal.SIGKILL
    billed: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    asked: list[tuple[str, bool]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def choose(self, request: Request) -> Reply:
        log = read_log(request)
        with self.lock:
            before = self.asked.count((log.instruction, log.repair))
            self.asked.append((log.instruction, log.repair))
            if self.victim is not None and self.kill_at and len(self.asked) >= self.kill_at[0]:
                self.kill_at.pop(0)
                os.kill(self.victim, self.signal)
                self.victim = None
        return self._answer(log, before)

    def _answer(self, log: Log, before: int) -> Reply:
        fault, _, twice = self.faults(log.instruction).partition("-")
        if fault == "late":
            fault = "429" if log.repair else "json"
        if fault == "429" and before == 0:
            return error(429, "RESOURCE_EXHAUSTED", retry_delay="0.01s")
        if fault == "500" and before == 0:
            return error(500, "INTERNAL")
        if fault == "lost" and before == 0:
            return hang_up
        if fault == "key":
            return error(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.")
        if fault == "unknown":
            return error(404, "NOT_FOUND", "no such model")
        if fault == "tomorrow":
            return error(429, "RESOURCE_EXHAUSTED", "quota of the day", retry_delay="40000s")
        if fault == "busy":
            return error(503, "UNAVAILABLE")
        bad = fault if twice or not log.repair else "good"
        return self._written(log, bad)

    def _written(self, log: Log, fault: str) -> Reply:
        with self.lock:
            serial = len(self.billed)
            tokens = self.billed[serial] = (1000 + serial, 200 + serial % 7, 50)
        text = json.dumps(annotation(log))
        if fault == "refused":
            return response(tokens=tokens, promptFeedback={"blockReason": "SAFETY"})
        if fault == "json":
            return content(text[:-9], tokens=tokens)
        if fault == "cut":
            return content(text[: len(text) // 2], finish="MAX_TOKENS", tokens=tokens)
        if fault == "stopped":
            return content("", finish="RECITATION", tokens=tokens)
        wrong = {"place": misplaced, "words": mirrored}.get(fault, annotation)(log)
        return content(json.dumps(wrong), tokens=tokens, thought="Let me see.")


def planned(names: Sequence[str]) -> Callable[[str], str]:
    """The fault of an instruction that ends in a number."""
    return lambda instruction: names[int(instruction.split()[-1]) % len(names)]


@contextmanager
def annotation_server(
    names: Sequence[str] = ("good",), kill_at: Sequence[int] = ()
) -> Iterator[tuple[GeminiServer, Books]]:
    books = Books(planned(names), list(kill_at))
    with gemini_server(chooser=books.choose) as server:
        yield server, books
