"""LeRobot datasets written here: read back by our own reader, and checked against what LeRobot 0.4.4 and 0.6.1 ask of
the files. LeRobot itself is too large for the tests; bench/lerobot_reads.py is the check by its own reader.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from training_fakes import PICK, PLACE, episode_of, flat_image, write_recording

from vlm2vla_training.cli import main
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.lerobot import LeRobotSource
from vlm2vla_training.episodes.lerobot_stats import image_stats, merged, vector_stats
from vlm2vla_training.episodes.lerobot_writer import CAMERA, LeRobotWriter
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.errors import DataError

# What a LeRobot dataset of images has beside the features of its robot: name -> dtype.
DEFAULT_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
EPISODE_COLUMNS = {
    "episode_index", "tasks", "length", "data/chunk_index", "data/file_index", "dataset_from_index",
    "dataset_to_index", "meta/episodes/chunk_index", "meta/episodes/file_index",
}  # fmt: skip


def episodes() -> list[Episode]:
    return [
        episode_of(PICK, "pick up the carrot", "fake/0", 0.001),
        Episode(**{**vars(episode_of(PLACE, "put the “carrot” away", "fake/1", 0.001, 1)), "first_step": 7}),
        episode_of(PICK, "pick up the carrot", "fake/2", 0.001, 2),
    ]


def written(folder: Path, file_mb: float = 100) -> Path:
    with LeRobotWriter(folder, 5, "widowx", file_mb) as writer:
        for episode in episodes():
            writer.write(episode)
    return folder


def files_in(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def test_our_reader_reads_back_what_was_written(tmp_path: Path) -> None:
    source = LeRobotSource(written(tmp_path / "set"), IntakeOptions())
    assert source.count() == 3
    for found, expected in zip(source.episodes(), episodes(), strict=True):
        assert found.instruction == expected.instruction and found.images == expected.images
        assert np.array_equal(found.actions, expected.actions.astype(np.float32))
        assert np.array_equal(found.states, expected.states.astype(np.float32))
    assert source.report.to_json()["left_out"] == {}


@pytest.mark.parametrize(("file_mb", "files"), [(100, 1), (0.0001, 3)])
def test_the_files_are_what_lerobot_asks_for(tmp_path: Path, file_mb: float, files: int) -> None:
    root = written(tmp_path, file_mb)
    info = json_of(root / "meta" / "info.json")
    lengths = [len(episode) for episode in episodes()]
    assert (info["codebase_version"], info["fps"], info["video_path"]) == ("v3.0", 5, None)
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, sum(lengths), 2)
    assert info["splits"] == {"train": "0:3"}
    features = info["features"]
    assert {name: features[name]["dtype"] for name in DEFAULT_FEATURES} == DEFAULT_FEATURES
    assert all(features[name]["shape"] == [1] for name in DEFAULT_FEATURES)
    assert features[CAMERA] == {"dtype": "image", "shape": [48, 64, 3], "names": ["height", "width", "channels"]}
    assert features["action"] == features["observation.state"] and features["action"]["shape"] == [7]
    index = 0
    row_places: list[tuple[int, int]] = []
    for number in range(files):
        name = info["data_path"].format(chunk_index=0, file_index=number)
        frames = pq.read_table(root / name)
        # LeRobot casts each file to the features, all of them and no other
        assert set(frames.column_names) == set(features)
        assert pa.types.is_struct(frames.schema.field(CAMERA).type)
        assert {field.name for field in frames.schema.field(CAMERA).type} == {"bytes", "path"}
        assert frames.schema.field("action").type == pa.list_(pa.float32(), 7)
        rows = pq.read_table(root / "meta" / "episodes" / Path(name).relative_to("data")).to_pylist()
        with pq.ParquetFile(root / name) as file:
            assert file.num_row_groups == len(rows)
        assert frames.column("index").to_pylist() == list(range(index, index + len(frames)))
        for row in rows:
            assert set(row) >= EPISODE_COLUMNS
            assert row["length"] == lengths[row["episode_index"]]
            assert row["dataset_to_index"] - row["dataset_from_index"] == row["length"]
            mine = frames.slice(row["dataset_from_index"] - index, row["length"])
            assert set(mine.column("episode_index").to_pylist()) == {row["episode_index"]}
            assert mine.column("frame_index").to_pylist() == list(range(row["length"]))
            assert np.allclose(mine.column("timestamp").to_numpy(), np.arange(row["length"]) / 5, atol=1e-4)
            assert (row["data/chunk_index"], row["data/file_index"]) == (0, number)
            assert (row["meta/episodes/chunk_index"], row["meta/episodes/file_index"]) == (0, number)
            row_places.append((row["episode_index"], row["dataset_from_index"]))
        index += len(frames)
    assert row_places == [(0, 0), (1, lengths[0]), (2, lengths[0] + lengths[1])]


def test_pandas_finds_the_tasks_by_their_text(tmp_path: Path) -> None:
    # LeRobot: tasks.iloc[task_index].name is the task
    frame = pq.read_table(written(tmp_path) / "meta" / "tasks.parquet").to_pandas()
    assert list(frame.index) == ["pick up the carrot", "put the “carrot” away"] and frame.index.name == "task"
    assert list(frame["task_index"]) == [0, 1]


def test_statistics_are_those_of_the_data(tmp_path: Path) -> None:
    root = written(tmp_path)
    stats = json_of(root / "meta" / "stats.json")
    actions = np.concatenate([episode.actions for episode in episodes()]).astype(np.float32).astype(np.float64)
    assert set(stats) == {CAMERA, "action", "observation.state", *DEFAULT_FEATURES}
    assert np.allclose(stats["action"]["mean"], actions.mean(axis=0)) and stats["action"]["count"] == [len(actions)]
    assert np.allclose(stats["action"]["std"], actions.std(axis=0))
    assert stats["action"]["min"] == actions.min(axis=0).tolist()
    assert np.array(stats[CAMERA]["mean"]).shape == (3, 1, 1) and 0.1 < stats[CAMERA]["mean"][0][0][0] < 0.8
    row = pq.read_table(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()[1]
    second = episodes()[1].actions.astype(np.float32).astype(np.float64)
    assert np.allclose(row["stats/action/q50"], np.quantile(second, 0.5, axis=0))


def test_picture_statistics_are_per_channel_and_in_0_to_1() -> None:
    half = np.zeros((4, 4, 3), dtype=np.uint8)
    half[:2, :, 0] = 255
    half[..., 2] = 51
    buffer = io.BytesIO()
    Image.fromarray(half).save(buffer, "PNG")
    stats = image_stats([buffer.getvalue()] * 40)
    assert stats["mean"] == [[[0.5]], [[0.0]], [[0.2]]] and stats["std"][0] == [[0.5]]
    assert stats["max"] == [[[1.0]], [[0.0]], [[0.2]]] and stats["q99"][0] == [[1.0]] and stats["count"] == [16]


def test_statistics_of_parts_give_those_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (90, 4))
    whole, parts = vector_stats(values), None
    for part in np.split(values, [7, 50]):
        parts = merged(parts, vector_stats(part))
    assert parts is not None and parts["count"] == whole["count"]
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(parts[name], whole[name])


def test_a_stopped_export_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", 0.0001)
    first, second, third = episodes()
    with LeRobotWriter(tmp_path / "cut", 5, "widowx", 0.0001) as writer:
        writer.write(first)
    data = tmp_path / "cut" / "data" / "chunk-000"
    # killed behind the next data file, before anything told of it
    (data / "file-001.parquet").write_bytes(b"nobody knows of it")
    (data / "file-002.parquet.partial").write_bytes(b"torn")
    with LeRobotWriter(tmp_path / "cut", 5, "widowx", 0.0001) as writer:
        assert writer.done == {"fake/0"}
        with pytest.raises(DataError, match="already"):
            writer.write(first)
        writer.write(second)
        writer.write(third)
    names = files_in(whole)
    assert names == files_in(tmp_path / "cut")
    for name in names:
        if name.suffix == ".parquet":
            assert pq.read_table(tmp_path / "cut" / name).equals(pq.read_table(whole / name))
    assert json_of(tmp_path / "cut" / "meta" / "info.json") == json_of(whole / "meta" / "info.json")


def test_the_command_takes_recordings_and_names_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("a", 3), ("b", 0), ("c", 2), ("d", 2)):
        write_recording(tmp_path / "runs" / name, "pick up the carrot", rows)
    (tmp_path / "runs" / "c" / "frames" / "000001.jpg").write_bytes(flat_image(90, 32, 32))
    (tmp_path / "runs" / "d" / "frames" / "000001.jpg").write_bytes(flat_image()[:-200])
    command = ["export-lerobot", "--recordings", str(tmp_path / "runs"), "--out", str(tmp_path / "set")]
    assert main([*command, "--dry-run"]) == 0 and not (tmp_path / "set").exists()
    assert main(command) == 0
    summary = json_of(tmp_path / "set" / "summary.json")
    assert (summary["episodes"], summary["new"], summary["nothing_moved"]) == (1, 1, 1)
    reasons = {one["episode_key"]: one["reason"] for one in summary["left_out"]}
    assert set(reasons) == {"recordings/c", "recordings/d"} and "48 x 64" in reasons["recordings/c"]
    assert main(command) == 0
    assert json_of(tmp_path / "set" / "summary.json")["new"] == 0
    capsys.readouterr()
    assert main([*command, "--fps", "10"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    (back,) = LeRobotSource(tmp_path / "set", IntakeOptions()).episodes()
    assert len(back) == 3 and back.actions[2, 0] == np.float32(0.03)


def test_the_command_takes_an_episode_dataset_and_no_foreign_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EpisodeWriter(tmp_path / "episodes") as writer:
        for episode in episodes():
            writer.write(episode)
    command = ["export-lerobot", "--episodes", str(tmp_path / "episodes"), "--out"]
    assert main([*command, str(tmp_path / "set")]) == 0
    assert json_of(tmp_path / "set" / "meta" / "info.json")["total_episodes"] == 3
    assert main([*command, str(tmp_path / "set"), "--fps", "0"]) == 2
    info = json_of(tmp_path / "set" / "meta" / "info.json")
    (tmp_path / "lab" / "meta").mkdir(parents=True)
    (tmp_path / "lab" / "meta" / "info.json").write_text(json.dumps(info))
    capsys.readouterr()
    assert main([*command, str(tmp_path / "lab")]) == 1
    assert "not written by export-lerobot" in capsys.readouterr().err
