"""The RealSense class: on a recording made by a software device, through the real SDK; and on a double that fails."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyrealsense2 as rs  # not importorskip: without it the camera is not tested, and that must be seen
import pytest
from numpy.typing import NDArray
from vendor_doubles.realsense_double import (
    BY_HAND,
    CHOSEN,
    MOST_FRAMES_OUT,
    SETTLED_AFTER,
    DeviceDouble,
    RealSenseDouble,
)

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.cameras.capture import LATENCY_FRAMES, CaptureTimes
from vlm2vla_client.cameras.realsense import RealSenseCamera, load_sdk
from vlm2vla_client.clock import SystemClock
from vlm2vla_client.errors import CameraError, ConfigurationError
from vlm2vla_schema.types import Frame

WIDTH, HEIGHT, FPS, FRAMES = 640, 480, 30, 75
CLOCK = SystemClock()


def numbered(number: int) -> NDArray[np.uint8]:
    """A picture that says which one it is, in columns that no two pictures share."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[:, :, 0] = number
    image[:, :, 1] = 255 - number
    image[:, :, 2] = np.arange(WIDTH, dtype=np.uint8)[None, :]
    return image


def record(path: Path) -> None:
    """FRAMES pictures at FPS from a software device into a .db3, all through the SDK."""
    device = rs.software_device()
    sensor = device.add_sensor("RGB Camera")
    intrinsics = rs.intrinsics()
    intrinsics.width, intrinsics.height, intrinsics.model = WIDTH, HEIGHT, rs.distortion.none
    stream = rs.video_stream()
    stream.type, stream.index, stream.uid, stream.fmt, stream.bpp = rs.stream.color, 0, 1, rs.format.rgb8, 3
    stream.width, stream.height, stream.fps, stream.intrinsics = WIDTH, HEIGHT, FPS, intrinsics
    profile = sensor.add_video_stream(stream, True)
    recorder = rs.recorder(str(path), device)
    recorded = recorder.query_sensors()[0]
    recorded.open(recorded.get_stream_profiles()[0])
    recorded.start(rs.frame_queue(FRAMES))
    images = [numbered(number) for number in range(FRAMES)]
    began_s = time.monotonic()
    for number, image in enumerate(images):
        time.sleep(max(began_s + number / FPS - time.monotonic(), 0.0))
        frame = rs.software_video_frame()
        frame.pixels, frame.stride, frame.bpp = image, 3 * WIDTH, 3
        frame.timestamp, frame.domain = 1000.0 * time.monotonic(), rs.timestamp_domain.hardware_clock
        frame.frame_number, frame.profile = number + 1, profile.as_video_stream_profile()
        sensor.on_video_frame(frame)
    recorded.stop()
    recorded.close()


def pictures_in(path: Path) -> int:
    """How many pictures the file holds: a .db3 is an SQLite database of ROS 2 messages."""
    query = "SELECT COUNT(*) FROM messages JOIN topics ON topic_id = topics.id WHERE name LIKE '%/image/data%'"
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute(query).fetchone()[0])


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for _ in range(5):  # the SDK's recorder leaves pictures out when the computer is too busy
        path = tmp_path_factory.mktemp("recording") / "colour.db3"
        record(path)
        if pictures_in(path) == FRAMES:
            break
    assert pictures_in(path) == FRAMES
    return path


@pytest.fixture
def opened() -> Iterator[Callable[..., RealSenseCamera]]:
    """Makes cameras and closes them at the end."""
    cameras: list[RealSenseCamera] = []

    def make(**options: Any) -> RealSenseCamera:
        cameras.append(RealSenseCamera(CLOCK, **options))
        return cameras[-1]

    yield make
    for camera in cameras:
        camera.close()


def stream_to_the_end(camera: RealSenseCamera) -> tuple[list[Frame], float]:
    """Every frame that ``after`` gives until the recording ends, and the seconds between the first and the last."""
    frames = [camera.latest(0.5, 5.0)]
    began_s = ended_s = time.monotonic()
    while True:
        try:
            frames.append(camera.after(frames[-1].stamp_s, 5.0))
            ended_s = time.monotonic()
        except CameraError as error:
            assert "ended" in str(error)
            return frames, ended_s - began_s


