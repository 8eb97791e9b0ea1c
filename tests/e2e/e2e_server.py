"""The real server in a process of its own, so that a test can kill it; its engine recites texts from a file.

Run as ``python e2e_server.py PORT FOLDER``: ``FOLDER/texts.json`` holds the texts (``subtasks``, ``plans`` by subtask,
``actions`` by plan, a list of them given out one an answer, ``verdict``) and ``token_s``, the pause between tokens.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn

from vlm2vla_schema.types import ModelCard
from vlm2vla_server.app import create_app
from vlm2vla_server.engines.base import (
    AdapterLoad,
    Delta,
    EngineInfo,
    EngineLoad,
    GenerationRequest,
    ScoreRequest,
)
from vlm2vla_server.settings import Settings

VERDICT = '{"success": true, "confidence": "High", "reasoning": "It is done."}'
PIECE_CHARS = 4
STARTS = {
    "Describe the sequence": "subtasks",
    "Given the image": "motion_plan",
    "You are programming": "actions",
    "You are a precision": "verify",
}


class Reciter:
    """Knows its texts by what is asked: the plan of a subtask, the rows of a plan (warm-up asks for others)."""

    def __init__(self, texts: dict[str, Any]) -> None:
        self._subtasks, self._verdict = texts["subtasks"], texts.get("verdict", VERDICT)
        self._plans, self._actions = texts["plans"], texts["actions"]

    def __call__(self, request: GenerationRequest) -> str:
        stage = next(name for start, name in STARTS.items() if request.prompt.startswith(start))
        if stage == "subtasks":
            return str(self._subtasks)
        if stage == "verify":
            return str(self._verdict)
        known: dict[str, str | list[str]] = self._plans if stage == "motion_plan" else self._actions
        text = next((text for words, text in known.items() if words in request.prompt), next(iter(known.values())))
        if isinstance(text, str):
            return text
        return text.pop(0) if len(text) > 1 else text[0]


class RecitingEngine:
    """An Engine that needs no model: four characters a token, with a pause before each."""

    def __init__(self, reciter: Reciter, token_s: float) -> None:
        self._reciter, self._token_s = reciter, token_s
        self._tokens = 0

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def close(self) -> None:
        await asyncio.sleep(0)

    async def wait_dead(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        text = self._reciter(request)
        starts = range(0, len(text), PIECE_CHARS)
        for count, start in enumerate(starts, start=1):
            await asyncio.sleep(self._token_s)
            self._tokens += 1
            yield Delta(text[start : start + PIECE_CHARS], "stop" if count == len(starts) else None, 100, count)

    async def score(self, request: ScoreRequest) -> list[float]:
        await asyncio.sleep(0)
        return [-1.0, -2.0] if request.adapter is None else [-1.5, -2.0]

    def info(self) -> EngineInfo:
        return EngineInfo("recital", "cpu", "float32", 4096, "cd" * 32, (AdapterLoad("twin", "ab" * 32, 42),))

    def load(self) -> EngineLoad:
        return EngineLoad(0, 0, self._tokens)

    def control_tokens(self) -> frozenset[str]:
        return frozenset({"<end_of_turn>", "<start_of_image>"})


def settings(folder: Path) -> Settings:
    """A base and an adapter of which only the cards exist."""
    base, adapter = folder / "base", folder / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True, exist_ok=True)
    ModelCard(name="tiny", base_model="tiny", image_size=28).write(base)
    stages: Any = ["subtasks", "motion_plan", "actions"]
    ModelCard(name="twin", base_model="tiny", image_size=28, stages=stages, policy=True).write(adapter)
    return Settings(engine="transformers", model=base, adapters=(("twin", adapter),))


def main() -> None:
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    given = json.loads((folder / "texts.json").read_text())
    engine = RecitingEngine(Reciter(given["texts"]), given["token_s"])
    uvicorn.run(create_app(settings(folder), engine), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
