"""Pictures that an operator names on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_schema.errors import ImageError
from vlm2vla_schema.images import decode_image


def read_picture(path: Path) -> NDArray[np.uint8]:
    """The picture in a file, uint8 [H, W, 3].

    Raises:
        ConfigurationError: no such file, or no picture that can be sent.
    """
    try:
        return decode_image(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except ImageError as error:
        raise ConfigurationError(f"{path} is not a picture that can be sent: {error}") from None
