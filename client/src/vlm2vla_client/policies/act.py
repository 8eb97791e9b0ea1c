"""Policies behind ``POST /act``: arrays as json-numpy objects in a JSON body.

OpenVLA (github.com/openvla/openvla, vla-scripts/deploy.py): {image, instruction, unnorm_key} gives an array [7], or a
JSON string of it to a caller who sent strings ("double-encoded"). The server writes the prompt and decodes greedily.
A failure is HTTP 200 with the JSON string "error".

ECoT (github.com/MichalZawalski/embodied-CoT): the same file; its ``predict_action`` returns the generated text beside
the array, which that server as published cannot send. Servers that do send it answer [array, text] or
{action, reasoning}; without it the policy still acts, but has no words to be scored by.

MolmoAct: github.com/allenai/molmoact holds no server. Those of its successor (allenai/molmoact2, examples) take
pictures, ``instruction`` and ``state`` and answer {actions: [N, D], dt_ms}, or {error} with a status; their client's
single-view body is the one sent here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.errors import EngineFailedError, ProtocolMismatchError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.policies.baseline import MAX_ROWS, ROW_WIDTH, Look, Said, silent
from vlm2vla_schema.arrays import FLOATS, from_json, to_json
from vlm2vla_schema.errors import ArrayError

OPENVLA_IMAGE_SIZE = 224  # experiments/robot/openvla_utils.py resizes to it on the client, as its training data were
MOLMOACT_IMAGE_SIZE = 256  # SimplerEnv/molmoact: image_size
MAX_REASONING_CHARS = 8000


class ActPeer:
    """A server that speaks ``/act``.

    Args:
        unnorm_key: whose statistics scale the numbers back to metres and radians; OpenVLA and ECoT need it.
        with_state: send the arm's pose too (MolmoAct).
    """

    def __init__(
        self,
        name: str,
        connection: ServerConnection,
        *,
        image_size: int = OPENVLA_IMAGE_SIZE,
        unnorm_key: str | None = None,
        with_state: bool = False,
    ) -> None:
        self.name = name
        self.image_size = image_size
        self._connection = connection
        self._unnorm_key = unnorm_key
        self._with_state = with_state

    def hello(self, timeout_s: float) -> dict[str, Any]:
        """The address; these servers say nothing about themselves."""
        if not self._connection.answers(timeout_s):
            raise silent(self._connection.url)
        return {"server": self._connection.url, "protocol": "act", "unnorm_key": self._unnorm_key}

    def act(self, look: Look, deadline_s: float) -> Said:
        """POST /act."""
        payload: dict[str, Any] = {"image": to_json(look.image), "instruction": look.instruction}
        if self._unnorm_key is not None:
            payload["unnorm_key"] = self._unnorm_key
        if self._with_state and look.state is not None:
            payload["state"] = to_json(look.state)
        return read_answer(self._connection.exchange("/act", json.dumps(payload).encode(), deadline_s))

    def alive(self, timeout_s: float) -> bool:
        """True when the server answers anything at all: it has no /healthz."""
        return self._connection.answers(timeout_s)

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


def read_answer(data: bytes) -> Said:
    """The body of a 200 of ``/act``, in any of the forms above.

    Raises:
        EngineFailedError: the server says that it failed.
        ProtocolMismatchError: it is none of those forms.
    """
    value = _parsed(data)
    if isinstance(value, str) and value != "error":
        value = _parsed(value)
    if value == "error" or (isinstance(value, Mapping) and "error" in value):
        raise EngineFailedError("the baseline's server failed on this request; its log says why", code="peer_failed")
    reasoning: object = None
    if isinstance(value, Mapping) and "__numpy__" not in value:
        value, reasoning = value.get("actions", value.get("action")), value.get("reasoning")
    elif isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
        value, reasoning = value
    return Said(_actions(value), _words(reasoning))


def _parsed(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolMismatchError("the answer of /act is not JSON", code="bad_json") from None


def _actions(value: object) -> NDArray[np.float64]:
    if isinstance(value, list):
        return _plain_list(value)
    try:
        return from_json(value, FLOATS, MAX_ROWS * ROW_WIDTH).astype(np.float64)
    except ArrayError as error:
        raise ProtocolMismatchError(f"the answer of /act: {error}", code="bad_answer") from None


def _plain_list(value: list[Any]) -> NDArray[np.float64]:
    """Numbers, or rows of numbers, from a server without json-numpy."""
    rows = value if value and isinstance(value[0], list) else [value]
    numbers = all(isinstance(row, list) and all(type(one) in (int, float) for one in row) for row in rows)
    if not numbers or len({len(row) for row in rows}) != 1 or len(rows) > MAX_ROWS or len(rows[0]) > ROW_WIDTH:
        raise ProtocolMismatchError(
            f"the answer of /act: expected {ROW_WIDTH} numbers, or at most {MAX_ROWS} rows of them", code="bad_shape"
        )
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError:
        raise ProtocolMismatchError("the answer of /act: a number is too large", code="bad_answer") from None


def _words(reasoning: object) -> str | None:
    """ECoT's words without the prompt that its text begins with and the action tokens that it ends with."""
    if reasoning is None:
        return None
    if not isinstance(reasoning, str):
        raise ProtocolMismatchError("the answer of /act: expected the reasoning as text", code="bad_answer")
    words = reasoning.rsplit("ASSISTANT:", 1)[-1].split("ACTION:", 1)[0].strip()
    return words[:MAX_REASONING_CHARS] or None
