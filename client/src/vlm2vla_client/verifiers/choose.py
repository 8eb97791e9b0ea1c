"""The chain of verifiers that the command line asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.verifiers.base import Verifier
from vlm2vla_client.verifiers.chain import ChainVerifier
from vlm2vla_client.verifiers.none import NoVerifier
from vlm2vla_client.verifiers.server import ServerVerifier


def make_chain(
    names: Sequence[str], connection: ServerConnection | None, model: str | None, ready: Mapping[str, Verifier]
) -> ChainVerifier:
    """Verifiers by their names, in their order.

    Args:
        connection: asked by ``server``.
        model: adapter that ``server`` asks, None for the server's default.
        ready: those that the caller made: ``gemini`` and ``human``, in a simulation ``twin``.

    Raises:
        ConfigurationError: one that is unknown, cannot be used here, or lacks its server.
    """
    members: list[Verifier] = []
    for name in names:
        if name in ready:
            members.append(ready[name])
        elif name == "none":
            members.append(NoVerifier())
        elif name != "server":
            usable = ", ".join(sorted({"server", "none", *ready}))
            raise ConfigurationError(f"the verifier {name!r} cannot be used here; usable are {usable}")
        elif connection is None:
            raise ConfigurationError("the verifier 'server' needs a server: give --server URL")
        else:
            members.append(ServerVerifier(connection, model=model))
    return ChainVerifier(members)
