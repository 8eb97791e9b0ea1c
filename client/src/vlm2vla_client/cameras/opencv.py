"""OpenCV, which decodes video files and drives USB cameras (extra ``video``).

One library for both, under Apache-2.0: linuxpy (V4L2) is GPL, and it decodes no files.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.errors import ConfigurationError


def load_opencv() -> Any:
    """The module cv2.

    Raises:
        ConfigurationError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise ConfigurationError(
            f"video files and USB cameras need OpenCV: pip install 'vlm2vla-client[video]' ({error})"
        ) from None


def rgb(bgr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy with the channels in our order."""
    return np.array(bgr[:, :, ::-1], order="C")