def test_a_recording_streams_at_full_rate_with_no_drop(
    recording: Path, opened: Callable[..., RealSenseCamera]
) -> None:
    # A computer that is too busy loses pictures in any program: the best of five plays counts.
    for _ in range(5):
        real: RealSenseCamera = opened(file=recording)
        camera: Camera = real
        camera.start()
        frames, seconds = stream_to_the_end(real)
        # The first ones may have passed while start() returned.
        numbers = [int(frame.image[0, 0, 0]) for frame in frames]
        if real.stats().captured == FRAMES and numbers == list(range(numbers[0], FRAMES)):
            break
    assert real.stats().captured == FRAMES and real.stats().lost == 0 and real.stats().reopened == 0
    assert numbers == list(range(numbers[0], FRAMES)) and numbers[0] <= 5
    assert seconds == pytest.approx((len(frames) - 1) / FPS, rel=0.15)
    assert [frame.frame_id for frame in frames] == sorted({frame.frame_id for frame in frames})
    stamps = [frame.stamp_s for frame in frames]
    assert stamps == sorted(stamps) and stamps[-1] < CLOCK.now_s()
    # Each picture was kept until now, and is still the one that it was; nobody can change it either.
    for frame in frames:
        assert np.array_equal(frame.image, numbered(int(frame.image[0, 0, 0])))
        with pytest.raises(ValueError, match="read-only"):
            frame.image[0, 0, 0] = 1


def test_the_warm_up_is_dropped(recording: Path, opened: Callable[..., RealSenseCamera]) -> None:
    camera = opened(file=recording, warmup_frames=30)
    camera.start()
    frames, _ = stream_to_the_end(camera)
    assert int(frames[0].image[0, 0, 0]) >= 30
    assert camera.stats().captured + camera.stats().lost <= FRAMES - 30


def test_after_its_end_a_recording_gives_nothing_old(recording: Path, opened: Callable[..., RealSenseCamera]) -> None:
    camera = opened(file=recording)
    camera.start()
    stream_to_the_end(camera)
    time.sleep(0.6)
    began_s = time.monotonic()
    with pytest.raises(CameraError, match=r"at most 0\.50 s old.*newest is \d+\.\d+ s old.*has ended"):
        camera.latest(0.5, 30.0)
    assert time.monotonic() - began_s < 10.0, "nothing more can come: there is nothing to wait for"


def test_a_recording_can_be_repeated(recording: Path, opened: Callable[..., RealSenseCamera]) -> None:
    camera = opened(file=recording, repeat=True)
    camera.start()
    until_s = time.monotonic() + 10 * FRAMES / FPS
    frame, number, before = camera.latest(0.5, 5.0), 0, -1
    while number > before and time.monotonic() < until_s:
        frame, before = camera.after(frame.stamp_s, 5.0), number
        number = int(frame.image[0, 0, 0])
    assert number < before and camera.stats().reopened == 0


def test_a_file_that_is_no_recording_says_so(tmp_path: Path, opened: Callable[..., RealSenseCamera]) -> None:
    with pytest.raises(ConfigurationError, match="no recording"):
        opened(file=tmp_path / "absent.db3")
    (tmp_path / "noise.db3").write_bytes(b"no recording at all")
    camera = opened(file=tmp_path / "noise.db3", timing={"start_timeout_s": 3.0})
    with pytest.raises(CameraError, match=r"noise\.db3 gave no picture .* cannot be started"):
        camera.start()


def number_of(frame: Frame) -> int:
    """The number that the double wrote into its picture."""
    return 256 * int(frame.image[0, 0, 0]) + int(frame.image[0, 0, 1])


@pytest.fixture
def device() -> DeviceDouble:
    return DeviceDouble("0123")


