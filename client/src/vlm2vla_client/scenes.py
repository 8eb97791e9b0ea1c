"""Which scene of the twin a task gets, and scenes as JSON so that a recording can be replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vlm2vla_client.errors import ConfigurationError, RecordingError
from vlm2vla_client.policies.base import Scenario
from vlm2vla_twin.scene import CardSpec, ObjectSpec, SceneSpec
from vlm2vla_twin.tasks import SUITES, Suite, kitchen_scene, match_task

KITCHEN = "kitchen"


@dataclass(frozen=True)
class SceneChoice:
    """A start condition and what goes with it.

    Attributes:
        name: the suite's name, or "kitchen".
        suite: whose judge scores the episode; None when nobody knows what success would be.
    """

    name: str
    spec: SceneSpec
    scenario: Scenario
    suite: Suite | None
    seed: int


def choose_scene(
    task: str, scene: str | None, seed: int, scenario: Scenario | None = None, mode: str = "varied"
) -> SceneChoice:
    """The suite whose instruction the task is, else the kitchen with everything in it and out_of_distribution.

    Args:
        scene: overrides the place (a suite's name or "kitchen"); the task still decides the judge.
        scenario: overrides the scenario.

    Raises:
        ConfigurationError: no scene of that name.
    """
    matched = match_task(task)
    if scene is not None and scene != KITCHEN and scene not in SUITES:
        raise ConfigurationError(f"unknown scene {scene!r}; known are {', '.join([KITCHEN, *SUITES])}")
    place = scene if scene is not None else matched.name if matched is not None else KITCHEN
    # The matched suite, not the table's: an instruction that names a card fixes that card in the scene.
    suite = matched if matched is not None and matched.name == place else SUITES.get(place)
    spec = suite.scene(seed, mode) if suite is not None else kitchen_scene(seed)
    default: Scenario = matched.scenario if matched is not None else "out_of_distribution"
    return SceneChoice(place, spec, scenario or default, matched, seed)


def scene_from_json(value: Any) -> SceneSpec:
    """The inverse of ``recorder.plain`` for a scene.

    Raises:
        RecordingError: not a recorded scene.
    """
    if not isinstance(value, Mapping):
        raise RecordingError("the recording holds no scene")
    known = {item.name for item in fields(SceneSpec)}
    try:
        given = {key: _tuples(item) for key, item in value.items() if key in known}
        given["objects"] = tuple(ObjectSpec(**_inner(item)) for item in value.get("objects", ()))
        given["cards"] = tuple(CardSpec(**_inner(item)) for item in value.get("cards", ()))
        given["extra"] = dict(value.get("extra", {}))
        return SceneSpec(**given)
    except (TypeError, ValueError) as error:
        raise RecordingError(f"the recorded scene cannot be rebuilt: {error}") from None


def _inner(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _tuples(value) for key, value in item.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
