"""When the server says it is ready: the adapter proof, green and red, on a scripted and on a real engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from server_fakes import GOOD, FakeEngine, run, serving, until, with_settings, write_models
from tiny_models import write_adapter, write_base

from vlm2vla_schema.probes import PROBE_PROMPTS, probe_image
from vlm2vla_schema.types import ModelCard
from vlm2vla_server.adapter_proof import MIN_MEAN_DIFFERENCE_NAT, prove
from vlm2vla_server.app import create_app
from vlm2vla_server.cli import main
from vlm2vla_server.engines.base import EngineStartError
from vlm2vla_server.engines.hf_model import ModelOptions
from vlm2vla_server.engines.transformers_engine import TransformersEngine
from vlm2vla_server.service import Service
from vlm2vla_server.settings import Settings


class SlowStart(FakeEngine):
    """Loads until told to go on; fails when `broken`."""

    broken = False

    async def start(self) -> None:
        self.go = asyncio.Event()
        await self.go.wait()
        if self.broken:
            raise EngineStartError("cannot load the model from FOLDER: no such file")


def test_alive_while_loading_and_ready_afterwards(tmp_path: Path) -> None:
    async def work() -> None:
        engine = SlowStart()
        async with serving(create_app(write_models(tmp_path), engine), ready=False) as caller:
            await until(lambda: hasattr(engine, "go"))
            assert (await caller.get("/healthz")).json() == {"status": "ok"}
            for answer in (await caller.get("/readyz"), await caller.post("/vqa", GOOD["/vqa"])):
                assert (answer.status, answer.code) == (503, "not_ready")
            info = (await caller.get("/info")).json()
            assert info["ready"] is False and "loading" in info["reason"] and info["policy"] is False
            engine.go.set()
            async with asyncio.timeout(10):
                while (await caller.get("/readyz")).status != 200:
                    await asyncio.sleep(0.01)
            info = (await caller.get("/info")).json()
            assert info["ready"] is True and info["policy"] is True and info["reason"] is None
            assert info["adapters"][0]["mean_difference_nat"] == pytest.approx(0.25)
            assert info["adapters"][0]["proof"] == "difference"  # its card has no references

    run(work())


def test_a_failed_start_says_why(tmp_path: Path) -> None:
    async def work() -> None:
        engine = SlowStart()
        engine.broken = True
        async with serving(create_app(write_models(tmp_path), engine), ready=False) as caller:
            await until(lambda: hasattr(engine, "go"))
            engine.go.set()
            await asyncio.sleep(0.05)
            answer = await caller.get("/readyz")
            assert answer.status == 503 and "cannot load the model" in answer.json()["error"]["details"]["reason"]

    run(work())


@pytest.mark.parametrize(
    ("difference_nat", "load_problem", "card", "word"),
    [
        (0.0, None, {}, "does not change the model"),
        (1.9 * MIN_MEAN_DIFFERENCE_NAT, None, {}, "does not change the model"),
        (0.5, "3 tensors match no module", {}, "match no module"),
        (0.5, None, {"adapted_modules": 336}, "336 adapted modules"),
        (0.5, None, {"base_hash": "ff" * 32}, "sha256"),
        (0.5, None, {"prompt_versions": {"actions": "d9"}}, "asks for prompt"),
    ],
)
def test_an_unproven_adapter_keeps_the_server_from_being_ready(
    tmp_path: Path, difference_nat: float, load_problem: str | None, card: dict[str, object], word: str
) -> None:
    async def work() -> None:
        settings = write_models(tmp_path, **card)
        engine = FakeEngine(difference_nat=difference_nat, load_problem=load_problem)
        service = Service(settings, engine)
        await service.start()
        assert not service.ready and word in str(service.reason)
        info = service.info()
        assert not info.policy and word in str(info.reason) and not info.adapters[0].proven
        allowing = with_settings(settings, allow_unproven=True)
        async with serving(create_app(allowing, engine)) as caller:
            got = await caller.post("/cycle", GOOD["/cycle"])
            assert got.status == 200 and got.json()["policy"] is False
            info_json = (await caller.get("/info")).json()
            assert info_json["policy"] is False and word in info_json["reason"]
            assert info_json["adapters"][0]["policy"] is False and info_json["adapters"][0]["proven"] is False

    run(work())


def test_a_matching_card_and_a_sufficient_difference_are_proof(tmp_path: Path) -> None:
    async def work() -> None:
        card = {"adapted_modules": 42, "base_hash": "cd" * 32, "prompt_versions": {"actions": "d4"}}
        service = Service(write_models(tmp_path, **card), FakeEngine(difference_nat=2.1 * MIN_MEAN_DIFFERENCE_NAT))
        await service.start()
        assert service.ready and service.info().policy

    run(work())


def test_a_card_that_was_not_trained_to_act_shows_policy_false(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path, policy=False), FakeEngine())) as caller:
            assert (await caller.get("/info")).json()["policy"] is False
            assert (await caller.post("/cycle", GOOD["/cycle"])).json()["policy"] is False

    run(work())


def test_proof_pictures_are_the_same_everywhere_and_differ_from_one_another() -> None:
    pictures = [probe_image(i, 112) for i in range(len(PROBE_PROMPTS))]
    assert len(PROBE_PROMPTS) == 8 and len({p.tobytes() for p in pictures}) == 8
    assert all(p.shape == (112, 112, 3) and p.dtype == np.uint8 for p in pictures)
    assert [int(p.astype(np.int64).sum()) for p in pictures[:2]] == [
        int(probe_image(i, 112).astype(np.int64).sum()) for i in (0, 1)
    ]


def test_proof_on_a_real_model_red_and_green(tmp_path: Path) -> None:
    async def work() -> None:
        base = write_base(tmp_path / "base")
        active = write_adapter(base, tmp_path / "active", 1)
        idle = write_adapter(base, tmp_path / "idle", 1, active=False)
        engine = TransformersEngine(ModelOptions(base, (("active", active), ("idle", idle))))
        await engine.start()
        proofs = await prove(engine, {"active": ModelCard.read(active), "idle": ModelCard.read(idle)})
        await engine.close()
        assert proofs["active"].problem is None and proofs["active"].mean_difference_nat > 0.01
        assert "does not change the model" in str(proofs["idle"].problem)
        assert proofs["idle"].mean_difference_nat == 0.0
        digest = ModelCard.read(base).base_hash
        ModelCard.read(active).model_copy(update={"base_hash": digest}).write(active)
        for name, folder, ready in (("a", active, True), ("i", idle, False)):
            settings = Settings(engine="transformers", model=base, adapters=((name, folder),))
            service = Service(settings, TransformersEngine(ModelOptions(base, settings.adapters)))
            await service.start()
            assert service.ready is ready, service.reason
            await service.close()

    run(work(), 120)


def test_check_proves_prints_info_and_tells_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base")
    for name, active, code in (("active", True, 0), ("idle", False, 1)):
        adapter = write_adapter(base, tmp_path / name, 1, active=active)
        arguments = ["check", "--engine", "transformers", "--model", str(base), "--adapter", f"{name}={adapter}"]
        assert main(arguments) == code
        info = json.loads(capsys.readouterr().out)
        assert info["ready"] is active and info["adapters"][0]["proven"] is active and info["policy"] is active
        assert info["engine"] == "transformers" and len(info["adapters"][0]["hash"]) == 64
