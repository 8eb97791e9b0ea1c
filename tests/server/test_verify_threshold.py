"""/verify asks the model that is set for it, and takes its "done" only from the probability that is set."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from server_fakes import GOOD, FakeEngine, run, serving, with_settings, write_models

from vlm2vla_schema import prompts
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.probes import probe_image
from vlm2vla_schema.types import ModelCard
from vlm2vla_server.app import create_app
from vlm2vla_server.certainty import probability_done
from vlm2vla_server.engines.base import ScoreRequest, ScoreUnavailable
from vlm2vla_server.engines.hf_model import ModelOptions
from vlm2vla_server.engines.transformers_engine import TransformersEngine
from vlm2vla_server.errors import DeadlineExceeded
from vlm2vla_server.settings import Settings, build

TWIN = Path(__file__).parents[2] / "models" / "twin"
NOT_DONE = '{"success": false, "confidence": "High", "reasoning": "It lies there."}'


@dataclass
class SureEngine(FakeEngine):
    """Says "done" with this probability; the two openings share a token, and end with the end of turn."""

    probability: float = 0.8
    scored: list[ScoreRequest] = field(default_factory=list)
    broken: Exception | None = None
    score_s: float = 0.0

    async def score(self, request: ScoreRequest) -> list[float]:
        if not request.prompt.startswith("You are a precision"):
            return await super().score(request)
        self.scored.append(request)
        await asyncio.sleep(self.score_s)
        if self.broken is not None:
            raise self.broken
        p = self.probability if request.completion.endswith("true") else 1 - self.probability
        return [-0.3, math.log(p), -7.0 if "true" in request.completion else -1.0]


def asked(settings: Settings, engine: SureEngine, **changes: object) -> tuple[int, dict[str, object]]:
    async def work() -> tuple[int, dict[str, object]]:
        async with serving(create_app(settings, engine)) as caller:
            answer = await caller.post("/verify", {**GOOD["/verify"], **changes})
            return answer.status, answer.json()

    return run(work())


@pytest.mark.parametrize(
    ("card", "setting", "success"),
    [(0.9, None, False), (0.7, None, True), (None, 0.9, False), (0.9, 0.7, True), (0.7, 0.9, False)],
)
def test_done_counts_from_the_threshold_of_the_setting_or_else_of_the_card(
    tmp_path: Path, card: float | None, setting: float | None, success: bool
) -> None:
    settings = with_settings(write_models(tmp_path, verify_threshold=card), verify_threshold=setting)
    engine = SureEngine()
    status, body = asked(settings, engine)
    assert (status, body["success"]) == (200, success) and body["probability"] == pytest.approx(0.8)
    assert '"success": true' in str(body["raw_text"]), "what the model said stays readable"
    assert ("Not sure enough (0.80, asked for 0.90): " in str(body["reasoning"])) != success, "no word for the other"
    assert body["confidence"] == ("High" if success else "Low")
    assert [one.completion for one in engine.scored] == ['{"success": true', '{"success": false']
    assert {one.prompt for one in engine.scored} == {prompts.verify_prompt("Grasp Carrot", "Lift Carrot")}
    assert {len(one.images) for one in engine.scored} == {2} and {one.adapter for one in engine.scored} == {"twin"}


@pytest.mark.parametrize(("threshold", "text"), [(None, None), (0.5, None), (0.9, NOT_DONE)])
def test_nothing_is_measured_without_a_threshold_or_of_a_no(
    tmp_path: Path, threshold: float | None, text: str | None
) -> None:
    engine = SureEngine(answer=lambda _: text) if text else SureEngine()
    status, body = asked(write_models(tmp_path, verify_threshold=threshold), engine)
    assert (status, body["success"], body["probability"]) == (200, text is None, None) and not engine.scored


def test_a_probability_that_cannot_be_told_or_comes_too_late_is_never_a_success(tmp_path: Path) -> None:
    settings = write_models(tmp_path, verify_threshold=0.9)
    status, body = asked(settings, SureEngine(broken=ScoreUnavailable("no log-probabilities here")))
    assert status == 500 and "error" in body
    status, body = asked(settings, SureEngine(score_s=60.0), deadline_ms=2000)
    assert status == 504 and "probability" in str(body["error"])


def test_another_adapter_may_verify_and_a_named_model_is_still_asked(tmp_path: Path) -> None:
    settings = write_models(tmp_path)
    judge = tmp_path / "judge"
    judge.mkdir()
    ModelCard(name="judge", base_model="tiny", image_size=28, verify_threshold=0.9).write(judge)
    settings = with_settings(settings, adapters=(*settings.adapters, ("judge", judge)), verifier="judge")

    async def work() -> None:
        engine = SureEngine(adapters=("twin", "judge"))
        async with serving(create_app(settings, engine)) as caller:
            info = (await caller.get("/info")).json()
            assert (info["model"], info["verifier"], info["verify_threshold"]) == ("twin", "judge", 0.9)
            body = (await caller.post("/verify", GOOD["/verify"])).json()
            assert (body["model"], body["policy"], body["success"]) == ("judge", False, False)
            body = (await caller.post("/verify", {**GOOD["/verify"], "model": "twin"})).json()
            assert (body["model"], body["success"], body["probability"]) == ("twin", True, None)
            assert (await caller.post("/cycle", GOOD["/cycle"])).json()["model"] == "twin"

    run(work())


def test_the_twins_own_verifier_is_proven_judges_and_is_no_policy() -> None:
    settings = build({"twin": True}, TWIN.parents[1])
    engine = TransformersEngine(ModelOptions(settings.require_model(), settings.adapters, "cpu", "float32", 1, 4))
    picture = base64.b64encode(encode_jpeg(probe_image(1, 112))).decode()

    async def work() -> None:
        async with serving(create_app(settings, engine)) as caller:
            info = (await caller.get("/info")).json()
            card = ModelCard.read(TWIN / "verifier")
            assert info["ready"] and all(one["proof"] == "references" for one in info["adapters"])
            assert (info["model"], info["verifier"], info["verify_threshold"]) == ("twin", "verifier", 0.7518)
            assert info["policy"] and not card.policy and card.verify_threshold == info["verify_threshold"]
            same = {**GOOD["/verify"], "before": picture, "after": picture, "deadline_ms": 60_000}
            body = (await caller.post("/verify", same)).json()
            assert (body["model"], body["policy"], body["success"]) == ("verifier", False, False)

    run(work(), 240)


def test_the_probability_is_the_models_own_where_the_two_answers_part() -> None:
    images = tuple(probe_image(number, 112) for number in (1, 2))
    prompt = prompts.verify_prompt("Grasp Carrot", "Lift Carrot")
    options = ModelOptions(TWIN / "base", (("twin", TWIN / "adapter"),), "cpu", "float32", 1, 4)

    async def work() -> tuple[float, list[float], list[float]]:
        engine = TransformersEngine(options)
        await engine.start()
        try:
            found = await probability_done(engine, images, prompt, "twin", time.monotonic() + 60)
            whole = [
                await engine.score(ScoreRequest(images, prompt, text, "twin"))
                for text in ('{"success": true, "confidence": "High"', '{"success": false, "confidence": "High"')
            ]
            with pytest.raises(DeadlineExceeded):
                await probability_done(engine, images, prompt, "twin", time.monotonic() - 1)
            return found, whole[0], whole[1]
        finally:
            await engine.close()

    found, done, not_done = run(work(), 120)
    parted = np.flatnonzero(np.abs(np.subtract(done, not_done)) > 1e-4)[0]
    margin = done[parted] - not_done[parted]
    assert 0.001 < found < 0.999 and found == pytest.approx(1 / (1 + math.exp(-margin)), abs=1e-4)
