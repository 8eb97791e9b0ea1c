"""The toy kitchen as data, and as MJCF.

A :class:`SceneSpec` says what stands where; it is pure data, a function of a seed, and small enough to store beside
an episode. :func:`build_model` compiles one model that holds every object the kitchen knows. A
:class:`~vlm2vla_twin.physics.World` then places the objects a spec names and parks the others out of sight, so that a
thousand scenes cost one compilation.

Lengths are metres in the robot's base frame (+x forward, +y left, +z up); the counter's surface is z = 0. The arm is
the WidowX 250S of appendix D.2; every shape here is a primitive, and objects are held by friction alone.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field, replace

import mujoco
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vlm2vla_twin import kinematics

COUNTER_Z_M = 0.0
WALL_X_M = 0.56
START_POSITION_M = (0.30, 0.0, 0.15)
FINGER_CLOSED_M = 0.015
FINGER_OPEN_M = 0.037
TIMESTEP_S = 0.002

CAMERA_POSITION_M = (0.0, -0.16, 0.36)
CAMERA_XYAXES = (0.4839, -0.8751, 0.0, 0.6026, 0.3332, 0.7252)
CAMERA_FOVY_DEG = 42.1

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Kind:
    """What one kind of object is: its resting height above the counter, its colour, whether a gripper can hold it."""

    rest_z_m: float
    rgb: Rgb
    graspable: bool


KINDS: dict[str, Kind] = {
    "carrot": Kind(0.0141, (0.95, 0.45, 0.08), True),
    "eggplant": Kind(0.0161, (0.36, 0.10, 0.48), True),
    "banana": Kind(0.0121, (0.98, 0.87, 0.20), True),
    "fish": Kind(0.0141, (0.25, 0.58, 0.78), True),
    "plate": Kind(0.0041, (0.96, 0.82, 0.12), False),
    "pan": Kind(0.0031, (0.17, 0.17, 0.19), False),
}
CARDS = ("rocket", "cat", "flag", "tree", "star")
CARD_HALF_SIDE_M = 0.030


@dataclass(frozen=True)
class ObjectSpec:
    """One object: which (a key of :data:`KINDS`), where its centre rests and how it is turned about +z."""

    name: str
    position_m: tuple[float, float, float]
    yaw_rad: float = 0.0
    rgb: Rgb | None = None


@dataclass(frozen=True)
class CardSpec:
    """One picture card lying flat on the counter, its picture upright for somebody who stands behind the robot."""

    name: str
    xy_m: tuple[float, float]


@dataclass(frozen=True)
class SceneSpec:
    """Everything that makes one start condition. Defaults are the nominal bench of appendix D.1 and D.2."""

    seed: int
    objects: tuple[ObjectSpec, ...] = ()
    cards: tuple[CardSpec, ...] = ()
    start_position_m: tuple[float, float, float] = START_POSITION_M
    start_gripper_open: bool = True
    light: float = 1.0
    light_xy: tuple[float, float] = (0.0, 0.0)
    counter_rgb: Rgb = (0.72, 0.66, 0.58)
    wall_rgb: Rgb = (0.80, 0.83, 0.85)
    camera_offset_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    camera_rotation_rad: tuple[float, float, float] = (0.0, 0.0, 0.0)
    noise_std: float = 0.0
    camera_latency_s: float = 0.0
    extra: dict[str, str] = field(default_factory=dict)

    def object(self, name: str) -> ObjectSpec:
        """The object called ``name``; ``KeyError`` if the scene has none."""
        for item in self.objects:
            if item.name == name:
                return item
        raise KeyError(f"scene {self.seed} has no {name!r}; it has {[item.name for item in self.objects]}")


@dataclass(frozen=True)
class Bench:
    """What stands fast around the arm, metres in its base frame: the counter's height, the wall, boxes that are in the way.

    ``boxes``: pairs of opposite corners (minimum, maximum).
    """

    counter_z_m: float = COUNTER_Z_M
    wall_x_m: float = WALL_X_M
    boxes: tuple[tuple[tuple[float, float, float], tuple[float, float, float]], ...] = ()


KITCHEN = Bench()


def resting(name: str, xy_m: tuple[float, float], yaw_rad: float = 0.0, rgb: Rgb | None = None) -> ObjectSpec:
    """An object of kind ``name`` at rest on the counter."""
    return ObjectSpec(name, (float(xy_m[0]), float(xy_m[1]), COUNTER_Z_M + KINDS[name].rest_z_m), float(yaw_rad), rgb)


def vary(spec: SceneSpec, rng: np.random.Generator, *, move_start: bool = True) -> SceneSpec:
    """The same scene under another light, camera pose and colours, within the ranges of the twin's design.

    Light +-30 %, camera +-5 mm and +-1 degree, start pose +-1 cm, colours within a narrow band.
    """

    def band(rgb: Rgb, width: float) -> Rgb:
        r, g, b = np.clip(np.asarray(rgb) + rng.uniform(-width, width, 3), 0.0, 1.0)
        return (float(r), float(g), float(b))

    start = np.asarray(spec.start_position_m) + (rng.uniform(-0.01, 0.01, 3) if move_start else 0.0)
    return replace(
        spec,
        objects=tuple(replace(item, rgb=band(item.rgb or KINDS[item.name].rgb, 0.05)) for item in spec.objects),
        start_position_m=(float(start[0]), float(start[1]), float(start[2])),
        light=float(rng.uniform(0.7, 1.3)),
        light_xy=(float(rng.uniform(-0.4, 0.4)), float(rng.uniform(-0.4, 0.4))),
        counter_rgb=band(spec.counter_rgb, 0.08),
        wall_rgb=band(spec.wall_rgb, 0.08),
        camera_offset_m=_triple(rng.uniform(-0.005, 0.005, 3)),
        camera_rotation_rad=_triple(rng.uniform(-1.0, 1.0, 3) * np.pi / 180.0),
    )


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return (float(values[0]), float(values[1]), float(values[2]))


# --- MJCF -----------------------------------------------------------------------------------------------------------


def _card_png(name: str) -> bytes:
    """The picture on one card, drawn here so that nothing has to be licensed."""
    image = Image.new("RGB", (128, 128), (250, 250, 246))
    draw = ImageDraw.Draw(image)
    if name == "rocket":
        image.paste((24, 32, 72), (0, 0, 128, 128))
        draw.polygon([(64, 8), (88, 52), (40, 52)], fill=(235, 60, 60))
        draw.rectangle((42, 50, 86, 96), fill=(240, 240, 245))
        draw.polygon([(42, 72), (16, 106), (42, 96)], fill=(235, 60, 60))
        draw.polygon([(86, 72), (112, 106), (86, 96)], fill=(235, 60, 60))
        draw.polygon([(50, 96), (78, 96), (64, 124)], fill=(255, 190, 40))
    elif name == "cat":
        image.paste((190, 225, 190), (0, 0, 128, 128))
        draw.polygon([(24, 14), (56, 44), (18, 60)], fill=(60, 60, 66))
        draw.polygon([(104, 14), (72, 44), (110, 60)], fill=(60, 60, 66))
        draw.ellipse((18, 32, 110, 118), fill=(60, 60, 66))
        draw.ellipse((38, 60, 54, 80), fill=(240, 230, 60))
        draw.ellipse((74, 60, 90, 80), fill=(240, 230, 60))
    elif name == "flag":
        for index, colour in enumerate(((30, 90, 200), (250, 250, 250), (30, 160, 90))):
            draw.rectangle((0, index * 43, 128, index * 43 + 43), fill=colour)
        draw.ellipse((44, 44, 84, 84), fill=(230, 40, 60))
    elif name == "tree":
        image.paste((200, 225, 250), (0, 0, 128, 128))
        draw.rectangle((54, 84, 74, 126), fill=(120, 78, 40))
        draw.ellipse((18, 8, 110, 94), fill=(30, 140, 50))
    else:
        image.paste((120, 30, 60), (0, 0, 128, 128))
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 58, 24)
        points = [(64 + r * np.cos(a), 66 + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]
        draw.polygon(points, fill=(255, 225, 80))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


_SOFT = 'friction="0.8 0.01 0.002" condim="6" solref="0.006 1"'


def _objects_xml() -> str:
    """The free bodies. Only ``*_g`` geoms collide; the rest is looks."""
    pan_rim = "".join(
        f'<geom name="pan_r{i}_g" class="obj" type="box" size="0.032 0.003 0.007" '
        f'pos="{0.070 * np.cos(a):.5f} {0.070 * np.sin(a):.5f} 0.008" euler="0 0 {a + np.pi / 2:.5f}" mass="0.01"/>'
        for i, a in enumerate(np.arange(8) * np.pi / 4)
    )
    return f"""
    <body name="carrot"><freejoint/>
      <geom name="carrot_g" class="obj" type="capsule" size="0.014 0.010" euler="0 1.5708 0" mass="0.03"/>
      <geom name="carrot_top" class="look" type="ellipsoid" size="0.009 0.006 0.006" pos="0.028 0 0.003"
        rgba="0.2 0.62 0.2 1"/>
    </body>
    <body name="eggplant"><freejoint/>
      <geom name="eggplant_g" class="obj" type="capsule" size="0.016 0.009" euler="0 1.5708 0" mass="0.03"/>
      <geom name="eggplant_top" class="look" type="ellipsoid" size="0.006 0.010 0.010" pos="0.024 0 0"
        rgba="0.2 0.5 0.2 1"/>
    </body>
    <body name="banana"><freejoint/>
      <geom name="banana_g" class="obj" type="capsule" size="0.012" fromto="-0.026 -0.006 0 0 0.004 0" mass="0.015"/>
      <geom name="banana_h_g" class="obj" type="capsule" size="0.012" fromto="0 0.004 0 0.026 -0.006 0" mass="0.015"/>
    </body>
    <body name="fish"><freejoint/>
      <geom name="fish_g" class="obj" type="capsule" size="0.014 0.010" euler="0 1.5708 0" mass="0.03"/>
      <geom name="fish_tail" class="look" type="box" size="0.010 0.013 0.004" pos="-0.032 0 0" rgba="0.15 0.40 0.60 1"/>
      <geom name="fish_eye" class="look" type="sphere" size="0.004" pos="0.018 0 0.012" rgba="0.95 0.95 0.95 1"/>
    </body>
    <body name="plate"><freejoint/>
      <geom name="plate_g" class="obj" type="cylinder" size="0.062 0.004" mass="0.40"/>
      <geom name="plate_ring" class="look" type="cylinder" size="0.040 0.0002" pos="0 0 0.0041" rgba="0.90 0.74 0.06 1"/>
    </body>
    <body name="pan"><freejoint/>
      <geom name="pan_g" class="obj" type="cylinder" size="0.074 0.003" mass="0.50"/>{pan_rim}
      <geom name="pan_handle_g" class="obj" type="box" size="0.040 0.009 0.005" pos="0.112 0 0.010" mass="0.02"/>
    </body>"""


def _arm_xml() -> str:
    """The WidowX 250S: link offsets and limits of Interbotix, primitive shapes."""
    low, high = kinematics.JOINT_LOWER_RAD, kinematics.JOINT_UPPER_RAD

    def joint(index: int, axis: str) -> str:
        return (
            f'<joint name="{kinematics.JOINT_NAMES[index]}" axis="{axis}" range="{low[index]:.5f} {high[index]:.5f}" '
            f'limited="true" damping="4" armature="0.10"/>'
        )

    def finger(side: str, sign: int) -> str:
        return f"""
        <body name="{side}_finger"><inertial pos="0.08 0 0" mass="0.02" diaginertia="1e-5 1e-5 1e-5"/>
          <joint name="{side}_finger" type="slide" axis="0 {sign} 0" range="{FINGER_CLOSED_M} {FINGER_OPEN_M}"
            damping="8" armature="0.05"/>
          <geom name="{side}_pad" class="pad" type="box" size="0.0125 0.005 0.009" pos="0.081 {-0.001 * sign} 0"/>
          <geom class="arm" type="box" size="0.018 0.004 0.010" pos="0.052 {0.002 * sign} 0"/>
        </body>"""

    return f"""
    <body name="base_link"><geom class="arm" type="cylinder" size="0.055 0.035" pos="0 0 0.035"/>
      <body name="shoulder_link" pos="0 0 0.072" gravcomp="1">{joint(0, "0 0 1")}
        <geom class="arm" type="cylinder" size="0.040 0.022" pos="0 0 0.02" mass="0.5"/>
        <body name="upper_arm_link" pos="0 0 0.03865" gravcomp="1">{joint(1, "0 1 0")}
          <geom class="arm" type="capsule" size="0.024" fromto="0 0 0 0.0 0 0.25" mass="0.6"/>
          <geom class="arm" type="capsule" size="0.022" fromto="0 0 0.25 0.04975 0 0.25" mass="0.2"/>
          <body name="upper_forearm_link" pos="0.04975 0 0.25" gravcomp="1">{joint(2, "0 1 0")}
            <geom class="arm" type="capsule" size="0.022" fromto="0 0 0 0.12 0 0" mass="0.3"/>
            <body name="lower_forearm_link" pos="0.175 0 0" gravcomp="1">{joint(3, "1 0 0")}
              <geom class="arm" type="capsule" size="0.020" fromto="-0.04 0 0 0.06 0 0" mass="0.2"/>
              <body name="wrist_link" pos="0.075 0 0" gravcomp="1">{joint(4, "0 1 0")}
                <geom class="arm" type="capsule" size="0.019" fromto="0 0 0 0.045 0 0" mass="0.15"/>
                <body name="gripper_link" pos="0.065 0 0" gravcomp="1">{joint(5, "1 0 0")}
                  <geom class="arm" type="box" size="0.022 0.034 0.018" pos="0.012 0 0" mass="0.15"/>
                  <site name="ee" pos="0.093575 0 0" size="0.002" rgba="0 0 0 0"/>
                  {finger("left", 1)}{finger("right", -1)}
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>
    </body>"""


def _fixtures_xml(bench: Bench) -> str:
    """The counter, the wall and the boxes: all that stands fast and collides."""
    z_m = bench.counter_z_m
    boxes = ""
    for index, (low, high) in enumerate(bench.boxes):
        size = _join(_triple((np.asarray(high) - np.asarray(low)) / 2))
        middle = _join(_triple((np.asarray(low) + np.asarray(high)) / 2))
        boxes += f'<geom name="box_{index}" type="box" size="{size}" pos="{middle}" {_SOFT}/>'
    return f"""<geom name="counter" type="box" size="0.6 0.7 0.02" pos="0.25 0 {z_m - 0.02}" {_SOFT}/>
    <geom name="wall" type="box" size="0.02 0.7 0.3" pos="{bench.wall_x_m + 0.02} 0 {z_m + 0.28}" {_SOFT}/>{boxes}"""


def build_xml(bench: Bench = KITCHEN) -> str:
    """The MJCF of the whole kitchen, arm included, with every object that a spec may place."""
    cards = "".join(
        f'<body name="card_{name}" pos="-2 0 -1"><geom name="card_{name}" class="look" type="box" euler="0 0 -1.5708" '
        f'size="{CARD_HALF_SIDE_M} {CARD_HALF_SIDE_M} 0.0006" material="card_{name}"/></body>'
        for name in CARDS
    )
    textures = "".join(
        f'<texture name="card_{name}" type="2d" file="{name}.png"/>'
        f'<material name="card_{name}" texture="card_{name}" specular="0"/>'
        for name in CARDS
    )
    actuators = "".join(
        f'<position name="{name}" joint="{name}" kp="900" kv="60" forcerange="-60 60"/>'
        for name in kinematics.JOINT_NAMES
    ) + "".join(
        f'<position name="{side}_finger" joint="{side}_finger" kp="1500" kv="20" forcerange="-14 14"/>'
        for side in ("left", "right")
    )
    return f"""<mujoco model="toy_kitchen">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP_S}" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual><quality shadowsize="0" offsamples="0"/><global offwidth="640" offheight="480"/>
    <headlight ambient="0.32 0.32 0.32" diffuse="0.35 0.35 0.35" specular="0 0 0"/><map znear="0.02"/></visual>
  <asset>{textures}</asset>
  <default>
    <default class="obj"><geom {_SOFT} contype="1" conaffinity="1" group="1"/></default>
    <default class="look"><geom contype="0" conaffinity="0" mass="0.0001" group="1"/></default>
    <default class="arm"><geom rgba="0.13 0.13 0.15 1" contype="2" conaffinity="1" group="2" mass="0.05"/></default>
    <default class="pad"><geom rgba="0.80 0.82 0.86 1" friction="2 0.05 0.002" priority="1" condim="6" contype="2"
      conaffinity="1" solref="0.006 1" group="2" mass="0.02"/></default>
  </default>
  <worldbody>
    <light name="lamp" directional="true" pos="0 0 2" dir="0 0 -1" diffuse="0.55 0.55 0.55" specular="0.05 0.05 0.05"/>
    <camera name="third_person" pos="{_join(CAMERA_POSITION_M)}" xyaxes="{_join(CAMERA_XYAXES)}"
      fovy="{CAMERA_FOVY_DEG}"/>
    {_fixtures_xml(bench)}
    <geom name="sink_edge" class="look" type="box" size="0.14 0.006 0.003" pos="0.34 0.33 0.001"
      rgba="0.75 0.77 0.80 1"/>
    <geom name="stove" class="look" type="box" size="0.09 0.09 0.0015" pos="0.46 0.24 0.0008" rgba="0.32 0.32 0.34 1"/>
    {_arm_xml()}{_objects_xml()}{cards}
  </worldbody>
  <actuator>{actuators}</actuator>
</mujoco>"""


def _join(values: tuple[float, ...]) -> str:
    return " ".join(str(value) for value in values)


@functools.cache
def build_model(bench: Bench = KITCHEN) -> mujoco.MjModel:
    """The compiled kitchen, once a process and bench. Treat it as read-only; a ``World`` works on its own copy."""
    return mujoco.MjModel.from_xml_string(build_xml(bench), {f"{name}.png": _card_png(name) for name in CARDS})
