"""The start of a trial laid over the live picture, so that a person can put every object back where it stood."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.evaluation.sheet import STARTS
from vlm2vla_client.pictures import read_picture

OVERLAY = "overlay.png"
FRAME_AGE_S, FRAME_TIMEOUT_S = 0.5, 3.0
EVERY_S = 0.5


def start_file(folder: Path, suite: str, start: int, *, photo: bool = False) -> Path:
    """The picture of a start: drawn by the twin, or photographed on the bench."""
    return folder / STARTS / f"{suite}-{start}{'-photo' if photo else ''}.{'png' if photo else 'jpg'}"


def reference_of(folder: Path, suite: str, start: int) -> tuple[NDArray[np.uint8], bool]:
    """What the bench should look like, uint8 [H, W, 3], and whether it is a photograph of the bench itself.

    The photograph that the first trial of a start left is preferred to the twin's drawing.

    Raises:
        ConfigurationError: the sheet has no picture of this start.
    """
    photo = start_file(folder, suite, start, photo=True)
    return (read_picture(photo), True) if photo.is_file() else (read_picture(start_file(folder, suite, start)), False)


def blend(reference: NDArray[np.uint8], live: NDArray[np.uint8], share: float = 0.5) -> NDArray[np.uint8]:
    """Both pictures at once, of the live one's size: the reference with ``share``, the live one with the rest.

    Raises:
        ConfigurationError: a share outside 0..1.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigurationError(f"the reference's share must lie between 0 and 1, received {share}")
    height, width = live.shape[:2]
    under = Image.fromarray(reference).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(Image.blend(Image.fromarray(live), under, share))


def difference(reference: NDArray[np.uint8], live: NDArray[np.uint8]) -> float:
    """Mean difference of the two pictures, 0 (the same) to 1, blurred so that noise does not count."""
    small = (64, 48)
    one, two = (
        np.asarray(Image.fromarray(picture).resize(small, Image.Resampling.BOX), dtype=np.float64)
        for picture in (reference, live)
    )
    return float(np.abs(one - two).mean() / 255.0)


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Writes a PNG so that whoever watches the file never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        Image.fromarray(picture).save(file, format="PNG")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def show(camera: Camera, reference: NDArray[np.uint8], path: Path, *, watch: bool, share: float = 0.5) -> float:
    """Writes the overlay of the newest frame; with ``watch`` again and again until Ctrl-C.

    Args:
        camera: not started; started and closed here.

    Returns:
        How different the last frame was from the reference (:func:`difference`).

    Raises:
        CameraError: no picture.
    """
    camera.start()
    try:
        while True:
            live = camera.latest(FRAME_AGE_S, FRAME_TIMEOUT_S).image
            save_picture(path, blend(reference, live, share))
            if not watch:
                return difference(reference, live)
            time.sleep(EVERY_S)
    finally:
        camera.close()


def photograph(camera: Camera, path: Path) -> None:
    """Keeps the live picture as the reference of later trials from the same start. Raises CameraError."""
    camera.start()
    try:
        save_picture(path, camera.latest(FRAME_AGE_S, FRAME_TIMEOUT_S).image)
    finally:
        camera.close()
