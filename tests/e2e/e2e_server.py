"""The real server in a process of its own, so that a test can kill it; its engine recites texts from a file.

Run as ``python e2e_server.py PORT FOLDER``: ``FOLDER/texts.json`` holds the texts (``subtasks``, ``plans`` by subtask,
``actions`` by plan, ``verdict``) and ``token_s``, the pause between tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import uvicorn
from server_fakes import VERDICT_TEXT, FakeEngine, write_models

from vlm2vla_server.app import create_app
from vlm2vla_server.engines.base import GenerationRequest

STARTS = {
    "Describe the sequence": "subtasks",
    "Given the image": "motion_plan",
    "You are programming": "actions",
    "You are a precision": "verify",
}


class Reciter:
    """Knows its texts by what is asked: the plan of a subtask, the rows of a plan (warm-up asks for others)."""

    def __init__(self, texts: dict[str, Any]) -> None:
        self._subtasks, self._verdict = texts["subtasks"], texts.get("verdict", VERDICT_TEXT)
        self._plans, self._actions = texts["plans"], texts["actions"]

    def __call__(self, request: GenerationRequest) -> str:
        stage = next(name for start, name in STARTS.items() if request.prompt.startswith(start))
        if stage == "subtasks":
            return str(self._subtasks)
        if stage == "verify":
            return str(self._verdict)
        known: dict[str, str] = self._plans if stage == "motion_plan" else self._actions
        return next((text for words, text in known.items() if words in request.prompt), next(iter(known.values())))


def main() -> None:
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    given = json.loads((folder / "texts.json").read_text())
    engine = FakeEngine(answer=Reciter(given["texts"]), piece_chars=4, token_s=given["token_s"])
    app = create_app(write_models(folder), engine)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
