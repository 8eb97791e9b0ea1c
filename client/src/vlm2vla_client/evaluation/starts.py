"""Pictures of start conditions: what a trial's bench should look like before the arm moves."""

from __future__ import annotations

from collections.abc import Iterable

from vlm2vla_client.errors import CameraError
from vlm2vla_client.evaluation.trials import Trial
from vlm2vla_schema.images import encode_jpeg, to_base64
from vlm2vla_twin.camera import Camera, RenderingUnavailableError
from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks import SUITES

THUMBNAIL = (320, 240)


def start_picture(suite: str, seed: int, mode: str, size: tuple[int, int] = (640, 480)) -> bytes:
    """JPEG of the twin's camera at the start of a trial, at most ``size`` (width, height) pixels.

    Raises:
        CameraError: no headless OpenGL on this machine.
    """
    try:
        return encode_jpeg(Camera(World(SUITES[suite].scene(seed, mode))).rgb(), *size)
    except RenderingUnavailableError as error:
        raise CameraError(str(error)) from error


def as_url(jpeg: bytes) -> str:
    """The picture inside a ``data:`` URL."""
    return f"data:image/jpeg;base64,{to_base64(jpeg)}"


def starts_of(trials: Iterable[Trial]) -> dict[str, tuple[str, str]]:
    """For each suite the start of its lowest seed in the twin, as a ``data:`` URL, and a caption."""
    first: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.seed):
        first.setdefault(trial.suite, trial)
    return {
        name: (
            as_url(start_picture(name, trial.seed, trial.mode, THUMBNAIL)),
            f"{SUITES[name].label}: {trial.task} (start {trial.seed})",
        )
        for name, trial in sorted(first.items(), key=lambda item: list(SUITES).index(item[0]))
    }
