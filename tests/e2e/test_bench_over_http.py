"""`vlm2vla-client bench` against the real server: its timing, its streams, its episodes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e_fixtures import ServerProcess
from e2e_server import PIECE_CHARS
from PIL import Image

from vlm2vla_client.cli import main

TEXTS: dict[str, Any] = {
    "subtasks": "['Move to Carrot']",
    "plans": {"Move to Carrot": "Move forward and slightly left, then down."},
    "actions": {"": "[[0.01, 0.0, 0.0, 1.0], [0.0, 0.02, 0.0, 1.0], [0.0, 0.0, -0.03, 1.0], [0.0, 0.0, 0.0, 0.0]]"},
}
TOKEN_S = 0.01
TOKENS = sum(math.ceil(len(text) / PIECE_CHARS) for text in (TEXTS["plans"]["Move to Carrot"], TEXTS["actions"][""]))
PARTS = {"encode", "network", "queue", "preprocess", "prefill", "decode", "parse", "rest"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = ServerProcess(tmp_path_factory.mktemp("paced"), TEXTS, token_s=TOKEN_S)
    yield running
    running.close()


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = tmp_path / "frame.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_a_cycle_is_timed_part_by_part_and_by_robots(
    server: ServerProcess, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "--server", server.url, "--image", picture, "--robots", "1,3", "--requests", "3"]
    floor = ["--floor", "gemma-3-12b", "--device", "h100"]
    assert main([*asked, *floor, "--out", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "3 robots: 9/9 requests" in captured.err
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == report
    assert (tmp_path / "out" / "bench.svg").stat().st_size > 1000
    assert [level["robots"] for level in report["levels"]] == [1, 3]
    for level in report["levels"]:
        figures = level["servers"]["first"]
        assert figures["answers"] == 3 * level["robots"] and figures["errors"] == {}
        assert set(figures["parts_ms"]) == PARTS
        parts = {name: value["p50"] for name, value in figures["parts_ms"].items()}
        # A token every 10 ms or later, each read by a clock of its own; the first of each stage is its prefill.
        assert parts["decode"] >= (TOKENS - 2) * 10 - 1 and parts["prefill"] >= 2 * 10 - 1
        assert parts["encode"] > 0 and parts["preprocess"] > 0 and parts["parse"] > 0
        assert figures["ms_per_token"]["p50"] >= 10
        assert figures["tokens_p50"]["generated"] == TOKENS
        assert figures["first_row_ms"]["p50"] < figures["wall_ms"]["p50"]
        assert figures["floor"]["times_the_floor"] > 0
    assert report["servers"]["first"]["model"] == "twin"


def test_two_servers_in_one_run(
    server: ServerProcess, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ServerProcess(tmp_path / "quick", TEXTS)
    try:
        asked = ["bench", "--server", server.url, "--compare", quick.url, "--image", picture, "--endpoint", "actions"]
        assert main([*asked, "--robots", "1", "--requests", "5"]) == 0
    finally:
        quick.close()
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "second / first" in line)
    assert "median of 5 pairs" in line
    assert float(line.split("wall ")[1].split(",")[0]) < 1.0
    assert "actions, 1 robot: median" in text
