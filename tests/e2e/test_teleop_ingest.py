"""What a person does by hand in the twin becomes an episode that training reads: teleop, then ingest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlm2vla_client import teleop
from vlm2vla_client.cli import main
from vlm2vla_training.cli import main as train
from vlm2vla_training.episodes.recordings import RecordingsSource


class TypedKeys:
    """A person who presses these keys, one after the other."""

    def __init__(self, keys: str) -> None:
        self._keys = list(keys)

    def __enter__(self) -> TypedKeys:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pending(self) -> str:
        return ""

    def wait(self, timeout_s: float) -> str | None:
        return self._keys.pop(0)


def drive(folder: Path, monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    monkeypatch.setattr(teleop, "require_terminal", lambda what: TypedKeys(keys))
    assert main(["teleop", "--sim", "--task", "pick up the carrot", "--record", str(folder)]) == 0


def test_rows_pictures_and_words_arrive_in_the_episode_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    drive(tmp_path / "runs", monkeypatch, "fflddg,uqy")
    drive(tmp_path / "runs", monkeypatch, "bqn")
    (won,) = RecordingsSource(tmp_path / "runs", successful_only=True).episodes()
    assert won.instruction == "pick up the carrot" and len(won) == len(won.images) == 8
    step = np.zeros((8, 7))
    step[:, 6] = [1, 1, 1, 1, 1, 0, 0, 0]
    step[0, 0] = step[1, 0] = step[2, 1] = step[7, 2] = 0.01
    step[3, 2] = step[4, 2] = -0.01
    step[6, 5] = 0.1
    assert won.actions == pytest.approx(step, abs=1e-9)
    assert np.diff(won.states[:6, :3], axis=0) == pytest.approx(step[:5, :3], abs=0.003)
    assert won.facts["success"] and won.facts["finished"]
    out = tmp_path / "episodes"
    given = ["--format", "recordings", "--input", str(tmp_path / "runs")]
    assert train(["ingest", *given, "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["episodes"] == 2
