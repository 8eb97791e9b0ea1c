"""pi-0.5 behind openpi's websocket (github.com/Physical-Intelligence/openpi, src/openpi/serving).

The server speaks first: its metadata. Then one observation gives one answer, msgpack maps both, with arrays as
``vlm2vla_schema.arrays`` describes them. A text frame is the traceback of a failure; the server closes after it. The
package openpi-client is not used: it needs numpy below 2, waits without end, and makes any array it is sent.

openpi has no configuration for BridgeData V2. One's own must read ``observation/image``, ``observation/state``
(Bridge's seven numbers) and ``prompt``, the names of its LIBERO policy, and give Bridge's rows in ``actions`` [N, 7].
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vla_client.errors import (
    ConfigurationError,
    EngineFailedError,
    PolicyError,
    ProtocolMismatchError,
    ServerUnreachableError,
)
from vlm2vla_client.policies.baseline import MAX_ROWS, ROW_WIDTH, Look, Said, silent
from vlm2vla_schema.arrays import FLOATS, from_msgpack, to_msgpack
from vlm2vla_schema.errors import ArrayError

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

IMAGE_SIZE = 224
CONNECT_TIMEOUT_S = 3.0
CLOSE_TIMEOUT_S = 1.0
MAX_ANSWER_BYTES = 4 << 20
_SHOWN_CHARS = 300


class OpenpiPeer:
    """openpi's policy server.

    Args:
        url: such as ``ws://gpu-box:8000``.
    """

    name = "openpi"
    image_size = IMAGE_SIZE

    def __init__(self, url: str) -> None:
        try:
            import msgpack
            import websockets.sync.client
        except ImportError as error:
            raise ConfigurationError(f"--policy openpi needs pip install 'vlm2vla-client[openpi]' ({error})") from None
        self._msgpack, self._websockets = msgpack, websockets
        self._url = url
        self._socket: ClientConnection | None = None
        self._open = contextlib.ExitStack()
        self._metadata: dict[str, Any] = {}

    def hello(self, timeout_s: float) -> dict[str, Any]:
        """The address and the server's metadata."""
        self._connected(timeout_s)
        return {"server": self._url, "protocol": "openpi", "metadata": repr(self._metadata)[:_SHOWN_CHARS]}

    def act(self, look: Look, deadline_s: float) -> Said:
        """One observation, one answer. After any failure the connection is made anew: a late answer has no name."""
        observation: dict[str, Any] = {"observation/image": to_msgpack(look.image), "prompt": look.instruction}
        if look.state is not None:
            observation["observation/state"] = to_msgpack(look.state)
        ends_s = time.monotonic() + deadline_s
        try:
            socket = self._connected(deadline_s)
            socket.send(self._msgpack.packb(observation))
            return self._read(socket.recv(timeout=max(ends_s - time.monotonic(), 0.0)))
        except PolicyError:
            self.close()
            raise
        except TimeoutError:
            self.close()
            raise ServerUnreachableError(f"{self._url}: no answer within {deadline_s:g} s", code="timeout") from None
        except (OSError, self._websockets.exceptions.WebSocketException) as error:
            self.close()
            raise ServerUnreachableError(
                f"{self._url}: connection lost ({type(error).__name__})", code="connection_lost"
            ) from error

    def _connected(self, timeout_s: float) -> ClientConnection:
        """The connection, made when there is none; the server's first message is its metadata."""
        if self._socket is not None:
            return self._socket
        try:
            connecting = self._websockets.sync.client.connect(
                self._url,
                compression=None,
                max_size=MAX_ANSWER_BYTES,
                open_timeout=min(timeout_s, CONNECT_TIMEOUT_S),
                close_timeout=CLOSE_TIMEOUT_S,
                proxy=None,
            )
            socket = self._open.enter_context(connecting)
        except (OSError, self._websockets.exceptions.WebSocketException):  # a TimeoutError is an OSError
            raise silent(self._url) from None
        self._socket = socket
        try:
            self._metadata = self._unpacked(socket.recv(timeout=timeout_s))
        except (OSError, self._websockets.exceptions.WebSocketException):
            self.close()
            raise ServerUnreachableError(f"{self._url} sent no metadata: is it openpi's?", code="timeout") from None
        except PolicyError:
            self.close()
            raise
        return socket

    def _read(self, message: str | bytes) -> Said:
        answer = self._unpacked(message)
        try:
            actions = from_msgpack(answer.get("actions"), FLOATS, MAX_ROWS * ROW_WIDTH)
        except ArrayError as error:
            raise ProtocolMismatchError(f"actions: {error}", code="bad_answer") from None
        timing = answer.get("server_timing")
        return Said(actions.astype(np.float64), None, {"server_timing": timing} if isinstance(timing, dict) else {})

    def _unpacked(self, message: str | bytes) -> dict[str, Any]:
        if isinstance(message, str):
            last = message.strip().rsplit("\n", 1)[-1][:_SHOWN_CHARS]
            raise EngineFailedError(f"openpi's server failed: {last}", code="peer_failed")
        try:
            value = self._msgpack.unpackb(message)
        except ValueError:
            raise ProtocolMismatchError("the message is not msgpack", code="bad_answer") from None
        if not isinstance(value, dict):
            raise ProtocolMismatchError(f"expected a map, received {type(value).__name__}", code="bad_answer")
        return value

    def alive(self, timeout_s: float) -> bool:
        """True when the server answers a ping in time."""
        socket = self._socket
        if socket is None:
            return False
        try:
            return socket.ping().wait(timeout_s)
        except (OSError, self._websockets.exceptions.WebSocketException):
            return False

    def close(self) -> None:
        """Closes the connection; the next question makes a new one."""
        self._socket = None
        with contextlib.suppress(OSError, self._websockets.exceptions.WebSocketException):
            self._open.close()
