"""The third-person camera of the twin: RGB pictures and, for training data and scoring only, segmentation.

Rendering is headless, by EGL where a driver is found and by OSMesa otherwise; the choice is made when the first
picture is asked for. One OpenGL context serves the whole process from a thread of its own, because a context belongs
to a thread.
"""

from __future__ import annotations

import ctypes.util
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import build_model

WIDTH, HEIGHT = 640, 480


class RenderingUnavailableError(RuntimeError):
    """Neither EGL nor OSMesa can give an OpenGL context on this machine."""


def _gl_context(width: int, height: int) -> Any:
    """An OpenGL context of the first backend that works; ``MUJOCO_GL`` (egl or osmesa) forces one."""
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    names = [wanted] if wanted in ("egl", "osmesa") else ["egl", "osmesa"]
    problems = []
    for name in names:
        if ctypes.util.find_library({"egl": "EGL", "osmesa": "OSMesa"}[name]) is None:
            problems.append(f"{name}: library not found")
            continue
        try:
            if name == "egl":
                from mujoco.egl import GLContext
            else:
                from mujoco.osmesa import GLContext
            context = GLContext(width, height)
            context.make_current()
        except Exception as error:  # the bindings raise whatever the driver's loader raised
            problems.append(f"{name}: {error}")
            os.environ.pop("PYOPENGL_PLATFORM", None)
            continue
        return context
    raise RenderingUnavailableError(
        "no headless OpenGL (" + "; ".join(problems) + "): apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri"
    )


class _Renderer:
    """An off-screen MuJoCo renderer that draws any world compiled from the kitchen's MJCF."""

    def __init__(self, width: int, height: int) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="twin-gl")
        self._size = (width, height)
        self._thread.submit(self._open).result(timeout=120)

    def _open(self) -> None:
        width, height = self._size
        self._gl = _gl_context(width, height)
        model = build_model()
        self._scene = mujoco.MjvScene(model, maxgeom=400)
        self._options = mujoco.MjvOption()
        self._view = mujoco.MjvCamera()
        self._view.type, self._view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._viewport = mujoco.MjrRect(0, 0, width, height)

    def draw(self, world: World, *, segmentation: bool = False) -> NDArray[Any]:
        """One picture, uint8 [H, W, 3]; with ``segmentation`` geom identities, int32 [H, W]."""
        return self._thread.submit(self._draw, world, segmentation).result(timeout=60)

    def _draw(self, world: World, segmentation: bool) -> NDArray[Any]:
        width, height = self._size
        self._gl.make_current()
        mujoco.mjv_updateScene(
            world.model, world.data, self._options, None, self._view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        flags = self._scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = segmentation
        flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = segmentation
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        picture = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(picture, None, self._viewport, self._context)
        if segmentation:
            return self._geom_ids(picture)
        return np.ascontiguousarray(picture[::-1])

    def _geom_ids(self, picture: NDArray[np.uint8]) -> NDArray[Any]:
        colour = picture[::-1].astype(np.int32) @ np.array([1, 256, 65536])
        table = np.full(self._scene.ngeom + 1, -1, dtype=np.int32)
        for index in range(self._scene.ngeom):
            geom = self._scene.geoms[index]
            if geom.segid >= 0 and geom.objtype == mujoco.mjtObj.mjOBJ_GEOM.value:
                table[geom.segid + 1] = geom.objid
        ids: NDArray[np.int32] = table[np.clip(colour, 0, self._scene.ngeom)]
        return ids


@cache
def _renderer(width: int, height: int) -> _Renderer:
    return _Renderer(width, height)


_OPENING = threading.Lock()  # of episodes that begin at once, one opens the context


class Camera:
    """The bench's D435 as seen by the policy: 640x480 RGB, vertical field of view 42.1 degrees.

    Args:
        world: the scene to look at.
        width, height: pixels; anything up to 640x480.
    """

    def __init__(self, world: World, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.world = world
        with _OPENING:
            self._renderer = _renderer(width, height)
        self._noise = np.random.default_rng(world.spec.seed)

    def rgb(self) -> NDArray[np.uint8]:
        """What the camera sees now, uint8 [H, W, 3]. Blocks for some 10 ms.

        Raises:
            RenderingUnavailableError: no headless OpenGL on this machine.
        """
        picture = self._renderer.draw(self.world)
        if self.world.spec.noise_std > 0.0:
            noisy = picture + self._noise.normal(0.0, self.world.spec.noise_std, picture.shape)
            picture = np.clip(noisy, 0, 255).astype(np.uint8)
        return picture

    def segmentation(self) -> NDArray[np.int32]:
        """MuJoCo geom id of every pixel, int32 [H, W], -1 for none. For training data and scoring, not for a policy."""
        return self._renderer.draw(self.world, segmentation=True)
