"""A real server process over the scripted engine: `python fake_server.py FOLDER PORT TOKEN_S DRAIN_S`.

Its engine runs one request at a time and dies when the process gets SIGUSR1.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from server_fakes import FakeEngine, answer_by_prompt, write_models

from vlm2vla_server import logs, serving
from vlm2vla_server.app import build_app
from vlm2vla_server.cli import EXIT_ENGINE_DIED, EXIT_OK
from vlm2vla_server.engines.base import Delta, GenerationRequest
from vlm2vla_server.service import Service

ROWS = "[[0.01, 0.0, 0.0, 1.0]" + ", [0.01, 0.0, 0.0, 1.0]" * 30 + "]"


@dataclasses.dataclass
class MortalEngine(FakeEngine):
    """Writes 31 rows, `slow_s` a token once the server is ready."""

    slow_s: float = 0.0
    service: Service | None = None

    async def start(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.death.put_nowait, "SIGUSR1")

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        self.token_s = self.slow_s if self.service is not None and self.service.ready else 0.0
        return super().generate(request)


def rows(request: GenerationRequest) -> str:
    return ROWS if request.prompt.startswith("You are programming") else answer_by_prompt(request)


def main(folder: str, port: str, token_s: str, drain_s: str) -> int:
    logs.setup("json")
    settings = write_models(Path(folder))
    settings = dataclasses.replace(settings, port=int(port), drain_s=float(drain_s), body_timeout_s=2.0)
    engine = MortalEngine(answer=rows, slots=1, slow_s=float(token_s))
    service = engine.service = Service(settings, engine)
    logging.getLogger("vlm2vla_server").info("a scripted engine serves")
    serving.run(build_app(service), service)
    return EXIT_ENGINE_DIED if service.dead.is_set() else EXIT_OK


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
