"""LeRobot datasets whose camera is a video; the files are written here with PyAV, whose decoder the reader uses."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from av.video.stream import VideoStream
from test_lerobot import CAMERA, VIDEO, dataset, frames, info

from vlm2vla_schema.images import decode_image
from vlm2vla_training.cli import main
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.lerobot import LeRobotSource
from vlm2vla_training.episodes.parquet import EpisodeDataset

FPS = 5
# Rows of three episodes, and where their video lies: the first two share a file.
LENGTHS, FILES, BEGINS = (7, 5, 4), (0, 0, 1), (0, 7, 0)


def write_video(path: Path, levels: Sequence[int], codec: str = "libx264") -> None:
    """A file of grey frames, one brightness each, in groups of ten with frames that are predicted from later ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 10
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def level(episode: int, frame: int) -> int:
    return 20 + 60 * episode + 8 * frame


def lab(folder: Path, codec: str = "libx264", **changes: Any) -> Path:
    """Three episodes; every row's brightness says to which it belongs."""
    rows = []
    for episode, length in enumerate(LENGTHS):
        for number, row in enumerate(frames(episode, length, 0)):
            del row[CAMERA]
            rows.append({**row, "timestamp": np.float32(number / FPS)})
    root = dataset(folder, [rows], info(features={CAMERA: VIDEO}, **changes))
    for file in sorted(set(FILES)):
        levels = [level(one, n) for one in range(3) if FILES[one] == file for n in range(LENGTHS[one])]
        write_video(root / "videos" / CAMERA / "chunk-000" / f"file-{file:03d}.mp4", levels, codec)
    places = [
        {
            "episode_index": one, f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": FILES[one],
            f"videos/{CAMERA}/from_timestamp": BEGINS[one] / FPS,
        }
        for one in range(3)
    ]  # fmt: skip
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(places), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    return root


def seen(episode: Episode) -> list[int]:
    return [round(float(decode_image(image).mean())) for image in episode.images]


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_every_row_has_the_frame_of_its_time(tmp_path: Path, codec: str) -> None:
    root = lab(tmp_path / "lab", codec)
    assert main(["ingest", "--format", "lerobot", "--input", str(root), "--out", str(tmp_path / "out")]) == 0
    episodes = list(EpisodeDataset(tmp_path / "out").episodes())
    assert [len(one) for one in episodes] == list(LENGTHS)
    for number, episode in enumerate(episodes):
        # Neighbours are 8 apart.
        assert seen(episode) == pytest.approx([level(number, frame) for frame in range(LENGTHS[number])], abs=3)


def test_episodes_may_be_read_in_any_order_and_left_before_the_end(tmp_path: Path) -> None:
    source = LeRobotSource(lab(tmp_path / "lab"), IntakeOptions())
    for _ in range(2):
        first = next(source.episodes())
        assert seen(first) == pytest.approx([level(0, frame) for frame in range(7)], abs=3)
    (last,) = source.episodes(frozenset({"lerobot/lab/0", "lerobot/lab/1"}))
    assert seen(last) == pytest.approx([level(2, frame) for frame in range(4)], abs=3)


def reasons(root: Path) -> tuple[list[str], list[str]]:
    """Keys that came through, and why the others did not."""
    source = LeRobotSource(root, IntakeOptions())
    keys = [one.key for one in source.episodes()]
    return keys, [f"{one['reason']}: {one['detail']}" for one in source.report.to_json()["named"]]


def test_an_episode_whose_video_is_short_broken_or_gone_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    root = lab(tmp_path / "lab")
    videos = root / "videos" / CAMERA / "chunk-000"
    write_video(videos / "file-000.mp4", [level(0, n) for n in range(7)] + [level(1, n) for n in range(4)])
    keys, why = reasons(root)
    assert keys == ["lerobot/lab/0", "lerobot/lab/2"]
    assert why == [f"unreadable episode: file-000.mp4 of {CAMERA} has no frame at 2.200 s"]
    (videos / "file-000.mp4").write_bytes(b"not a video" * 100)
    keys, why = reasons(root)
    assert keys == ["lerobot/lab/2"] and len(why) == 2 and "cannot be decoded" in why[0]
    (videos / "file-001.mp4").unlink()
    assert "not a file inside the dataset" in reasons(root)[1][2]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("../{video_key}/{file_index}.mp4", "not a file inside"), ("videos/{camera}.mp4", "is not a pattern")],
)
def test_a_video_is_a_file_inside_the_dataset(tmp_path: Path, pattern: str, said: str) -> None:
    root = lab(tmp_path / "lab", video_path=pattern)
    (tmp_path / CAMERA).mkdir()
    write_video(tmp_path / CAMERA / "0.mp4", [level(0, n) for n in range(12)])
    keys, why = reasons(root)
    assert not keys and all(said in one for one in why) and len(why) == 3
