from __future__ import annotations

from dataclasses import replace

import numpy as np
from twin_drive import scene

from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import KINDS

BENCH = scene(("carrot", 0.30, 0.12), ("plate", 0.36, -0.08), seed=3)


def pixels_of(camera: Camera, name: str) -> int:
    model = camera.world.model
    geoms = [index for index in range(model.ngeom) if model.geom(index).name.startswith(f"{name}_")]
    return int(np.isin(camera.segmentation(), geoms).sum())


def test_a_picture_has_the_benchs_size_and_shows_something() -> None:
    picture = Camera(World(BENCH)).rgb()
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8
    assert picture.flags["C_CONTIGUOUS"]
    assert float(picture.std()) > 20.0


def test_the_same_scene_gives_the_same_bytes() -> None:
    one, other = Camera(World(BENCH)), Camera(World(BENCH))
    assert np.array_equal(one.rgb(), other.rgb())
    assert np.array_equal(one.rgb(), one.rgb()), "a picture taken twice"


def test_worlds_do_not_see_each_other() -> None:
    first = Camera(World(BENCH))
    before = first.rgb()
    Camera(World(replace(scene(("fish", 0.25, 0.0)), light=1.3))).rgb()
    assert np.array_equal(first.rgb(), before)


def test_light_makes_it_brighter() -> None:
    dark, bright = (Camera(World(replace(BENCH, light=light))).rgb().mean() for light in (0.7, 1.3))
    assert bright > dark + 10.0


def test_noise_is_drawn_afresh_and_repeats_from_the_seed() -> None:
    noisy = replace(BENCH, noise_std=8.0)
    camera = Camera(World(noisy))
    first, second = camera.rgb(), camera.rgb()
    assert not np.array_equal(first, second)
    assert np.array_equal(Camera(World(noisy)).rgb(), first)
    assert 4.0 < float((first.astype(float) - second).std()) < 16.0


def test_segmentation_names_what_is_there_and_nothing_else() -> None:
    camera = Camera(World(BENCH))
    ids = camera.segmentation()
    assert ids.shape == (480, 640) and ids.dtype == np.int32
    assert int(ids.min()) >= -1 and int(ids.max()) < camera.world.model.ngeom
    assert pixels_of(camera, "carrot") > 150
    assert pixels_of(camera, "plate") > 1500
    assert [pixels_of(camera, name) for name in KINDS if name not in ("carrot", "plate")] == [0, 0, 0, 0]


def test_the_carrots_pixels_are_orange() -> None:
    camera = Camera(World(BENCH))
    carrot = camera.segmentation() == camera.world.model.geom("carrot_g").id
    red, green, blue = camera.rgb()[carrot].mean(axis=0)
    assert red > green + 40 and green > blue


def test_a_smaller_picture_shows_the_same() -> None:
    world = World(BENCH)
    small, large = Camera(world, 320, 240).rgb(), Camera(world).rgb()
    assert small.shape == (240, 320, 3)
    halved = large.reshape(240, 2, 320, 2, 3).mean(axis=(1, 3))
    assert float(np.abs(halved - small).mean()) < 5.0
