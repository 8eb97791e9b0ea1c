"""The baselines by their names."""

from __future__ import annotations

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.policies.act import MOLMOACT_IMAGE_SIZE, ActPeer
from vlm2vla_client.policies.baseline import BaselinePolicy
from vlm2vla_client.policies.openpi import OpenpiPeer

BASELINES = ("openvla", "ecot", "molmoact", "openpi")
UNNORM_KEY = "bridge_orig"
"""The name of BridgeData V2 in OpenVLA's and ECoT's statistics."""


def open_baseline(name: str, url: str | None, unnorm_key: str | None = None) -> BaselinePolicy:
    """The policy; nobody is asked yet.

    Args:
        name: one of ``BASELINES``.
        url: where its own server answers; http:// for ``/act``, ws:// for openpi.
        unnorm_key: None for ``UNNORM_KEY``; only OpenVLA and ECoT are sent one.

    Raises:
        ConfigurationError: an unknown name, no URL or another kind of URL, or a library that is not installed.
    """
    if name not in BASELINES:
        raise ConfigurationError(f"unknown baseline {name!r}; known are {', '.join(BASELINES)}")
    scheme = "ws" if name == "openpi" else "http"
    if url is None or not url.startswith((f"{scheme}://", f"{scheme}s://")):
        raise ConfigurationError(
            f"--policy {name} asks the model's own server: give --policy-server {scheme}://HOST:PORT"
        )
    if name == "openpi":
        return BaselinePolicy(OpenpiPeer(url), chunks=True)
    connection = ServerConnection(url)
    if name == "molmoact":
        peer = ActPeer(name, connection, image_size=MOLMOACT_IMAGE_SIZE, with_state=True)
        return BaselinePolicy(peer, chunks=True)
    return BaselinePolicy(ActPeer(name, connection, unnorm_key=unnorm_key or UNNORM_KEY), plans=name == "ecot")
