"""The twin's camera: fresh frames, stamps, deadlines."""

import numpy as np
import pytest

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.cameras.twin import TwinCamera
from vlm2vla_client.errors import CameraError
from vlm2vla_client.robots.twin import TwinClock, TwinRobot
from vlm2vla_twin.kinematics import DOWN
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import SceneSpec


def bench() -> tuple[World, TwinClock, TwinCamera]:
    world = World(SceneSpec(seed=500_002))
    clock = TwinClock(world)
    return world, clock, TwinCamera(world, clock)


def test_frames_show_the_world_of_their_stamp() -> None:
    world, clock, twin_camera = bench()
    camera: Camera = twin_camera
    camera.start()
    robot = TwinRobot(world, clock)
    robot.connect()
    asked_s = clock.now_s()
    first = camera.latest(0.5, 1.0)
    assert first.image.shape == (480, 640, 3) and first.image.dtype == np.uint8 and first.image.std() > 10
    assert asked_s <= first.stamp_s <= clock.now_s()
    robot.command(np.asarray(robot.state().ee_position_m) + np.array([0.05, 0.05, 0.0]), DOWN, 0.3)
    clock.sleep_s(0.5)
    second = camera.latest(0.5, 1.0)
    assert second.frame_id != first.frame_id and second.stamp_s > first.stamp_s
    assert int((np.abs(second.image.astype(int) - first.image).max(axis=2) > 30).sum()) > 200


def test_after_gives_a_later_frame_and_waits_no_longer_than_asked() -> None:
    world, clock, camera = bench()
    camera.start()
    stamp_s = clock.now_s() + 0.3
    frame = camera.after(stamp_s, 1.0)
    assert frame.stamp_s > stamp_s and world.time_s == pytest.approx(0.3, abs=0.05)
    assert camera.after(frame.stamp_s, 1.0).stamp_s > frame.stamp_s
    with pytest.raises(CameraError, match="ahead"):
        camera.after(clock.now_s() + 5.0, 1.0)


def test_a_camera_that_was_not_started_says_so() -> None:
    _, _, camera = bench()
    with pytest.raises(CameraError, match="start"):
        camera.latest(0.5, 1.0)
    camera.start()
    camera.close()
    camera.close()
    with pytest.raises(CameraError, match="start"):
        camera.latest(0.5, 1.0)
