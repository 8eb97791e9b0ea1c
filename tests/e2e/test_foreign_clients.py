"""Other people's clients drive the twin by our policy: OpenVLA's way over /act, openpi's own client by websocket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import pytest
import requests
from e2e_fixtures import ServerProcess
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from vlm2vla_client.policies.base import Policy
from vlm2vla_client.policies.baseline import BaselinePolicy, Look, Said
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import RecordedEpisode, read_episode
from vlm2vla_client.scenes import choose_scene
from vlm2vla_client.sim import SimBench, SimRequest, make_verifier, run_in_twin, run_parts

TASK, SEED = "pick up the carrot", 500_021
JUNK = "[0.1, 0.1, 0.1, 1.0]"


class Client:
    """What both have in common."""

    name = "theirs"
    image_size = 224

    def hello(self, timeout_s: float) -> dict[str, Any]:
        return {}

    def alive(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        """Nothing."""


class OpenVLAClient(Client):
    """The client that deploy.py describes: requests and json-numpy."""

    def __init__(self, url: str) -> None:
        self._url = url

    def act(self, look: Look, deadline_s: float) -> Said:
        payload = {"image": look.image, "instruction": look.instruction, "unnorm_key": "bridge_orig"}
        headers = {"content-type": "application/json"}
        answer = requests.post(self._url + "/act", json_numpy.dumps(payload), headers=headers, timeout=deadline_s)
        answer.raise_for_status()
        action = json_numpy.loads(answer.text)
        assert isinstance(action, np.ndarray) and action.shape == (7,)
        return Said(action)


class OpenpiClient(Client):
    """openpi-client, as it is."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._client = WebsocketClientPolicy(host, int(port))

    def act(self, look: Look, deadline_s: float) -> Said:
        observation = {"observation/image": look.image, "observation/state": look.state, "prompt": look.instruction}
        answer = self._client.infer(observation)
        return Said(answer["actions"], answer["motion_plan"])


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[float]]]:
    """The expert's chunks for this seed, rows of four numbers."""
    folder = tmp_path_factory.mktemp("expert") / "episode"
    request = SimRequest(task=TASK, choice=choose_scene(TASK, None, SEED), policy="expert", verifiers=("twin",))
    assert run_in_twin(request, folder, SilentProgress()).success
    return [event["rows"] for event in read_episode(folder).of("answer")]


def reciting(folder: Path, chunks: list[str]) -> ServerProcess:
    """Our server; its model says one plan, and these chunks one after the other."""
    texts = {
        "subtasks": "['Pick up Carrot', 'Rest']",
        "plans": {"": "Do it."},
        "actions": {"warm up": "[[0.0, 0.0, 0.0, 1.0]]", "Pick up Carrot": [*chunks, "[[0.0, 0.0, 0.0, 0.0]]"]},
    }
    return ServerProcess(folder, texts)


def episode(policy: Policy, folder: Path) -> RecordedEpisode:
    request = SimRequest(task=TASK, choice=choose_scene(TASK, None, SEED), verifiers=("twin",), animate=False)
    bench = SimBench.open(request.choice, {}, realtime=False)
    try:
        run_parts(request, bench, policy, make_verifier(request, bench), folder, SilentProgress())
    finally:
        bench.close()
    return read_episode(folder)


def driven(chunks: list[str], policy: Callable[[str], Policy], tmp_path: Path) -> RecordedEpisode:
    """The episode; made again, twice at most, when a starved computer let pictures or answers grow old: the model here
    reads out a list and cannot see that a row of it was not moved."""
    for number in range(3):
        server = reciting(tmp_path / f"server{number}", chunks)
        try:
            result = episode(policy(server.url), tmp_path / f"episode{number}")
        finally:
            server.close()
        events = (result.folder / "events.jsonl").read_text()
        if not any(words in events for words in ("stale_frame", "stale_answer", "s old (limit")):
            break
    assert result.summary is not None and result.summary["physics"]["success"] and result.summary["verified"]
    return result


def test_openvla_s_client_picks_the_carrot_up_one_first_row_at_a_time(
    expert: list[list[list[float]]], tmp_path: Path
) -> None:
    given = [row for chunk in expert for row in chunk]
    chunks = [f"[{row}, {JUNK}]" for row in given]
    result = driven(chunks, lambda url: BaselinePolicy(OpenVLAClient(url)), tmp_path)
    moved = [event["row"] for event in result.of("decision")]
    assert [[*row[:3], row[6]] for row in moved][: len(given)] == given
    assert not any(any(row[3:6]) for row in moved)


def test_openpi_s_client_picks_the_carrot_up_chunk_by_chunk(expert: list[list[list[float]]], tmp_path: Path) -> None:
    chunks = [str(chunk[at : at + 5]) for chunk in expert for at in range(0, len(chunk), 5)]
    result = driven(chunks, lambda url: BaselinePolicy(OpenpiClient(url), plans=True, chunks=True), tmp_path)
    assert result.summary is not None and set(result.summary["plans"]) == {"Do it."}
