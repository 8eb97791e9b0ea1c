import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import PICK, PLACE, episode_of, flat_image, write_recording

from vlm2vla_training.episodes.base import Episode, all_finite, binary_gripper
from vlm2vla_training.episodes.parquet import EpisodeDataset, EpisodeWriter
from vlm2vla_training.episodes.recordings import RecordingsSource
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import JsonlAppender, read_jsonl


def test_round_trip_and_columns(tmp_path: Path) -> None:
    first = episode_of(PICK, "pick up the carrot", "fake/0", 0.001)
    second = Episode(**{**vars(episode_of(PLACE, "put it", "fake/1")), "first_step": 7, "facts": {"seed": 1}})
    with EpisodeWriter(tmp_path, episodes_per_part=1) as writer:
        writer.write(first)
        writer.write(second)
    read = list(EpisodeDataset(tmp_path).episodes())
    assert [episode.key for episode in read] == ["fake/0", "fake/1"]
    assert np.array_equal(read[0].actions, first.actions) and read[0].images == first.images
    assert (read[1].first_step, read[1].facts) == (7, {"seed": 1})
    table = pq.read_table(tmp_path / "part-00001.parquet")
    assert table.column_names == ["episode_key", "step", "image", "action", "state", "instruction", "source"]
    assert table.column("step").to_pylist()[0] == 7
    assert pq.read_table(tmp_path / "episodes.parquet").column("steps").to_pylist() == [len(first), len(second)]


def test_resume_after_a_crash_keeps_whole_parts_only(tmp_path: Path) -> None:
    writer = EpisodeWriter(tmp_path, episodes_per_part=1)
    writer.write(episode_of(PICK, "pick up the carrot", "fake/0"))
    (tmp_path / "part-00001.parquet.partial").write_bytes(b"torn")
    assert not (tmp_path / "episodes.parquet").exists(), "written once, at the end"
    again = EpisodeWriter(tmp_path)
    assert again.done == {"fake/0"}
    with pytest.raises(DataError, match="already"):
        again.write(episode_of(PICK, "pick up the carrot", "fake/0"))
    again.close()
    assert not list(tmp_path.glob("*.partial")) and (tmp_path / "episodes.parquet").exists()


def test_reading_without_images_leaves_them_on_disk(tmp_path: Path) -> None:
    with EpisodeWriter(tmp_path) as writer:
        writer.write(episode_of(PICK, "pick up the carrot"))
    assert next(EpisodeDataset(tmp_path).episodes(images=False)).images == []


def test_shapes_are_checked() -> None:
    with pytest.raises(DataError, match=r"\[T, 7\]"):
        Episode("k", "i", "s", [], np.zeros((3, 4)), np.zeros((3, 7)))
    with pytest.raises(DataError, match="2 images"):
        Episode("k", "i", "s", [flat_image()] * 2, np.zeros((3, 7)), np.zeros((3, 7)))
    with pytest.raises(DataError, match="finite"):
        Episode("k", "i", "s", [], np.full((1, 7), np.nan), np.zeros((1, 7)))


def test_gripper_takes_the_value_reached_next() -> None:
    logged = np.array([1.0, 0.9, 0.5, 0.02, 0.0, 0.4, 0.97, 0.7])
    assert binary_gripper(logged).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=30))
def test_gripper_is_always_binary(values: list[float]) -> None:
    assert set(binary_gripper(np.array(values, dtype=np.float64)).tolist()) <= {0.0, 1.0}


def test_recordings_become_episodes(tmp_path: Path) -> None:
    write_recording(tmp_path / "runs" / "one", "pick up the carrot", rows=3, torn=True)
    write_recording(tmp_path / "runs" / "idle", "pick up the carrot", rows=0)
    source = RecordingsSource(tmp_path / "runs")
    assert source.keys() == ["recordings/idle", "recordings/one"]
    episodes = list(source.episodes())
    assert [episode.key for episode in episodes] == ["recordings/one"]
    assert episodes[0].instruction == "pick up the carrot" and len(episodes[0]) == 3
    assert episodes[0].actions[2].tolist() == [0.03, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert list(source.episodes(frozenset({"recordings/one"}))) == []
    assert list(RecordingsSource(tmp_path / "runs", successful_only=True).episodes()) == []


def test_a_broken_recording_is_named(tmp_path: Path) -> None:
    write_recording(tmp_path / "one", "pick up the carrot", rows=1)
    (tmp_path / "one" / "frames" / "000000.jpg").unlink()
    with pytest.raises(DataError, match=r"000000\.jpg"):
        list(RecordingsSource(tmp_path).episodes())
    with pytest.raises(DataError, match=r"events\.jsonl"):
        RecordingsSource(tmp_path / "nothing")


def test_jsonl_drops_only_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    with JsonlAppender(path) as file:
        file.append({"a": 3})
    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 3}]
    path.write_text("nonsense\n" + json.dumps({"a": 1}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        list(read_jsonl(path))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("other", [0.0, 1.0, -1e300])
def test_no_value_hides_behind_another_array(bad: float, other: float) -> None:
    """Zeros, and infinities that cancel, must not make a product finite."""
    one, two = np.full((2, 7), other), np.zeros((2, 7))
    assert all_finite(one, two) and all_finite(np.full((2, 7), 1e300), np.full((2, 7), -1e300))
    two[1, 3] = bad
    two[0, 3] = -bad
    assert not all_finite(one, two) and not all_finite(two, one)
