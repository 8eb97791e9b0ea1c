"""The vLLM engine: `AsyncLLM` in this process, the model in processes that vLLM starts.

All that we use of vLLM's API is in this file, written against vLLM 0.32 (docs/serve.md says which torch and
transformers go with it); `vllm_cpu` repairs its attention on CPUs. vLLM is imported when the engine starts, on a
thread: that alone takes seconds, and /healthz has to answer meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from vlm2vla_server.engines import vllm_cpu
from vlm2vla_server.engines.adapters import LoadedAdapter, inspect_adapter
from vlm2vla_server.engines.base import (
    AdapterLoad,
    Conversation,
    Delta,
    EngineInfo,
    EngineLoad,
    EngineStartError,
    GenerationError,
    GenerationRequest,
    GrammarRefused,
    PromptTooLong,
    ScoreRequest,
)
from vlm2vla_server.engines.decoding import Detokenizer, control_tokens
from vlm2vla_server.engines.hf_model import folder_hash
from vlm2vla_server.engines.processors import (
    apply_template,
    load_processor,
    picture_options,
    quietly_load,
    reads_images_whole,
    stop_ids,
)
from vlm2vla_server.engines.vllm_options import VLLMOptions, engine_arguments
from vlm2vla_server.errors import ServerError

ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked copy of a process with threads may hang
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output belongs to `vlm2vla-server check`
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the operating system shares the cores of a small machine better
    "HF_HUB_OFFLINE": "1",  # models are folders; nothing is downloaded
}
"""What vLLM reads from its environment, unless the operator has set it."""

_ADAPTER_NUMBERS = itertools.count(1)
"""vLLM knows an adapter by its number alone and loads none whose number it has: none is used twice in a process."""
DEATH_POLL_S = 0.1
TOO_LONG = re.compile(r"maximum (context|model) length")
"""In vLLM's two refusals of a long prompt: of the text alone, and once the images' tokens are in it."""


class VLLMEngine:
    """Engine over vLLM. See `engines.base.Engine` for the contract of each method."""

    def __init__(self, options: VLLMOptions) -> None:
        self._options = options
        self._llm: Any = None  # vllm.v1.engine.async_llm.AsyncLLM
        self._loras: dict[str, Any] = {}
        self._loaded: dict[str, LoadedAdapter] = {}
        self._model_hash = ""
        self._running: dict[str, bool] = {}  # request id -> whether its first token is there
        self._decoded_tokens = 0
        self._apart = _Apart()
        self._closed = False

    async def start(self) -> None:
        """Import vLLM, start its processes, load base and adapters."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        await asyncio.to_thread(self._load)
        from vllm.lora.request import LoRARequest

        for name, folder in self._options.adapters:
            request = LoRARequest(name, next(_ADAPTER_NUMBERS), str(folder.resolve()))
            try:
                added = await self._llm.add_lora(request)
            except Exception as problem:
                raise EngineStartError(f"vLLM cannot load adapter {name!r} from {folder}: {problem}") from problem
            if not added:
                raise EngineStartError(f"vLLM did not load adapter {name!r} from {folder}; its log says why")
            self._loras[name] = request

    def _load(self) -> None:
        model = self._options.model
        self._processor: Any = load_processor(model)
        self._tokenizer: Any = self._processor.tokenizer
        self._stop_ids = stop_ids(_configured_stops(model), self._processor)
        control = control_tokens(self._tokenizer, self._stop_ids)
        self._control_ids, self._control_texts = frozenset(control), frozenset(control.values())
        for number, (name, folder) in enumerate(self._options.adapters):
            self._loaded[name] = inspect_adapter(model, name, f"adapter{number}", folder)
        self._model_hash = folder_hash(model)
        llm = self._start_vllm()
        if self._closed:  # the server was told to stop meanwhile
            llm.shutdown()
            raise EngineStartError("the engine was closed while it started")
        self._llm = llm

    def _start_vllm(self) -> Any:
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        self._on_cpu = self._apart.active = bool(current_platform.is_cpu())
        self._device = "cpu" if self._on_cpu else str(current_platform.get_device_name())
        known = [field.name for field in fields(AsyncEngineArgs)]
        whole = reads_images_whole(self._processor)
        arguments = engine_arguments(self._options, known, on_cpu=self._on_cpu, whole_images=whole)
        if self._on_cpu:
            if not vllm_cpu.is_registered():
                raise EngineStartError(
                    f"vLLM has not loaded this server's plugin {vllm_cpu.PLUGIN} and would misread images on a CPU; "
                    "install vlm2vla-server with pip, and add the name to VLLM_PLUGINS if that is set"
                )
            os.environ["OMP_NUM_THREADS"] = str(self._options.threads)
            if arguments["enforce_eager"]:
                # Else a function of the sampler is compiled at the first score: a minute, and a C++ compiler is needed.
                os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        try:
            arguments["structured_outputs_config"] = StructuredOutputsConfig(**arguments["structured_outputs_config"])
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except Exception as problem:
            raise EngineStartError(f"vLLM cannot start with {self._options.model}: {problem}") from problem

    async def close(self) -> None:
        """Abort everything and end vLLM's processes."""
        self._closed = True
        llm, self._llm = self._llm, None
        if llm is not None:
            for request_id in list(self._running):
                await llm.abort(request_id)
            llm.shutdown()

    async def wait_dead(self) -> str:
        """Wait until vLLM's processes have died, and say so; streams end with GenerationError by themselves."""
        while True:
            if self._llm is not None and self._llm.errored:
                return "vLLM's engine process has died; its log says why"
            await asyncio.sleep(DEATH_POLL_S)

    def _require(self, adapter: str | None) -> tuple[Any, Any]:
        """AsyncLLM and the LoRARequest of an adapter, None for the base. Raises GenerationError."""
        if self._llm is None:
            raise GenerationError("the engine is not started, or is shutting down")
        if adapter is not None and adapter not in self._loras:
            raise GenerationError(f"the engine has no adapter {adapter!r}; it has {', '.join(self._loras) or 'none'}")
        return self._llm, None if adapter is None else self._loras[adapter]

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Stream one generation."""
        llm, lora = self._require(request.adapter)
        started_s = time.monotonic()
        prompt = await asyncio.to_thread(self._prompt, request.images, request.conversation)
        preprocess_ms = (time.monotonic() - started_s) * 1000.0
        text, count, prompt_tokens = Detokenizer(self._tokenizer, self._control_ids), 0, 0
        request_id = uuid.uuid4().hex
        self._running[request_id] = False
        try:
            await self._apart.enter(lora is None)
        except BaseException:
            self._running.pop(request_id, None)
            raise
        outputs = llm.generate(prompt, self._sampling(request), request_id, lora_request=lora)
        try:
            async for output in outputs:
                self._running[request_id] = True
                new = output.outputs[0]
                count += len(new.token_ids)
                self._decoded_tokens += len(new.token_ids)
                prompt_tokens = prompt_tokens or len(output.prompt_token_ids)
                finish = _finish(new.finish_reason)
                pieces = [text.push(token) for token in new.token_ids]
                yield Delta(
                    "".join(pieces) + (text.flush() if finish else ""),
                    finish,
                    prompt_tokens,
                    count,
                    output.num_cached_tokens or 0,
                    _queue_ms(output.metrics),
                    preprocess_ms,
                )
        except Exception as problem:
            raise _translated(problem) from problem
        finally:
            self._running.pop(request_id, None)
            self._apart.leave()
            await outputs.aclose()  # aborts what still runs

    async def score(self, request: ScoreRequest) -> list[float]:
        """Log-probabilities of a completion, which vLLM reads as the end of the prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm, lora = self._require(request.adapter)
        ids = self._tokenizer(request.completion, add_special_tokens=False)["input_ids"] if request.completion else []
        completion = [int(token) for token in [*ids, self._stop_ids[0]]]
        prompt = await asyncio.to_thread(self._prompt, request.images, request.conversation, completion)
        sampling = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        rows: Sequence[Mapping[int, Any]] = ()
        await self._apart.enter(lora is None)
        try:
            async for output in llm.generate(prompt, sampling, uuid.uuid4().hex, lora_request=lora):
                rows = output.prompt_logprobs[-len(completion) :]
        except Exception as problem:
            raise _translated(problem) from problem
        finally:
            self._apart.leave()
        if len(rows) != len(completion):
            raise GenerationError("vLLM gave no log-probabilities; the engine may be shutting down")
        return [float(row[token].logprob) for row, token in zip(rows, completion, strict=True)]

    def _prompt(
        self, images: Sequence[NDArray[np.uint8]], turns: Conversation, completion: Sequence[int] = ()
    ) -> dict[str, Any]:
        """The chat template around images and text, as tokens: vLLM would add a second BOS to a text. vLLM puts the
        tokens of each image in their place. Pan-and-scan is off."""
        rendered = apply_template(self._processor, images, turns, tokenize=False)
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        prompt: dict[str, Any] = {"prompt_token_ids": [*ids, *completion]}
        if images:
            prompt["multi_modal_data"] = {"image": [Image.fromarray(image) for image in images]}
            if options := picture_options(self._processor):
                prompt["mm_processor_kwargs"] = options
        return prompt

    def _sampling(self, request: GenerationRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        grammar = StructuredOutputsParams(grammar=request.grammar) if request.grammar is not None else None
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=request.seed,
            max_tokens=request.max_tokens,
            stop_token_ids=list(self._stop_ids),
            detokenize=False,  # by our Detokenizer, which keeps the reserved tokens of Table 2 as text
            structured_outputs=grammar,
            output_kind=RequestOutputKind.DELTA,
        )

    def info(self) -> EngineInfo:
        """Facts about the loaded model."""
        config, vllm = self._llm.model_config, self._llm.vllm_config
        return EngineInfo(
            name="vllm",
            device=self._device,
            dtype=config.quantization or str(config.dtype).removeprefix("torch."),
            context_tokens=int(config.max_model_len),
            model_hash=self._model_hash,
            adapters=tuple(
                AdapterLoad(name, found.hash, found.adapted_modules, found.problem)
                for name, found in self._loaded.items()
            ),
            versions={
                "vllm": _vllm_version(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "xgrammar": metadata.version("xgrammar"),
            },
            slots=vllm.scheduler_config.max_num_seqs * vllm.parallel_config.data_parallel_size,
        )

    def load(self) -> EngineLoad:
        """Momentary load: requests that have their first token run, the others wait."""
        running = sum(self._running.values())
        return EngineLoad(running, len(self._running) - running, self._decoded_tokens)

    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokenizer's control tokens."""
        return self._control_texts


class _Apart:
    """Keeps generations of the base out of batches with adapters, and the other way round; on CPUs only.

    vLLM 0.32's CPU kernels count "no adapter" as index -1 and so give the base the last adapter's weights when both are
    in one batch (seen: the base answered with an adapter's text). Adapters among themselves are told apart.
    """

    def __init__(self) -> None:
        self.active = False
        self._base = False
        self._inside = 0
        self._free = asyncio.Event()

    async def enter(self, base: bool) -> None:
        """Wait until only generations of this kind run."""
        while self.active and self._inside and self._base != base:
            self._free.clear()
            await self._free.wait()
        self._base = base
        self._inside += 1

    def leave(self) -> None:
        """After each `enter` that returned."""
        self._inside -= 1
        if not self._inside:
            self._free.set()


def _configured_stops(model: Path) -> Any:
    if (model / "generation_config.json").is_file():
        return quietly_load(transformers.GenerationConfig, model).eos_token_id
    return getattr(quietly_load(transformers.AutoConfig, model), "eos_token_id", None)


def _finish(reason: str | None) -> Any:
    """vLLM's finish reason as ours. Raises GenerationError for "abort", which only `close` causes, and "error"."""
    if reason in (None, "stop", "length"):
        return reason
    raise GenerationError("the engine is shutting down" if reason == "abort" else f"vLLM ended with {reason!r}")


def _queue_ms(stats: Any) -> float:
    """Time in vLLM's queue, from its own clock; 0 when it keeps no statistics."""
    if stats is None or not stats.scheduled_ts:
        return 0.0
    return float(max(0.0, stats.scheduled_ts - stats.queued_ts) * 1000.0)


def _translated(problem: Exception) -> ServerError:
    """vLLM's failures as ours."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(problem, ServerError):
        return problem
    if isinstance(problem, EngineDeadError):
        return GenerationError("vLLM's engine process has died; the server must be started anew")
    if TOO_LONG.search(str(problem)):
        return PromptTooLong("images and text do not fit this model's context; /info says how many tokens it holds")
    if "grammar specification" in str(problem):
        return GrammarRefused("the grammar is not EBNF that xgrammar reads, with a rule 'root'")
    return GenerationError("the model failed while generating; see the server's log")


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)
