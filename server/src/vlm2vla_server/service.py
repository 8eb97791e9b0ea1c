"""The running server behind the HTTP layer: the engine's start, the models on offer, readiness, /info."""

from __future__ import annotations

import asyncio
import json
import logging
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from vlm2vla_schema.limits import MAX_ROWS
from vlm2vla_schema.messages import PROTOCOL, UNITS, AdapterInfo, InfoResponse, LimitsInfo
from vlm2vla_schema.prompts import PROMPT_VERSIONS
from vlm2vla_schema.types import MODEL_CARD_FILE, ModelCard, ModelCardError
from vlm2vla_server.adapter_proof import Proof, proof_image, prove
from vlm2vla_server.admission import Admission, Episodes
from vlm2vla_server.engines.base import Engine, EngineInfo, GenerationRequest
from vlm2vla_server.errors import ConfigurationError, NotReady, ServerError, UnknownModel
from vlm2vla_server.metrics import Metrics
from vlm2vla_server.policy import Policy
from vlm2vla_server.settings import BASE_MODEL_NAME, Settings
from vlm2vla_server.stages import ServedModel, actions_stage, subtasks_stage, verify_stage

log = logging.getLogger("vlm2vla_server")

RESIZING_THREADS = 4


class ServedAdapterInfo(AdapterInfo):
    """One adapter of /info, with the reason when it is not proven and the difference that was measured."""

    problem: str | None = None
    mean_difference_nat: float | None = None


class ServerInfo(InfoResponse):
    """GET /info, with readiness."""

    adapters: list[ServedAdapterInfo]  # type: ignore[assignment]  # answers are frozen, so a narrower list is safe
    ready: bool
    reason: str | None = None
    device: str | None = None
    context_tokens: int | None = None


