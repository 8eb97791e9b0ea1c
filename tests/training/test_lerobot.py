"""LeRobot version 3 datasets, laid out as lerobot 0.4 writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_fakes import flat_image

from vlm2vla_training.cli import main
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.lerobot import LeRobotSource
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import DataError

CAMERA = "observation.images.front"
PARTS = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


def info(**changes: Any) -> dict[str, Any]:
    features = {
        CAMERA: {"dtype": "image", "shape": [48, 64, 3], "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": [7], "names": PARTS},
        "action": {"dtype": "float32", "shape": [7], "names": PARTS},
    }
    features.update(changes.pop("features", {}))
    return {"codebase_version": "v3.0", "robot_type": "widowx", "fps": 5, "total_episodes": 3, "features": features,
            **changes}  # fmt: skip


def row(episode: int, frame: int, task: int, state: int = 7, image: dict[str, Any] | None = None) -> dict[str, Any]:
    pose = [0.3 + 0.01 * frame, 0.0, 0.1, 0.0, 0.0, 0.0, *([9.0] if state == 8 else []), 1.0]
    return {
        CAMERA: image or {"bytes": flat_image(50 + frame), "path": f"frame-{frame:06d}.jpg"},
        "observation.state": pose,
        "action": [0.01, 0.0, -0.01, 0.0, 0.0, 0.0, 1.0],
        "episode_index": episode,
        "frame_index": frame,
        "task_index": task,
        "index": 10 * episode + frame,
    }


def dataset(folder: Path, files: list[list[dict[str, Any]]], description: dict[str, Any] | None = None) -> Path:
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(description or info()))
    tasks = [{"task_index": n, "__index_level_0__": text} for n, text in enumerate(["pick up the cup", "lift it", ""])]
    pq.write_table(pa.Table.from_pylist(tasks), folder / "meta" / "tasks.parquet")
    for number, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "chunk-000" / f"file-{number:03d}.parquet")
    return folder


def frames(episode: int, count: int, task: int, state: int = 7) -> list[dict[str, Any]]:
    return [row(episode, frame, task, state) for frame in range(count)]


def test_episodes_are_cut_out_of_shared_files(tmp_path: Path) -> None:
    # more rows than one batch, two episodes in the first file
    root = dataset(tmp_path / "lab", [frames(0, 70, 0) + frames(1, 3, 1), frames(2, 2, 0)])
    source = LeRobotSource(root, IntakeOptions())
    episodes = list(source.episodes())
    assert [(one.key, len(one), one.instruction) for one in episodes] == [
        ("lerobot/lab/0", 70, "pick up the cup"),
        ("lerobot/lab/1", 3, "lift it"),
        ("lerobot/lab/2", 2, "pick up the cup"),
    ]
    assert episodes[0].images[5] == flat_image(55) and episodes[0].actions[3].tolist() == [0.01, 0, -0.01, 0, 0, 0, 1]
    assert episodes[1].states[2, 0] == pytest.approx(0.32) and source.report.to_json()["left_out"] == {}


def test_the_command_counts_what_it_leaves_out(tmp_path: Path) -> None:
    gap = [row(1, 0, 0), row(1, 2, 0)]
    root = dataset(tmp_path / "in", [frames(0, 3, 2) + gap], info(total_episodes=5))
    kept = dataset(tmp_path / "good", [frames(0, 3, 0) + frames(1, 3, 2) + [row(2, 0, 0), row(2, 2, 0)]], info())
    assert main(["ingest", "--format", "lerobot", "--input", str(root), "--out", str(tmp_path / "o1")]) == 1
    summary = json.loads((tmp_path / "o1" / "summary.json").read_text())
    assert summary["traps"] == {"episodes_missing": 3}
    assert summary["left_out"] == {"no instruction": 1, "unreadable episode": 1}
    assert main(["ingest", "--format", "lerobot", "--input", str(kept), "--out", str(tmp_path / "o2")]) == 0
    assert EpisodeDataset(tmp_path / "o2").keys() == ["lerobot/good/0"]


def test_eight_values_of_state_carry_a_padding(tmp_path: Path) -> None:
    names = {"motors": ["x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"]}
    description = info(features={"observation.state": {"dtype": "float32", "shape": [8], "names": names}})
    root = dataset(tmp_path / "lab", [frames(0, 2, 0, state=8)], description)
    (episode,) = LeRobotSource(root, IntakeOptions()).episodes()
    assert np.array_equal(episode.states[0], [0.3, 0, 0.1, 0, 0, 0, 1.0])


def test_frames_may_lie_in_files_inside_the_dataset_only(tmp_path: Path) -> None:
    (tmp_path / "outside.jpg").write_bytes(flat_image())
    inside = row(0, 0, 0, image={"bytes": None, "path": "images/a.jpg"})
    outside = row(1, 0, 0, image={"bytes": None, "path": "../outside.jpg"})
    root = dataset(tmp_path / "lab", [[inside, outside]])
    (root / "images").mkdir()
    (root / "images" / "a.jpg").write_bytes(flat_image(77))
    source = LeRobotSource(root, IntakeOptions())
    assert [one.images for one in source.episodes()] == [[flat_image(77)]]
    assert source.report.to_json()["left_out"] == {"unreadable episode": 1}


VIDEO = {"dtype": "video", "shape": [48, 64, 3]}
JOINTS = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"codebase_version": "v2.1"}, DataError, "v3"),
        ({"features": {"action": {"dtype": "float32", "shape": [7], "names": JOINTS}}}, DataError, "Joint commands"),
        ({"features": {"action": {"dtype": "float32", "shape": [7]}}}, DataError, "named so"),
        ({"features": {"action": {"dtype": "float32", "shape": [6], "names": PARTS[:6]}}}, DataError, "7 values"),
        ({"features": {"observation.state": {"shape": [3]}}}, DataError, "expected 7 values"),
        ({"fps": 0, "features": {CAMERA: VIDEO}}, DataError, "fps 0"),
    ],
)
def test_what_cannot_be_read_says_why(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    root = dataset(tmp_path / "lab", [frames(0, 2, 0)], info(**changes))
    with pytest.raises(error, match=words):
        LeRobotSource(root, IntakeOptions())


def test_an_unknown_camera_is_named(tmp_path: Path) -> None:
    root = dataset(tmp_path / "lab", [frames(0, 2, 0)])
    with pytest.raises(DataError, match=CAMERA):
        LeRobotSource(root, IntakeOptions(camera="wrist"))
