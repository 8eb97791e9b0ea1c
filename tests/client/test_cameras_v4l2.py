"""The USB camera on a double of OpenCV's driver: order of colours, age, stall, unplug. Never run on a device here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vendor_doubles.opencv_double import OpenCvDouble, UsbCameraDouble

from vlm2vla_client.cameras.v4l2 import V4l2Camera
from vlm2vla_client.clock import SystemClock
from vlm2vla_client.errors import CameraError

CLOCK = SystemClock()


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A link such as those of /dev/v4l/by-id, to what stands for /dev/video3."""
    (tmp_path / "video3").touch()
    link = tmp_path / "usb-Some_Camera"
    link.symlink_to(tmp_path / "video3")
    return link


@pytest.fixture
def usb() -> UsbCameraDouble:
    return UsbCameraDouble()


@pytest.fixture
def camera(usb: UsbCameraDouble, device: Path) -> Iterator[V4l2Camera]:
    timing = {"stall_s": 1.0, "retry_s": 0.1, "start_timeout_s": 20.0}
    camera = V4l2Camera(CLOCK, device, warmup_frames=5, cv2=OpenCvDouble({3: usb}), timing=timing)
    camera.start()
    yield camera
    camera.close()


def test_pictures_are_rgb_and_as_old_as_they_are(usb: UsbCameraDouble, camera: V4l2Camera) -> None:
    frame = camera.latest(0.5, 5.0)
    assert tuple(int(value) for value in frame.image[0, 0]) == (10, 20, 30)
    assert usb.asked[OpenCvDouble.CAP_PROP_BUFFERSIZE] == 1
    usb.late_s = 0.3
    time.sleep(0.6)
    asked_s = CLOCK.now_s()
    assert camera.after(asked_s, 5.0).stamp_s > asked_s
    assert CLOCK.now_s() - asked_s > 0.3, "a picture of before was not taken for one of after"


@pytest.mark.clock
def test_a_stall_and_an_unplug_are_refused_in_time_and_survived(usb: UsbCameraDouble, camera: V4l2Camera) -> None:
    for begin, end in ((("stalled", True), ("stalled", False)), (("plugged", False), ("plugged", True))):
        opened = usb.opened
        setattr(usb, *begin)
        time.sleep(0.8)
        began_s = time.monotonic()
        with pytest.raises(CameraError, match=r"gives no pictures|cannot be opened|gave no picture"):
            camera.latest(0.5, 0.1)
        assert time.monotonic() - began_s < 0.4
        setattr(usb, *end)
        camera.after(CLOCK.now_s(), 20.0)
        assert usb.opened > opened
    assert usb.released >= usb.opened - 1, "each was let go before the next was opened"


def test_a_driver_without_stamps_still_gives_young_pictures(usb: UsbCameraDouble, camera: V4l2Camera) -> None:
    usb.stamps = False
    frame = camera.after(CLOCK.now_s(), 5.0)
    assert 0.0 < CLOCK.now_s() - frame.stamp_s < 1.0


def test_an_absent_or_busy_device_says_what_to_check(tmp_path: Path, usb: UsbCameraDouble) -> None:
    usb.plugged = False
    (tmp_path / "video3").touch()
    for path, expected in ((tmp_path / "video3", "another program"), (tmp_path / "video9", "plugged in")):
        camera = V4l2Camera(CLOCK, path, cv2=OpenCvDouble({3: usb}), timing={"start_timeout_s": 0.5})
        with pytest.raises(CameraError, match=expected):
            camera.start()
