"""`ingest --workers`: many processes write the same bytes as one, and a broken run is mended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rlds_files import actions_of, bridge_features, write_info, write_shard

from vlm2vla_training.cli import main
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.rlds import RldsSource
from vlm2vla_training.errors import DataError
from vlm2vla_training.ingest_spread import write_parts
from vlm2vla_training.spread import Spread, Work, over_processes


def shards(folder: Path) -> Path:
    """45 records in three shards: two keys met twice, three without instruction, a damaged record, a zero row."""
    lengths = []
    for shard in range(3):
        words = ["" if number == 5 else f"put {number}" for number in range(15)]
        episodes = [bridge_features(3, said, f"/x/{shard}.npy", number) for number, said in enumerate(words)]
        if shard == 1:
            actions_of(episodes[2])[-1] = 0.0
            episodes[3:5] = [bridge_features(path="/x/0.npy", number=number) for number in (3, 4)]
        path = write_shard(folder, episodes, f"bridge_dataset-train.tfrecord-{shard:05d}-of-00003")
        lengths.append(len(episodes))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    write_info(folder, lengths)
    return folder


def ingest(source: Path, out: Path, *more: str) -> dict[str, Any]:
    assert main(["ingest", "--format", "rlds", "--input", str(source), "--out", str(out), *more]) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    del summary["seconds"]
    return summary


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "summary.json"}


def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    source = shards(tmp_path / "source")
    one, two = ingest(source, tmp_path / "one"), ingest(source, tmp_path / "two", "--workers", "2")
    assert one == two and one["left_out"] == {"key met twice": 2, "no instruction": 3} and len(one["damage"]) == 1
    assert one["episodes"] == 45 - 1 - 2 - 3 and one["traps"]["zero_last_row_dropped"] == 1
    assert content(tmp_path / "one") == content(tmp_path / "two") and "part-00002.parquet" in content(tmp_path / "two")


def test_much_data_is_read_by_every_core_without_being_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shards(tmp_path / "source")
    ingest(source, tmp_path / "one")
    asked: list[int] = []

    def counted(workers: int) -> Spread:
        asked.append(workers)
        return over_processes(2)

    monkeypatch.setattr("vlm2vla_training.ingest.over_processes", counted)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    ingest(source, tmp_path / "little")
    assert not asked, "starting the processes would take longer"
    monkeypatch.setattr("vlm2vla_training.ingest._SPREAD_FROM_BYTES", 1)
    ingest(source, tmp_path / "much")
    assert asked == [3] and content(tmp_path / "one") == content(tmp_path / "much")


class Here:
    """Does the work in this process and counts it."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, work: Work, texts: Sequence[str]) -> Iterator[str]:
        for text in texts:
            self.done.append(text)
            yield work(text)


def test_only_parts_that_are_not_there_as_they_should_be_are_written(tmp_path: Path) -> None:
    source, out = shards(tmp_path / "source"), tmp_path / "out"
    ingest(source, out)
    whole = content(out)
    (out / "part-00001.parquet").unlink()
    (out / "part-00002.parquet").write_bytes((out / "part-00000.parquet").read_bytes())
    here, options = Here(), IntakeOptions()
    write_parts(RldsSource(source, options), source, options, out, here)
    assert content(out) == whole
    assert [json.loads(text)["part"] for text in here.done[3:]] == [1, 2], "after three shards were read"
    (out / "part-00003.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="1 parts that"):
        write_parts(RldsSource(source, options), source, options, out, here)


def test_a_shard_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    source, options = shards(tmp_path / "source"), IntakeOptions()

    class Meddler(Here):
        def __call__(self, work: Work, texts: Sequence[str]) -> Iterator[str]:
            for text in texts:
                if text.startswith("{"):
                    write_shard(source, [], "bridge_dataset-train.tfrecord-00000-of-00003")
                yield work(text)

    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="tfrecord-00000-of-00003 record 0 at byte 0"):
        write_parts(RldsSource(source, options), source, options, tmp_path / "out", Meddler())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "raw", "--workers", "2"], "are for rlds"),
        (["--format", "rlds", "--workers", "0"], "--workers 0"),
        (["--format", "rlds", "--workers", "2", "--ray", "auto"], "not together with --ray"),
    ],
)
def test_what_cannot_be_spread_is_refused(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "source", [bridge_features()])
    assert main(["ingest", "--input", str(tmp_path / "source"), "--out", str(tmp_path / "out"), *more]) != 0
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_values_survive_the_second_reading(tmp_path: Path) -> None:
    source, options = shards(tmp_path / "source"), IntakeOptions()
    reader = RldsSource(source, options)
    met = [one for one in reader.meet(reader.shards[1], []) if one.taken.episode is not None]
    again = reader.episodes_at([(reader.shards[1], one.number, one.offset) for one in met])
    for one, episode in zip(met, again, strict=True):
        assert one.taken.episode is not None and episode.key == one.key == one.taken.episode.key
        assert np.array_equal(episode.actions, one.taken.episode.actions)
        assert np.array_equal(episode.states, one.taken.episode.states) and episode.images == one.taken.episode.images
    without = [one for one in reader.meet(reader.shards[1], []) if one.taken.left_out is not None]
    with pytest.raises(DataError, match="the episode that was here is gone"):
        reader.episodes_at([(reader.shards[1], one.number, one.offset) for one in (met[0], without[0])])
