"""`curate --workers`: many processes write the same bytes as one, and a broken run is mended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_fakes import PICK, PLACE, episode_of

from vlm2vla_training.annotation.files import read_annotated
from vlm2vla_training.cli import main
from vlm2vla_training.curation.dataset import EPISODES_A_PART, CurateCounts
from vlm2vla_training.curation.examples import ExampleOptions
from vlm2vla_training.curation.spread_parts import curate_parts
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.errors import DataError
from vlm2vla_training.spread import Work

EPISODES = 2 * EPISODES_A_PART + 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotated episodes for three parts, of which one has lost its annotation and one is quarantined."""
    root = tmp_path_factory.mktemp("data")
    with EpisodeWriter(root / "episodes") as writer:
        for number in range(EPISODES):
            segments, words = (PICK, "pick up the carrot") if number % 2 else (PLACE, "put the carrot on the plate")
            writer.write(episode_of(segments, words, f"fake/{number}"))
    assert main(["annotate", "--episodes", str(root / "episodes"), "--out", str(root / "annotated")]) == 0
    file = root / "annotated" / "annotated.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3]["audit"]["quarantine"] = ["a wrong sign"]
    del lines[70]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def curate(data: Path, out: Path, *more: str) -> dict[str, Any]:
    command = ["curate", "--episodes", str(data / "episodes"), "--annotated", str(data / "annotated")]
    assert main([*command, "--kinds", "actions,verify", "--out", str(out), *more]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    del summary["seconds"]
    return summary


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "summary.json"}


class Here:
    """Does the work in this process and counts it."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def __call__(self, work: Work, texts: Sequence[str]) -> Iterator[str]:
        for text in texts:
            self.done.append(json.loads(text)["part"])
            yield work(text)


def test_two_processes_write_the_same_bytes_as_one(data: Path, tmp_path: Path) -> None:
    one, two = curate(data, tmp_path / "one"), curate(data, tmp_path / "two", "--workers", "2")
    assert one == two and one["episodes"] == EPISODES - 2
    assert one["dropped"]["episode without annotation"] == 1 and one["left_out"] == {"quarantined by the audit": 1}
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert "part-00002.parquet" in content(tmp_path / "two")


def test_only_parts_that_are_not_there_as_they_should_be_are_written(data: Path, tmp_path: Path) -> None:
    out, here = tmp_path / "out", Here()
    curate(data, out)
    whole = content(out)
    (out / "part-00000.parquet").unlink()
    (out / "part-00002.parquet").write_bytes((out / "part-00001.parquet").read_bytes())
    options = ExampleOptions(kinds=("actions", "verify"))
    annotated = read_annotated(data / "annotated")
    quarantined = annotated.pop("fake/3").episode_key
    arguments = (data / "episodes", annotated, out, options, 0, CurateCounts(), {quarantined}, here)
    curate_parts(*arguments)
    assert content(out) == whole and here.done == [0, 2]
    (out / "part-00003.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="1 parts that"):
        curate_parts(*arguments)


def test_one_process_goes_on_after_many_and_overwrites_nothing(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = curate(data, out, "--workers", "2")
    (out / "part-00000.parquet").unlink()
    kept = content(out)
    again = curate(data, out)
    assert again["examples"] == summary["examples"] and again["episodes"] == summary["episodes"]
    after = content(out)
    assert {name: after[name] for name in kept if name != "README.md"} == {
        name: data for name, data in kept.items() if name != "README.md"
    }
    assert "part-00003.parquet" in after and "part-00000.parquet" not in after


def test_workers_and_ray_are_not_given_together(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["curate", "--episodes", str(data / "episodes"), "--annotated", str(data / "annotated")]
    assert main([*command, "--out", str(tmp_path / "out"), "--workers", "2", "--ray", "auto"]) == 2
    assert "not together with --ray" in capsys.readouterr().err and not (tmp_path / "out").exists()
