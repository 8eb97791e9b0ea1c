"""What a trained policy does by itself, asked of a running server: `demos --policy URL` lets it act first.

A model that only ever saw the demonstrator's states does not know its own mistakes. Here the policy makes the first
attempt at a subtask and the demonstrator goes on from wherever that ended (DAgger, Ross et al. 2011, with the scripted
demonstrator as the expert). The log that results goes through `annotate` and `curate` like any other.
"""

from __future__ import annotations

import base64

import httpx

from vlm2vla_schema.messages import CycleResponse
from vlm2vla_training.errors import DataError

_TIMEOUT_S = 60.0
_UNPARSEABLE = 502


class Attempts:
    """Asks one server for cycles (`POST /cycle`).

    Args:
        url: of the server, such as http://localhost:8000.
        seed: of the sampling; each request takes the next.
    """

    def __init__(self, url: str, seed: int) -> None:
        self._client = httpx.Client(base_url=url, timeout=_TIMEOUT_S)
        self._seed = seed

    def rows(self, jpeg: bytes, subtask: str) -> list[list[float]]:
        """Rows [dx_m, dy_m, dz_m, gripper] for this picture and subtask; none when the answer could not be parsed.

        Raises:
            DataError: no server, or it answers with another error.
        """
        self._seed += 1
        body = {"image": base64.b64encode(jpeg).decode(), "subtask": subtask, "seed": self._seed}
        try:
            answer = self._client.post("/cycle", json=body)
        except httpx.HTTPError as error:
            raise DataError(f"the policy at {self._client.base_url} did not answer: {error}") from error
        if answer.status_code == _UNPARSEABLE:
            return []
        if answer.status_code != httpx.codes.OK:
            raise DataError(f"the policy at {self._client.base_url} answered {answer.status_code} to /cycle")
        try:
            return CycleResponse.model_validate(answer.json()).actions
        except ValueError as error:
            raise DataError(f"/cycle did not answer with a cycle: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
