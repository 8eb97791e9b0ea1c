"""One engine of each kind over the same models, for tests that say what every engine must do.

A new engine is one more entry of ENGINES: a context manager that is handed the models and yields an engine that was not
started yet. What it runs on (a process, a proxy) belongs into the context manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vlm2vla_server.engines.base import Delta, Engine, GenerationRequest

T = TypeVar("T")
TWIN = Path(__file__).resolve().parents[2] / "models" / "twin"
START_LIMIT_S = 1800.0
LIMIT_S = 240.0


@dataclass(frozen=True)
class Models:
    """A base and three adapters by name: the twin's own, and two with random weights."""

    base: Path
    adapters: tuple[tuple[str, Path], ...]
    control_tokens: frozenset[str] = frozenset({"<start_of_turn>", "<end_of_turn>", "<start_of_image>"})


def write_models(folder: Path) -> Models:
    """The twin's base, with the tensor names that every engine loads, and its adapters."""
    from tiny_models import write_adapter  # here: conftest.py imports this module for every test of the folder

    from vlm2vla_training.servable import write_servable_names

    base = Path(shutil.copytree(TWIN / "base", folder / "base"))
    write_servable_names(base)
    one, two = write_adapter(base, folder / "one", 1), write_adapter(base, folder / "two", 2)
    return Models(base, (("twin", TWIN / "adapter"), ("one", one), ("my.two", two)))


def write_qwen_models(folder: Path) -> Models:
    """The same of another architecture: a random Qwen3-VL and three random adapters, by the same names."""
    from qwen_model import SPECIALS, write_qwen
    from tiny_models import write_adapter

    base = write_qwen(folder / "base")
    written = [(name, write_adapter(base, folder / name, seed)) for seed, name in enumerate(("twin", "one", "my.two"))]
    return Models(base, tuple(written), frozenset(SPECIALS))


@dataclass(frozen=True)
class Subject:
    """A started engine and the event loop that it lives on."""

    engine: Engine
    models: Models
    runner: asyncio.Runner

    def run(self, work: Coroutine[Any, Any, T], limit_s: float = LIMIT_S) -> T:
        """Run a coroutine on the engine's loop, with a deadline."""

        async def bounded() -> T:
            return await asyncio.wait_for(work, limit_s)

        return self.runner.run(bounded())

    async def collect(self, request: GenerationRequest) -> tuple[str, list[Delta]]:
        """The whole text of a generation and its deltas, whose rules are checked: totals grow, only the last ends."""
        deltas = [delta async for delta in self.engine.generate(request)]
        counts = [delta.completion_tokens for delta in deltas]
        assert counts == sorted(counts) and counts[-1] <= request.max_tokens
        assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
        return "".join(delta.text for delta in deltas), deltas

    def text(self, request: GenerationRequest) -> str:
        """The text of a generation."""
        return self.run(self.collect(request))[0]


def _transformers(models: Models) -> AbstractContextManager[Engine]:
    from vlm2vla_server.engines.hf_model import ModelOptions
    from vlm2vla_server.engines.transformers_engine import TransformersEngine

    return contextlib.nullcontext(TransformersEngine(ModelOptions(models.base, models.adapters)))


def _vllm(models: Models) -> AbstractContextManager[Engine]:
    from vlm2vla_server.engines.vllm_engine import VLLMEngine
    from vlm2vla_server.engines.vllm_options import VLLMOptions

    return contextlib.nullcontext(VLLMEngine(VLLMOptions(models.base, models.adapters, threads=2)))


@contextlib.contextmanager
def _openai(models: Models) -> Iterator[Engine]:
    """The openai engine, with our own server as its endpoint."""
    from live_server import live_server

    from vlm2vla_server.engines.openai_engine import OpenAIEngine
    from vlm2vla_server.engines.openai_options import EndpointOptions

    adapters = [part for name, folder in models.adapters for part in ("--adapter", f"{name}={folder}")]
    serve = ["--engine", "transformers", "--model", str(models.base), *adapters, "--allow-unproven"]
    names = tuple((name, name) for name, _ in models.adapters)
    with live_server(serve, models.base.with_name("endpoint.log")) as live:
        yield OpenAIEngine(EndpointOptions(f"{live.url}/v1", adapters=names, model=models.base))


ENGINES: dict[str, Callable[[Models], AbstractContextManager[Engine]]] = {
    "transformers": _transformers,
    "openai": _openai,
    "vllm": _vllm,
}
QWEN = "-qwen"
"""Behind an engine's name: on the models of `write_qwen_models`."""
PARAMETERS = [
    *map(pytest.param, ("transformers", "openai", "transformers-qwen")),
    *(pytest.param(name, marks=pytest.mark.vllm) for name in ("vllm", "vllm-qwen")),
]
"""Names of ENGINES for pytest; vllm runs only where `-m vllm` asks for it (scripts/test, in .venv-vllm)."""


@contextlib.contextmanager
def started(name: str, models: Models) -> Iterator[Subject]:
    """Start an engine on a loop of its own; close both at the end."""
    with ENGINES[name.removesuffix(QWEN)](models) as engine, asyncio.Runner() as runner:
        subject = Subject(engine, models, runner)
        try:
            subject.run(engine.start(), START_LIMIT_S)
            yield subject
        finally:
            subject.run(engine.close())


async def first(stream: AsyncIterator[Delta], count: int) -> list[Delta]:
    """The first deltas of a stream, which stays open."""
    return [await anext(stream) for _ in range(count)]
