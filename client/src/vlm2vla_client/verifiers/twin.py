"""The verifier that asks the simulator: for measuring policies apart from verifiers, never for claims about either."""

from __future__ import annotations

from collections import OrderedDict

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.errors import VerifierError
from vlm2vla_schema.types import Frame, Verdict
from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks import Goal, task_done
from vlm2vla_twin.truth import Truth, observe, subtask_done

MAX_REMEMBERED = 512


class TruthCamera:
    """A camera that notes what was true when each picture was taken, so that a verifier can look it up by frame.

    Args:
        camera: takes the pictures.
        world: what they show.
    """

    def __init__(self, camera: Camera, world: World) -> None:
        self._camera = camera
        self._world = world
        self._truths: OrderedDict[str, Truth] = OrderedDict()

    def start(self) -> None:
        """Starts the inner camera."""
        self._camera.start()

    def latest(self, max_age_s: float, timeout_s: float) -> Frame:
        """The inner camera's newest frame."""
        return self._note(self._camera.latest(max_age_s, timeout_s))

    def after(self, stamp_s: float, timeout_s: float) -> Frame:
        """The inner camera's frame later than ``stamp_s``."""
        return self._note(self._camera.after(stamp_s, timeout_s))

    def close(self) -> None:
        """Closes the inner camera."""
        self._camera.close()

    def truth_of(self, frame: Frame) -> Truth | None:
        """What was true when ``frame`` was taken; None when that is forgotten."""
        return self._truths.get(frame.frame_id)

    def _note(self, frame: Frame) -> Frame:
        self._truths[frame.frame_id] = observe(self._world)
        while len(self._truths) > MAX_REMEMBERED:
            self._truths.popitem(last=False)
        return frame


class TwinVerifier:
    """Judges a subtask from the simulator's state before and after.

    Args:
        whole: an instruction and its goal. A policy that plans no subtasks has the instruction for its only one; read
            as a subtask, "put the carrot on the plate" would be done wherever the carrot is low.
    """

    name = "twin"
    checks = True

    def __init__(self, world: World, camera: TruthCamera, whole: tuple[str, Goal] | None = None) -> None:
        self._world = world
        self._camera = camera
        self._whole = whole

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        """The truth about ``subtask``; needs no picture."""
        truth = self._camera.truth_of(before)
        if truth is None:
            raise VerifierError("the frame before the chunk is not one of this run's")
        if self._whole is not None and subtask.casefold().strip() == self._whole[0].casefold().strip():
            return task_done(self._world, self._whole[1])
        return subtask_done(self._world, truth, subtask, next_subtask)

    def close(self) -> None:
        """Nothing to free."""
