"""The engines that the adapter proof is tried on, each with a base and complete adapters for it.

vLLM is the one that the engine contract runs on: it is started once, and each try loads its own adapters into it.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from engine_contract import Subject
from PIL import Image
from server_fakes import run
from tiny_models import IMAGE_SIZE, write_adapter, write_base, write_proven_adapter

from vlm2vla_schema.images import to_base64
from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image
from vlm2vla_schema.types import ModelCard, ReferenceLogprobs
from vlm2vla_server.engines.base import Engine, ScoreRequest
from vlm2vla_server.engines.hf_model import ModelOptions, folder_hash
from vlm2vla_server.engines.transformers_engine import TransformersEngine
from vlm2vla_server.engines.vllm_engine import VLLMEngine
from vlm2vla_server.engines.vllm_options import VLLMOptions
from vlm2vla_server.service import ServerInfo, Service
from vlm2vla_server.settings import Settings

LIMIT_S = 240.0
COMPLETION, END_OF_TURN = "[[0.012, -0.004, -0.03, 1.0]]", "<end_of_turn>"


@dataclass(frozen=True)
class Proving:
    """One kind of engine. base: what it serves. write(base, folder, seed): an adapter whose card is complete."""

    base: Path
    make: Callable[[Settings], Engine]
    write: Callable[[Path, Path, int], Path]
    run: Callable[[Coroutine[Any, Any, ServerInfo], float], ServerInfo]

    def started(self, adapters: dict[str, Path], *, unproven: bool = False) -> ServerInfo:
        """/info of a server with these adapters, after its start."""
        settings = Settings(
            engine="transformers", model=self.base, adapters=tuple(adapters.items()), allow_unproven=unproven
        )

        async def work() -> ServerInfo:
            service = Service(settings, self.make(settings))
            try:
                await service.start()
                return service.info()
            finally:
                await service.close()

        return self.run(work(), LIMIT_S)

    def refused(self, adapter: Path) -> str:
        """Start with the adapter; the reason for not being ready."""
        info = self.started({"twin": adapter})
        assert not info.ready and not info.policy and info.reason
        assert not any(one.policy or one.proven for one in info.adapters)
        return info.reason


def on_transformers(folder: Path) -> Proving:
    """References are those of `export`, the program that writes them for users."""
    return Proving(
        base=write_base(folder / "base"),
        make=lambda settings: TransformersEngine(ModelOptions(settings.require_model(), settings.adapters)),
        write=write_proven_adapter,
        run=run,
    )


def on_vllm(subject: Subject) -> Proving:
    """References are measured by the transformers engine: .venv-vllm has not all that `export` needs."""
    return Proving(
        base=subject.models.base,
        make=lambda settings: BorrowedVLLM(VLLMOptions(settings.require_model(), settings.adapters), subject.engine),
        write=_write_measured_adapter,
        run=subject.run,
    )


class BorrowedVLLM(VLLMEngine):
    """The vLLM engine on the running vLLM of another one, which stays alive: starting it takes most of a minute."""

    def __init__(self, options: VLLMOptions, owner: Any) -> None:
        super().__init__(options)
        self._owner = owner

    def _start_vllm(self) -> Any:
        self._apart, self._device = self._owner._apart, self._owner._device
        return self._owner._llm

    async def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            for lora in self._loras.values():
                await llm.remove_lora(lora.lora_int_id)


def _write_measured_adapter(base: Path, folder: Path, seed: int) -> Path:
    write_adapter(base, folder, seed)
    facts = {"base_hash": folder_hash(base), "reference_logprobs": asyncio.run(measured_references(base, folder))}
    ModelCard.read(folder).model_copy(update=facts).write(folder)
    return folder


async def measured_references(
    model: Path, adapter: Path | None, base: Path | None = None
) -> list[ReferenceLogprobs]:
    """References of an adapter on `model`, or of a whole model, then with those of its `base`."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    ids = [*tokenizer(COMPLETION, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    ours = await _scores(model, adapter)
    untouched = await _scores(base, None) if base is not None else [[]] * len(ours)
    found = []
    for index, prompt in enumerate(PROBE_PROMPTS):
        png = io.BytesIO()
        Image.fromarray(probe_image(index, IMAGE_SIZE)).save(png, "PNG")
        found.append(
            ReferenceLogprobs(
                prompt=prompt,
                image=to_base64(png.getvalue()),
                completion=COMPLETION,
                token_ids=ids,
                logprobs=ours[index],
                base_logprobs=untouched[index],
            )
        )
    return found


async def _scores(model: Path, adapter: Path | None) -> list[list[float]]:
    adapters = () if adapter is None else (("measured", adapter),)
    engine = TransformersEngine(ModelOptions(model, adapters))
    await engine.start()
    try:
        return [
            await engine.score(
                ScoreRequest((probe_image(index, IMAGE_SIZE),), prompt, COMPLETION, "measured" if adapter else None)
            )
            for index, prompt in enumerate(PROBE_PROMPTS)
        ]
    finally:
        await engine.close()