QUICK = {"stall_s": 0.5, "retry_s": 0.1, "start_timeout_s": 20.0}


def started(make: Callable[..., RealSenseCamera], *devices: DeviceDouble, **options: Any) -> RealSenseCamera:
    camera = make(sdk=RealSenseDouble(*devices), **{"timing": QUICK, **options})
    camera.start()
    return camera


def wait_for_frames_again(camera: RealSenseCamera) -> Frame:
    return camera.after(CLOCK.now_s(), 20.0)


def test_pictures_of_the_unsettled_exposure_are_never_seen(
    device: DeviceDouble, opened: Callable[..., RealSenseCamera]
) -> None:
    frame = started(opened, device).latest(0.5, 5.0)
    assert number_of(frame) > SETTLED_AFTER and int(frame.image[-1, -1, 0]) == 5 * SETTLED_AFTER


def test_frames_may_be_kept_without_stopping_the_stream(
    device: DeviceDouble, opened: Callable[..., RealSenseCamera]
) -> None:
    camera = started(opened, device)
    frames = [camera.latest(0.5, 5.0)]
    while len(frames) < 2 * MOST_FRAMES_OUT:
        frames.append(camera.after(frames[-1].stamp_s, 5.0))
    numbers = [number_of(frame) for frame in frames]
    assert numbers == sorted(set(numbers)), "one memory serves all of the SDK's frames"


@pytest.mark.clock
def test_a_stall_is_refused_at_once_and_survived(device: DeviceDouble, opened: Callable[..., RealSenseCamera]) -> None:
    camera = started(opened, device)
    device.stalled = True
    time.sleep(0.5)
    began_s = time.monotonic()
    with pytest.raises(CameraError, match=r"RealSense \S+ gave no picture at most 0\.30 s old within 0\.00 s"):
        camera.latest(0.3, 0.0)
    assert time.monotonic() - began_s < 0.3
    time.sleep(0.4)
    device.stalled = False
    frame = wait_for_frames_again(camera)
    assert CLOCK.now_s() - frame.stamp_s < 0.5
    assert device.starts >= 2 and camera.stats().reopened >= 1, "the pipeline was rebuilt"


def test_the_same_picture_again_is_a_stall(device: DeviceDouble, opened: Callable[..., RealSenseCamera]) -> None:
    camera = started(opened, device)
    device.frozen = True
    time.sleep(0.5)
    with pytest.raises(CameraError):
        camera.latest(0.3, 0.0)
    device.frozen = False
    wait_for_frames_again(camera)


def test_an_unplug_is_named_and_survived(device: DeviceDouble, opened: Callable[..., RealSenseCamera]) -> None:
    camera = started(opened, device)
    last = camera.latest(0.5, 5.0)
    device.unplug()
    time.sleep(1.5)
    began_s = time.monotonic()
    with pytest.raises(CameraError, match="no RealSense is connected"):
        camera.latest(0.5, 0.2)
    assert time.monotonic() - began_s < 2.0, "the SDK would wait 5 s for the device, three times"
    device.plug_in()
    frame = wait_for_frames_again(camera)
    assert frame.frame_id > last.frame_id and int(frame.image[-1, -1, 0]) == 5 * SETTLED_AFTER
    assert camera.stats().reopened == 1


def test_a_picture_that_came_late_is_as_old_as_it_is(
    device: DeviceDouble, opened: Callable[..., RealSenseCamera]
) -> None:
    camera = started(opened, device, timing={**QUICK, "stall_s": 5.0})
    assert CLOCK.now_s() - camera.latest(0.5, 5.0).stamp_s < 0.5
    device.late_s = 0.6
    time.sleep(0.9)
    taken, asked_s = device.taken, CLOCK.now_s()
    with pytest.raises(CameraError, match="old"):
        camera.latest(0.5, 0.2)
    assert device.taken > taken, "pictures came, but none was young enough"
    assert camera.after(asked_s, 10.0).stamp_s > asked_s
    assert CLOCK.now_s() - asked_s > 0.6, "a picture of before was not taken for one of after"


