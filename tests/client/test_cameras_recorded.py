"""Video files and folders of pictures as cameras; the flags that choose a camera; real pictures for the twin's arm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import cv2  # not importorskip: without it video files are not tested, and that must be seen
import numpy as np
import pytest

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.cameras.choose import CameraOptions, open_camera
from vlm2vla_client.cameras.images import ImagesCamera
from vlm2vla_client.cameras.realsense import RealSenseCamera
from vlm2vla_client.cameras.rehearsal import RehearsalCamera
from vlm2vla_client.cameras.v4l2 import V4l2Camera
from vlm2vla_client.cameras.video import VideoCamera
from vlm2vla_client.cli import main
from vlm2vla_client.clock import SystemClock
from vlm2vla_client.errors import CameraError, ConfigurationError
from vlm2vla_client.robots.twin import TwinClock
from vlm2vla_schema.images import decode_image, encode_jpeg
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import SceneSpec

CLOCK = SystemClock()
COUNT, FPS = 12, 20.0


def level(number: int) -> int:
    return 15 + 18 * number


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red pictures, each brighter than the one before."""
    path = tmp_path_factory.mktemp("video") / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (64, 48))
    for number in range(COUNT):
        image = np.zeros((48, 64, 3), dtype=np.uint8)
        image[:, :, 2] = level(number)
        writer.write(image)
    writer.release()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as pictures, and a file that is none."""
    path = tmp_path_factory.mktemp("frames")
    for number in range(COUNT):
        image = np.zeros((48, 64, 3), dtype=np.uint8)
        image[:, :, 0] = level(number)
        (path / f"{number:06d}.jpg").write_bytes(encode_jpeg(image))
    (path / "notes.txt").write_text("no picture")
    return path


def played(camera: Camera) -> tuple[list[int], float]:
    """Which pictures were seen until the end, and the seconds from the first to the last."""
    camera.start()
    try:
        frame = camera.latest(0.5, 5.0)
        numbers, began_s = [0], time.monotonic()
        while True:
            red, others = frame.image[:, :, 0].astype(float), frame.image[:, :, 1:].astype(float)
            assert others.mean() < 10, "red must stay red"
            numbers.append(round((red.mean() - 15) / 18))
            ended_s = time.monotonic()
            frame = camera.after(frame.stamp_s, 5.0)
    except CameraError as error:
        assert "ended" in str(error)
        return numbers[1:], ended_s - began_s
    finally:
        camera.close()


@pytest.mark.parametrize("kind", ["video", "images"])
def test_a_recording_is_played_in_order_at_its_own_pace(kind: str, video: Path, folder: Path) -> None:
    camera: Camera = VideoCamera(CLOCK, video) if kind == "video" else ImagesCamera(CLOCK, folder, fps=FPS)
    numbers, seconds = played(camera)
    assert numbers == sorted(set(numbers)) and numbers[0] <= 2 and numbers[-1] == COUNT - 1
    assert len(numbers) >= COUNT - 4, "a busy computer may miss a few"
    assert seconds >= (numbers[-1] - numbers[0] - 1) / FPS


def test_a_repeated_recording_goes_on(folder: Path) -> None:
    camera = ImagesCamera(CLOCK, folder, fps=40.0, repeat=True)
    camera.start()
    try:
        until_s = time.monotonic() + 20.0
        while camera.stats().captured < 3 * COUNT and time.monotonic() < until_s:
            camera.after(camera.latest(5.0, 5.0).stamp_s, 5.0)
        assert camera.stats().captured >= 3 * COUNT and camera.stats().reopened == 0
    finally:
        camera.close()


def test_what_cannot_be_played_says_why(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"no video at all")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.jpg").write_bytes(b"no picture")
    cases: list[tuple[Callable[[], Camera], str]] = [
        (lambda: VideoCamera(CLOCK, tmp_path / "noise.mp4"), "no video that can be read"),
        (lambda: ImagesCamera(CLOCK, tmp_path / "broken"), "not a picture that can be sent"),
    ]
    for make, expected in cases:
        camera, began_s = make(), time.monotonic()
        with pytest.raises(CameraError, match=expected):
            camera.start()
        assert time.monotonic() - began_s < 5.0, "waiting would not mend it"
    for refused, expected in (
        (lambda: VideoCamera(CLOCK, tmp_path / "absent.mp4"), "no video"),
        (lambda: ImagesCamera(CLOCK, tmp_path / "absent"), "no folder"),
        (lambda: ImagesCamera(CLOCK, tmp_path), "no picture in"),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            refused()


def test_flags_choose_the_camera(video: Path, folder: Path, tmp_path: Path) -> None:
    recording = tmp_path / "a.db3"
    recording.write_bytes(b"")
    for options, kind in (
        (CameraOptions("video", file=video), VideoCamera),
        (CameraOptions("images", file=folder, fps=2.0, repeat=True), ImagesCamera),
        (CameraOptions("realsense", serial="1", lock_exposure=True), RealSenseCamera),
        (CameraOptions("realsense", file=recording), RealSenseCamera),
        (CameraOptions("v4l2"), V4l2Camera),
    ):
        assert isinstance(open_camera(options, CLOCK), kind)
        assert options.plays_recording == (options.file is not None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (CameraOptions("video"), "needs --camera-file: a video"),
        (CameraOptions("images"), "needs --camera-file: a folder"),
        (CameraOptions("v4l2", serial="1"), "--camera-serial means nothing"),
        (CameraOptions("realsense", fps=3.0), "--camera-fps means nothing"),
        (CameraOptions("video", lock_exposure=True), "--camera-lock-exposure means nothing"),
        (CameraOptions("realsense", repeat=True), "give --camera-file too"),
        (CameraOptions("kinect"), "unknown camera"),
    ],
)
def test_flags_of_another_camera_are_refused(options: CameraOptions, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        open_camera(options, CLOCK)


def test_real_pictures_before_the_twins_arm_have_the_twins_time(folder: Path) -> None:
    clock = TwinClock(World(SceneSpec(seed=500_003)))
    camera: Camera = RehearsalCamera(ImagesCamera(CLOCK, folder, fps=10.0, repeat=True), CLOCK, clock)
    camera.start()
    try:
        clock.sleep_s(3.0)  # passes at once
        frame = camera.latest(0.5, 5.0)
        assert -0.01 <= clock.now_s() - frame.stamp_s <= 0.6
        asked_s, wall_s = clock.now_s(), time.monotonic()
        later = camera.after(asked_s, 5.0)
        assert later.stamp_s > asked_s and later.frame_id > frame.frame_id
        assert later.stamp_s <= clock.now_s() + 0.01 and time.monotonic() - wall_s < 5.0
    finally:
        camera.close()


def test_the_twins_arm_is_driven_by_the_pictures_of_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    camera = ["--camera", "images", "--camera-file", str(folder), "--camera-repeat"]
    others = ["--policy", "random", "--verifier", "none", "--max-cycles", "1", "--record", str(tmp_path), "--json"]
    assert main(["run", "--task", "pick up the carrot", "--sim", *camera, *others]) == 0
    episode = Path(json.loads(capsys.readouterr().out)["folder"])
    first = json.loads((episode / "events.jsonl").read_text().splitlines()[0])
    assert first["config"]["camera"] == "images" and first["config"]["robot"] == "twin"
    frames = sorted((episode / "frames").glob("*.jpg"))
    assert frames
    for path in frames:
        image = decode_image(path.read_bytes())
        assert image.shape == (48, 64, 3) and image[:, :, 1:].mean() < 10 and image[:, :, 0].std() < 5


def test_no_physical_arm_moves_by_a_recording(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    camera = ["--camera", "images", "--camera-file", str(folder)]
    assert main(["run", "--task", "t", "--robot", "widowx", "--verifier", "none", *camera]) == 2
    assert "shows the past" in capsys.readouterr().err
