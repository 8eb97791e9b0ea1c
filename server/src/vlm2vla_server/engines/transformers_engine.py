"""The transformers engine: our own decode loop on one worker thread.

`transformers.generate` is not used: it cannot be stopped, seeded and streamed per request, and it takes sampling
defaults from the checkpoint (Gemma: top_k 64). Requests run one after another; the thread checks before every token
whether anybody still listens.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Literal

import peft
import torch
import transformers

from vlm2vla_server.engines.base import (
    AdapterLoad,
    Delta,
    EngineInfo,
    EngineLoad,
    GenerationError,
    GenerationRequest,
    GrammarRefused,
    ScoreRequest,
)
from vlm2vla_server.engines.decoding import Constraint, Detokenizer, GrammarCache, pick_token
from vlm2vla_server.engines.hf_model import HFModel, ModelOptions
from vlm2vla_server.engines.worker import Outlet, Worker
from vlm2vla_server.errors import ServerError


class TransformersEngine:
    """Engine over HFModel. See `engines.base.Engine` for the contract of each method."""

    def __init__(self, options: ModelOptions) -> None:
        self._options = options
        self._worker = Worker("vlm2vla-engine", fatal=device_is_lost)
        self._model: HFModel | None = None
        self._grammars: GrammarCache | None = None
        self._decoded_tokens = 0

    async def start(self) -> None:
        """Load model, tokenizer, processor and adapters on the worker thread."""
        self._worker.start()
        await self._worker.call(self._load)

    def _load(self) -> None:
        model = HFModel(self._options)
        self._grammars = GrammarCache(model.tokenizer, model.logit_width, model.stop_ids)
        self._model = model

    async def close(self) -> None:
        """Abort everything and stop the thread."""
        # A short block at shutdown is harmless, and an executor may already be gone then.
        self._worker.close()

    async def wait_dead(self) -> str:
        """Wait for the end of the worker thread."""
        return await self._worker.wait_dead()

    def _loaded(self) -> HFModel:
        if self._model is None:
            raise GenerationError("the engine was used before it was started")
        return self._model

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Stream one generation."""
        received_s = time.monotonic()

        def work(outlet: Outlet[Delta]) -> None:
            try:
                self._generate(request, outlet, received_s)
            except ServerError:
                raise
            except Exception as problem:
                raise GenerationError("the model failed while generating; see the server's log") from problem

        return self._worker.stream(work)

    def _generate(self, request: GenerationRequest, outlet: Outlet[Delta], received_s: float) -> None:
        started_s = time.monotonic()
        model = self._loaded()
        prompt = model.encode(request.images, request.conversation)
        constraint = self._constraint(request.grammar)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        text = Detokenizer(model.tokenizer, model.control_ids)
        budget = min(request.max_tokens, model.context_tokens - prompt.length)
        preprocess_ms = (time.monotonic() - started_s) * 1000.0
        if outlet.aborted:
            return
        with model.using(request.adapter):
            logits, reading, cached = model.prefill(prompt)
            for count in range(1, budget + 1):
                if outlet.aborted:
                    return
                token = self._choose(logits, request, constraint, generator)
                self._decoded_tokens += 1
                finish = self._finish(token, count, budget)
                delta = text.push(token) + (text.flush() if finish else "")
                outlet.put(
                    Delta(delta, finish, prompt.length, count, cached, (started_s - received_s) * 1000.0, preprocess_ms)
                )
                if finish or outlet.aborted:
                    return
                logits = model.step(token, reading)

    def _constraint(self, grammar: str | None) -> Constraint | None:
        if grammar is None:
            return None
        assert self._grammars is not None
        try:
            return self._grammars.constraint(grammar)
        except RuntimeError as problem:
            raise GrammarRefused("the grammar is not EBNF that xgrammar reads, with a rule 'root'") from problem

    @staticmethod
    def _choose(
        logits: torch.Tensor, request: GenerationRequest, constraint: Constraint | None, generator: torch.Generator
    ) -> int:
        if constraint is None:
            return pick_token(logits, request.temperature, request.top_p, generator)
        allowed = constraint.mask(logits.clone())
        if float(allowed.max()) == float("-inf"):
            raise GrammarRefused("the grammar allows no text that goes on from here")
        token = pick_token(allowed, request.temperature, request.top_p, generator)
        constraint.accept(token)
        return token

    def _finish(self, token: int, count: int, budget: int) -> Literal["stop", "length"] | None:
        if token in self._loaded().stop_ids:
            return "stop"
        return "length" if count >= budget else None

    async def score(self, request: ScoreRequest) -> list[float]:
        """Log-probabilities of a completion."""

        def work() -> list[float]:
            model = self._loaded()
            prompt = model.encode(request.images, request.conversation)
            with model.using(request.adapter):
                return model.log_probabilities(prompt, model.completion_ids(request.completion))

        return await self._worker.call(work)

    def info(self) -> EngineInfo:
        """Facts about the loaded model."""
        model = self._loaded()
        return EngineInfo(
            name="transformers",
            device=model.device,
            dtype=model.dtype_name,
            context_tokens=model.context_tokens,
            model_hash=model.model_hash,
            adapters=tuple(
                AdapterLoad(name, adapter.hash, adapter.adapted_modules, adapter.problem)
                for name, adapter in model.adapters.items()
            ),
            versions={
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "peft": peft.__version__,
                "xgrammar": metadata.version("xgrammar"),
            },
            slots=1,
        )

    def load(self) -> EngineLoad:
        """Momentary load."""
        return EngineLoad(self._worker.running, self._worker.waiting, self._decoded_tokens)

    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokenizer's control tokens."""
        return self._loaded().control_texts


def device_is_lost(problem: BaseException) -> bool:
    """After most errors of a CUDA device its context is gone for the life of the process: every later call fails.
    Running out of memory is not one of them."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    return isinstance(problem, torch.AcceleratorError) and not isinstance(problem, torch.OutOfMemoryError)
