"""``ask``: one live picture, the same for both models."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from client_fakes import FakeServer, body_of, error_response, stage

from vlm2vla_client import commands
from vlm2vla_client.cli import main
from vlm2vla_schema.images import decode_image, encode_jpeg, from_base64


@pytest.fixture(autouse=True)
def _no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("VLM2VLA_API_KEY", raising=False)


@pytest.fixture
def camera(tmp_path: Path) -> list[str]:
    """Flags for a folder with one blue picture, repeated."""
    folder = tmp_path / "frames"
    folder.mkdir()
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[:, :, 2] = 200
    (folder / "0.jpg").write_bytes(encode_jpeg(image))
    return ["--camera", "images", "--camera-file", str(folder), "--camera-repeat"]


def answer(request: httpx.Request) -> httpx.Response:
    fields = body_of(request)
    text = "a room" if fields["model"] == "base" else "a carrot\x1b[2J on a plate"
    return httpx.Response(200, json={**stage(fields, answer=text), "model": fields["model"]})


def asked(monkeypatch: pytest.MonkeyPatch, server: FakeServer, *arguments: str) -> int:
    monkeypatch.setattr(commands, "connect", lambda *_: server.connection())
    return main(["ask", *arguments])


def test_both_models_see_the_same_live_picture(
    monkeypatch: pytest.MonkeyPatch, camera: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeServer(vqa=answer)
    assert asked(monkeypatch, server, *camera, "what is this?") == 0
    base, adapter = capsys.readouterr().out.splitlines()
    assert base == "base  a room" and adapter.startswith("twin  a carrot") and "\x1b" not in adapter
    sent = [body_of(request) for request in server.requests if request.url.path == "/vqa"]
    assert [body["model"] for body in sent] == ["base", "twin"] and sent[0]["image"] == sent[1]["image"]
    assert {body["question"] for body in sent} == {"what is this?"}
    picture = decode_image(from_base64(sent[0]["image"]))
    assert picture.shape == (48, 64, 3) and picture[:, :, 2].mean() > 180


def test_as_json_and_with_one_model_named(
    monkeypatch: pytest.MonkeyPatch, camera: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(monkeypatch, FakeServer(vqa=answer), *camera, "--model", "base", "--json", "what?") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"camera": "images", "question": "what?", "answers": {"base": "a room"}}


def test_what_goes_wrong_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, camera: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = FakeServer(vqa=answer)
    assert asked(monkeypatch, good, *camera, "") == 2
    assert asked(monkeypatch, good, "--camera", "images", "what?") == 2
    assert asked(monkeypatch, good, *camera, "--model", "nobody", "what?") == 4
    assert asked(monkeypatch, FakeServer(vqa=lambda _: error_response("overloaded")), *camera, "what?") == 4
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.jpg").write_bytes(b"no picture")
    assert asked(monkeypatch, good, "--camera", "images", "--camera-file", str(tmp_path / "broken"), "what?") == 6
    assert "Traceback" not in capsys.readouterr().err