def test_a_set_without_colour_is_no_picture(device: DeviceDouble, opened: Callable[..., RealSenseCamera]) -> None:
    camera = started(opened, device)
    device.without_colour = True
    time.sleep(0.4)
    with pytest.raises(CameraError):
        camera.latest(0.3, 0.0)
    device.without_colour = False
    wait_for_frames_again(camera)


def test_the_exposure_is_locked_where_it_settled_and_to_the_same_after_a_replug(
    device: DeviceDouble, opened: Callable[..., RealSenseCamera]
) -> None:
    camera = started(opened, device, lock_exposure=True)
    assert {name: device.options[name] for name in CHOSEN} == CHOSEN
    assert device.options["enable_auto_exposure"] == device.options["enable_auto_white_balance"] == 0.0
    device.unplug()
    assert device.options["exposure"] == BY_HAND["exposure"]
    device.plug_in()
    wait_for_frames_again(camera)
    assert {name: device.options[name] for name in CHOSEN} == CHOSEN
    assert device.options["enable_auto_exposure"] == 0.0


def test_without_the_lock_the_automatics_stay_but_the_rate_is_kept(
    device: DeviceDouble, opened: Callable[..., RealSenseCamera]
) -> None:
    started(opened, device)
    assert device.options["enable_auto_exposure"] == 1.0 and device.options["auto_exposure_priority"] == 0.0


def test_the_camera_is_chosen_by_its_serial_number(opened: Callable[..., RealSenseCamera]) -> None:
    left, right = DeviceDouble("11"), DeviceDouble("22")
    started(opened, left, right, serial="22")
    assert (left.starts, right.starts) == (0, 1)
    hurry = {"start_timeout_s": 2.0, "retry_s": 0.1}
    with pytest.raises(CameraError, match=r"several RealSense are connected \(11, 22\)"):
        started(opened, left, right, timing=hurry)
    with pytest.raises(CameraError, match="33 is not connected; connected: 11, 22"):
        started(opened, left, right, serial="33", timing=hurry)


def test_a_camera_works_between_start_and_close(device: DeviceDouble, opened: Callable[..., RealSenseCamera]) -> None:
    camera = opened(sdk=RealSenseDouble(device))
    with pytest.raises(CameraError, match=r"call start\(\) first"):
        camera.latest(0.5, 0.0)
    camera.start()
    with pytest.raises(CameraError, match="started before"):
        camera.start()
    camera.close()
    camera.close()
    with pytest.raises(CameraError, match=r"call start\(\) first"):
        camera.after(0.0, 1.0)
    taken = device.taken
    time.sleep(0.2)
    assert device.taken == taken, "the thread is gone"


def test_the_real_sdk_without_a_camera_says_what_to_check(opened: Callable[..., RealSenseCamera]) -> None:
    camera = opened(serial="no such camera", timing={"start_timeout_s": 3.0})
    with pytest.raises(CameraError, match=r"not connected|no RealSense is connected"):
        camera.start()


def test_a_missing_driver_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_sdk() is rs
    monkeypatch.setitem(__import__("sys").modules, "pyrealsense2", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'vlm2vla-client\[realsense\]'"):
        load_sdk()


def test_device_times_become_the_clients() -> None:
    times = CaptureTimes(2.0 / FPS)
    late = [0.03, 0.01, 0.2, 0.01, 0.5]  # delivery of each picture beyond the latency
    stamps = [times.captured_s(number / FPS, 100.0 + number / FPS + late[number]) for number in range(5)]
    # The fastest delivery counts as no delay; nothing later than it is dated later than it was.
    expected = [100.0 + number / FPS + (0.03 if number == 0 else 0.01) - 2.0 / FPS for number in range(5)]
    assert stamps == pytest.approx(expected)
    assert times.captured_s(0.0, 200.0) == pytest.approx(200.0 - 2.0 / FPS), "the device's clock began anew"
    assert LATENCY_FRAMES == 2.0