class Service:
    """State of one server. Made once by `app.create_app`; used on the event loop only."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = Metrics()
        self.policy = Policy(engine, self.metrics)
        self.admission = Admission(settings.max_concurrency, self.metrics)
        self.episodes = Episodes()
        self.resizing = ThreadPoolExecutor(RESIZING_THREADS, "vlm2vla-resize")  # starts threads when first used
        self.ready = False
        self.reason: str | None = "the model is loading"
        self.models: dict[str, ServedModel] = {}
        self._cards: dict[str, ModelCard] = {}
        self._proofs: dict[str, Proof] = {}
        self._engine_info: EngineInfo | None = None

    async def start(self) -> None:
        """Load, prove, warm up. Never raises: what fails becomes the reason for not being ready."""
        try:
            self._cards = read_cards(self.settings)
            await self.engine.start()
            self._engine_info = self.engine.info()
            await self._prove_adapters()
            await self._warm_up()
        except asyncio.CancelledError:
            raise
        except (ConfigurationError, ServerError) as problem:
            self.reason = str(problem)
            log.error("not ready: %s", problem, exc_info=problem.__cause__)
            return
        except Exception:
            self.reason = "the engine failed while starting; the server's log says why"
            log.exception("the engine failed while starting")
            return
        self._decide_readiness()

    async def close(self) -> None:
        """Stop serving and free the engine."""
        self.ready = False
        self.reason = "the server is shutting down"
        self.metrics.ready.set(0)
        await self.engine.close()
        self.resizing.shutdown(wait=False, cancel_futures=True)

    async def _prove_adapters(self) -> None:
        assert self._engine_info is not None
        loads = {load.name: load for load in self._engine_info.adapters}
        names = [name for name, _ in self.settings.adapters]
        size = self._cards[names[0] if names else BASE_MODEL_NAME].image_size
        self._proofs = await prove(self.engine, names, size) if names else {}
        base = ServedModel(BASE_MODEL_NAME, None, self._cards[BASE_MODEL_NAME])
        self.models = {}
        for name in names:
            card, load = self._cards[name], loads.get(name)
            problem = card_problem(card, load.adapted_modules if load else 0, self._engine_info.model_hash)
            problem = (load.problem if load else None) or problem or self._proofs[name].problem
            self.models[name] = ServedModel(name, name, card, proven=problem is None, problem=problem)
        self.models[BASE_MODEL_NAME] = base

    async def _warm_up(self) -> None:
        """Compile every grammar and run one short generation under every model, so that the first caller need not."""
        for model in self.models.values():
            image = proof_image(0, model.card.image_size)
            stages = (
                subtasks_stage("warm up"),
                actions_stage("warm up", None, model.card, self.settings.max_row_translation_m),
                verify_stage("warm up", None),
            )
            for stage in stages:
                request = GenerationRequest((image,), stage.prompt, model.adapter, 1.0, 0.95, 0, 2, stage.grammar)
                async for _ in self.engine.generate(request):
                    pass

    def _decide_readiness(self) -> None:
        problems = [model.problem for model in self.models.values() if model.problem is not None]
        if problems and not self.settings.allow_unproven:
            self.reason = "; ".join(problems) + " (--allow-unproven serves it all the same, with policy false)"
            log.error("not ready: %s", self.reason)
            return
        for problem in problems:
            log.warning("serving unproven: %s", problem)
        self.ready, self.reason = True, "; ".join(problems) or None
        self.metrics.ready.set(1)
        log.info("ready: models %s", ", ".join(self.models))

    def require_ready(self) -> None:
        """Raises NotReady with the reason."""
        if not self.ready:
            raise NotReady(f"not ready: {self.reason}", details={"reason": self.reason})

    @property
    def default_model(self) -> str:
        """What a request without `model` asks: the first adapter, or the base when there is none."""
        return self.settings.adapters[0][0] if self.settings.adapters else BASE_MODEL_NAME

    def resolve(self, name: str | None) -> ServedModel:
        """The model a request names. Raises UnknownModel."""
        model = self.models.get(self.default_model if name is None else name)
        if model is None:
            raise UnknownModel(
                f"this server has no such model; it has: {', '.join(self.models)}",
                details={"models": list(self.models)},
            )
        return model

    def info(self) -> ServerInfo:
        """The answer of /info; before the model is loaded, what the settings and cards say."""
        engine, card = self._engine_info, self._cards.get(self.default_model)
        default = self.models.get(self.default_model)
        hashes = {load.name: load.hash for load in engine.adapters} if engine else {}
        return ServerInfo(
            protocol=PROTOCOL,
            model=self.default_model,
            policy=bool(self.ready and default and default.policy),
            base_model=self._cards[BASE_MODEL_NAME].name if BASE_MODEL_NAME in self._cards else None,
            base_hash=engine.model_hash if engine else None,
            stages=list(default.stages) if default else list(card.stages) if card else [],
            adapters=[
                self._adapter_info(name, hashes.get(name, ""))
                for name, _ in self.settings.adapters
                if name in self._cards
            ],
            prompt_versions=dict(PROMPT_VERSIONS),
            limits=LimitsInfo(
                max_row_translation_m=self.settings.max_row_translation_m,
                max_rows=MAX_ROWS,
                max_body_mb=float(self.settings.max_body_mb),
                max_concurrency=self.settings.max_concurrency,
            ),
            units=dict(UNITS),
            image_size=card.image_size if card else 0,
            engine=self.settings.engine,
            versions={**_versions(), **(engine.versions if engine else {})},
            ready=self.ready,
            reason=self.reason,
            device=f"{engine.device} {engine.dtype}" if engine else None,
            context_tokens=engine.context_tokens if engine else None,
        )

    def _adapter_info(self, name: str, digest: str) -> ServedAdapterInfo:
        model, proof = self.models.get(name), self._proofs.get(name)
        return ServedAdapterInfo(
            name=name,
            hash=digest,
            policy=bool(self.ready and model and model.policy),
            proven=bool(model and model.proven),
            card=self._cards[name],
            problem=model.problem if model else None,
            mean_difference_nat=proof.mean_difference_nat if proof else None,
        )


def _versions() -> dict[str, str]:
    return {"vlm2vla_server": metadata.version("vlm2vla-server"), "python": platform.python_version()}


def read_cards(settings: Settings) -> dict[str, ModelCard]:
    """The cards of base and adapters. A base straight from its maker has none: one is made from its configuration.

    Raises ConfigurationError.
    """
    folder = settings.require_model()
    cards: dict[str, ModelCard] = {}
    try:
        has_card = (folder / MODEL_CARD_FILE).is_file()
        cards[BASE_MODEL_NAME] = ModelCard.read(folder) if has_card else _untouched_card(folder)
        for name, path in settings.adapters:
            cards[name] = ModelCard.read(path)
    except ModelCardError as problem:
        raise ConfigurationError(str(problem)) from problem
    return cards


def _untouched_card(folder: Path) -> ModelCard:
    try:
        size = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vision_config"]["image_size"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ConfigurationError(
            f"{folder} has neither a {MODEL_CARD_FILE} nor a config.json with vision_config.image_size"
        ) from problem
    return ModelCard(name=folder.resolve().name, base_model=folder.resolve().name, image_size=size)


def card_problem(card: ModelCard, adapted_modules: int, base_hash: str) -> str | None:
    """What keeps this server from doing as an adapter's card says; None when it can."""
    if card.base_hash and card.base_hash != base_hash:
        return (
            f"the card of {card.name!r} was written for a base with sha256 {card.base_hash[:12]}..., the loaded base "
            f"has {base_hash[:12]}..."
        )
    for stage, version in card.prompt_versions.items():
        ours = PROMPT_VERSIONS.get(stage)
        if ours is not None and ours != version:
            return f"the card of {card.name!r} asks for prompt {stage} {version!r}; this server has {ours!r}"
    if card.adapted_modules and card.adapted_modules != adapted_modules:
        return (
            f"the card of {card.name!r} says {card.adapted_modules} adapted modules, the loaded adapter has "
            f"{adapted_modules}"
        )
    return None
