"""The running server behind the HTTP layer: the engine's start, the models on offer, readiness, /info."""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import time
from importlib import metadata
from pathlib import Path

from vlm2vla_schema.limits import MAX_ROWS
from vlm2vla_schema.messages import PROTOCOL, UNITS, AdapterInfo, InfoResponse, LimitsInfo
from vlm2vla_schema.probes import probe_image
from vlm2vla_schema.prompts import PROMPT_VERSIONS
from vlm2vla_schema.types import MODEL_CARD_FILE, ModelCard, ModelCardError
from vlm2vla_server.adapter_proof import Proof, ProofKind, prove, prove_whole, scope_problem
from vlm2vla_server.admission import Admission, Episodes
from vlm2vla_server.certainty import EVEN
from vlm2vla_server.engines.base import Engine, EngineInfo, GenerationRequest, ScoreUnavailable
from vlm2vla_server.errors import ConfigurationError, EngineFailure, NotReady, ServerError, UnknownModel
from vlm2vla_server.metrics import Metrics
from vlm2vla_server.policy import Policy
from vlm2vla_server.settings import BASE_MODEL_NAME, Settings
from vlm2vla_server.stages import ServedModel, actions_stage, subtasks_stage, verify_stage

log = logging.getLogger("vlm2vla_server")

CUT_TIMEOUT_S = 2.0
"""How long requests that were ended may take to leave."""
ANY_SIZE = 448
"""Side in pixels of the pictures of a model that takes any, without card and adapter: whole patches of 14 and of 16
pixels, merged two by two."""


class ServedAdapterInfo(AdapterInfo):
    """One adapter of /info, with the reason when it is not proven and what was measured, in nat a token.

    proof: "references" when it was compared with the log-probabilities of its card, "difference" when the card has none
    and only a difference from the base could be asked for. The other fields are those of `adapter_proof.Proof`.
    """

    problem: str | None = None
    proof: ProofKind | None = None
    mean_difference_nat: float | None = None
    distance_nat: float | None = None
    base_distance_nat: float | None = None
    tolerance_nat: float | None = None


class ServerInfo(InfoResponse):
    """GET /info, with readiness. merged: the served model itself, when its card holds references (`export`). verifier:
    what answers /verify; verify_threshold: the probability from which its "done" counts.
    """

    adapters: list[ServedAdapterInfo]  # type: ignore[assignment]  # answers are frozen, so a narrower list is safe
    merged: ServedAdapterInfo | None = None
    verifier: str
    verify_threshold: float
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
        self.policy = Policy(engine, self.metrics, log_texts=settings.log_texts)
        self.admission = Admission(settings.max_concurrency, self.metrics)
        self.episodes = Episodes()
        self.ready = False
        self.reason: str | None = "the model is loading"
        self.models: dict[str, ServedModel] = {}
        self._cards: dict[str, ModelCard] = {}
        self._proofs: dict[str, Proof] = {}
        self._engine_info: EngineInfo | None = None
        self._stopping = False
        self._watching: asyncio.Task[None] | None = None
        self.dead = asyncio.Event()
        """Set when the engine can no longer serve; the process should then end, for a supervisor to start it again."""

    async def start(self) -> None:
        """Load, prove, warm up. Never raises: what fails becomes the reason for not being ready."""
        try:
            self._cards = read_cards(self.settings)
            self._watching = asyncio.create_task(self._watch_engine())
            await self.engine.start()
            self._engine_info = self.engine.info()
            self.admission.set_slots(self._engine_info.slots)
            await self._prove_adapters()
            await self._warm_up()
        except asyncio.CancelledError:
            raise
        except (ConfigurationError, ServerError) as problem:
            self._not_ready(str(problem))
            log.error("not ready: %s", problem, exc_info=problem.__cause__)
            return
        except Exception:
            self._not_ready("the engine failed while starting; the server's log says why")
            log.exception("the engine failed while starting")
            return
        self._decide_readiness()

    async def close(self) -> None:
        """Stop serving and free the engine."""
        self._stop()
        if self._watching is not None:
            self._watching.cancel()
        await self.engine.close()

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests, give those at work `limit_s` seconds, then end them: streams get their error event."""
        self._stop()
        if await self._idle_within(limit_s):
            return
        log.warning("requests did not finish within %g s and are ended", limit_s)
        self.cut()
        await self._idle_within(CUT_TIMEOUT_S)

    def cut(self) -> None:
        """End every request at work now."""
        self._stop()
        self.episodes.end_all("shutdown", NotReady("the server is shutting down"))

    async def _idle_within(self, limit_s: float) -> bool:
        until_s = time.monotonic() + limit_s
        while self.episodes.busy and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        return not self.episodes.busy

    def _stop(self) -> None:
        self._stopping = True
        self.ready = False
        if not self.dead.is_set():
            self.reason = "the server is shutting down"
        self.metrics.ready.set(0)

    def _not_ready(self, reason: str) -> None:
        if not self._stopping and not self.dead.is_set():
            self.reason = reason

    async def _watch_engine(self) -> None:
        why = await self.engine.wait_dead()
        if self._stopping:
            return
        self.ready, self.reason = False, f"the engine died: {why}"
        self.metrics.ready.set(0)
        log.critical("%s; ending the process for a supervisor to start it again", self.reason)
        self.dead.set()
        self.episodes.end_all("engine_died", EngineFailure("the engine died; the server's log says how"))

    async def _prove_adapters(self) -> None:
        assert self._engine_info is not None
        loads = {load.name: load for load in self._engine_info.adapters}
        unprovable: str | None = None
        base = self._cards[BASE_MODEL_NAME]
        try:
            self._proofs = await prove(self.engine, {name: self._cards[name] for name, _ in self.settings.adapters})
            whole = await prove_whole(self.engine, BASE_MODEL_NAME, base)
            self._proofs |= {BASE_MODEL_NAME: whole} if whole else {}
        except ScoreUnavailable as missing:
            self._proofs, unprovable = {}, f"what was trained cannot be proven active: {missing}"
        self.models = {}
        for name, folder in self.settings.adapters:
            card, load = self._cards[name], loads.get(name)
            problem = scope_problem(name, folder) or (load.problem if load else None)
            problem = problem or card_problem(card, load.adapted_modules if load else 0, self._engine_info.model_hash)
            problem = problem or unprovable or self._proofs[name].problem
            self.models[name] = ServedModel(name, name, card, proven=problem is None, problem=problem)
        problem = self._whole_problem(base, unprovable)
        self.models[BASE_MODEL_NAME] = ServedModel(BASE_MODEL_NAME, None, base, proven=problem is None, problem=problem)

    def _whole_problem(self, card: ModelCard, unprovable: str | None) -> str | None:
        """Why the served model is not what its card says; None for one that was not trained to act."""
        if not card.policy:
            return None
        problem = card_problem(card, None, "")  # its card names the base that it was made from, and that is not here
        if problem is None and card.reference_logprobs:
            problem = unprovable or self._proofs[BASE_MODEL_NAME].problem
        return problem

    async def _warm_up(self) -> None:
        """Compile every grammar and run one short generation under every model, so that the first caller need not."""
        for model in self.models.values():
            image = probe_image(0, model.card.image_size)
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
        if self._stopping or self.dead.is_set():
            return
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

    @property
    def verifier(self) -> str:
        """What /verify asks when a request names no model."""
        return self.settings.verifier or self.default_model

    def verify_threshold(self, card: ModelCard | None) -> float:
        """The probability from which a model's "done" counts: the setting, else its card's, else one half."""
        of_card = card.verify_threshold if card else None
        return self.settings.verify_threshold or of_card or EVEN

    def label(self, name: str | None, path: str = "") -> str:
        """The name of a request's model for metrics and logs: one of a closed set, whatever the caller sent."""
        default = self.verifier if path == "/verify" else self.default_model
        wanted = default if name is None else name
        return wanted if wanted in self.models else "unknown"

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
            base_hash=(engine.model_hash or None) if engine else None,
            stages=list(default.stages) if default else list(card.stages) if card else [],
            adapters=[
                self._adapter_info(name, hashes.get(name, ""))
                for name, _ in self.settings.adapters
                if name in self._cards
            ],
            merged=self._adapter_info(BASE_MODEL_NAME, engine.model_hash)
            if engine and BASE_MODEL_NAME in self._proofs
            else None,
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
            verifier=self.verifier,
            verify_threshold=self.verify_threshold(self._cards.get(self.verifier)),
            ready=self.ready,
            reason=self.reason,
            device=f"{engine.device} {engine.dtype}" if engine else None,
            context_tokens=(engine.context_tokens or None) if engine else None,
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
            proof=proof.kind if proof else None,
            mean_difference_nat=proof.mean_difference_nat if proof else None,
            distance_nat=proof.distance_nat if proof else None,
            base_distance_nat=proof.base_distance_nat if proof else None,
            tolerance_nat=proof.tolerance_nat if proof else None,
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
        for name, path in settings.adapters:
            cards[name] = ModelCard.read(path)
        has_card = (folder / MODEL_CARD_FILE).is_file()
        any_size = max((card.image_size for card in cards.values()), default=ANY_SIZE)
        base = ModelCard.read(folder) if has_card else _untouched_card(folder, any_size)
    except ModelCardError as problem:
        raise ConfigurationError(str(problem)) from problem
    return {BASE_MODEL_NAME: base, **cards}


def _untouched_card(folder: Path, any_size: int) -> ModelCard:
    """any_size: of the pictures of a model that has no own size."""
    try:
        size = int(json.loads((folder / "config.json").read_text("utf-8"))["vision_config"].get("image_size", any_size))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ConfigurationError(
            f"{folder} has neither a {MODEL_CARD_FILE} nor a config.json with a vision_config"
        ) from problem
    return ModelCard(name=folder.resolve().name, base_model=folder.resolve().name, image_size=size)


def card_problem(card: ModelCard, adapted_modules: int | None, base_hash: str) -> str | None:
    """What keeps this server from doing as an adapter's card says; None when it can. What an engine cannot know
    (adapted_modules None, base_hash "") is not compared."""
    if card.base_hash and base_hash and card.base_hash != base_hash:
        return (
            f"the card of {card.name!r} was written for a base with sha256 {card.base_hash[:12]}..., the loaded base "
            f"has {base_hash[:12]}..."
        )
    for stage, version in card.prompt_versions.items():
        ours = PROMPT_VERSIONS.get(stage)
        if ours is not None and ours != version:
            return f"the card of {card.name!r} asks for prompt {stage} {version!r}; this server has {ours!r}"
    if card.adapted_modules and adapted_modules is not None and card.adapted_modules != adapted_modules:
        return (
            f"the card of {card.name!r} says {card.adapted_modules} adapted modules, the loaded adapter has "
            f"{adapted_modules}"
        )
    return None
