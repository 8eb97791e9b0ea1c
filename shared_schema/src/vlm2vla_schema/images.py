"""The only resize and JPEG code: client, server and training all pass through these functions.

Arrays are uint8 [H, W, 3], RGB.
"""

from __future__ import annotations

import binascii
import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pybase64
from numpy.typing import NDArray
from PIL import Image

from vlm2vla_schema.errors import ImageError

JPEG_QUALITY = 95
MAX_WIDTH = 640
MAX_HEIGHT = 480
MAX_PIXELS = 16_777_216
"""Default limit of `decode_image`: 4096 x 4096; a camera frame is 640 x 480."""

_MAX_JPEG_SCANS = 100
_STRIPS = 4
_STRIPS_FROM_PX = 448  # below, threads cost more than they save: measured for 112, also with two of them
_FORMATS = ("JPEG", "PNG", "WEBP")
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr"})
_Box: TypeAlias = tuple[int, int, int, int]
_DATA_URL = re.compile(r"data:[A-Za-z0-9!#$&^_.+/;=-]{0,100};base64,")


def encode_jpeg(rgb: NDArray[np.uint8], max_width: int = MAX_WIDTH, max_height: int = MAX_HEIGHT) -> bytes:
    """Encode as JPEG, quality 95, 4:4:4, after shrinking (Lanczos, aspect kept, never enlarged) to fit the limits.

    Raises:
        ImageError: not a uint8 [H, W, 3] array.
    """
    image = Image.fromarray(_checked(rgb))
    scale = min(max_width / image.width, max_height / image.height, 1.0)
    if scale < 1.0:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode JPEG, PNG or WebP bytes to uint8 [H, W, 3], RGB; transparency is dropped, of several images the first.

    The size is read from the header and checked before any pixel is decoded.

    Raises:
        ImageError: another format, more than `max_pixels`, truncated or damaged data, or more than 8 bits a channel.
    """
    return _decoded(data, max_pixels, lambda image: np.array(image, dtype=np.uint8))


def decode_to_square(
    data: bytes, size: int, max_pixels: int = MAX_PIXELS, pool: Executor | None = None
) -> NDArray[np.uint8]:
    """`to_model_square(decode_image(data, max_pixels), size)`, bit for bit, without the full picture in between.

    Args:
        pool: threads that share the resizing to a large square; the caller, who works too, must not be one of them.

    Raises:
        ImageError: as `decode_image`.
    """
    return _decoded(data, max_pixels, lambda image: _squashed(image, size, pool))


def _decoded(
    data: bytes, max_pixels: int, use: Callable[[Image.Image], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise ImageError(f"the image has {size} pixels; at most {max_pixels} are accepted")
            if image.mode not in _EIGHT_BIT_MODES:
                raise ImageError(f"the image has mode {image.mode}; expected 8 bits a channel")
            _check_complete(data, image)
            pixels = use(image if image.mode == "RGB" else image.convert("RGB"))
    except ImageError:
        raise
    except Exception as error:
        # Decoders of hostile bytes raise nearly anything (OSError, SyntaxError, struct.error, zlib.error, ...).
        name = type(error).__name__
        raise ImageError(f"the bytes are not a complete JPEG, PNG or WebP image ({name})") from error
    return _checked(pixels)


def _check_complete(data: bytes, image: Image.Image) -> None:
    """Refuse what the decoders let pass: files cut between the last pixel and the end mark, and endless JPEG scans."""
    if image.format == "PNG":
        complete = data.rfind(b"IEND\xaeB`\x82") >= 0
    elif image.format == "WEBP":
        complete = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    else:
        # A few bytes make one more scan over all pixels, so small files can keep a decoder busy for hours.
        if data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
            raise ImageError(f"the JPEG image has more than {_MAX_JPEG_SCANS} scans")
        # Inside a scan every 0xff byte is stuffed, so an end mark after the last start of a scan is the real one.
        end = data.rfind(b"\xff\xd9")
        complete = end >= 0 and data.find(b"\xff\xda", end) < 0
    if not complete:
        raise ImageError("the image is truncated; send the whole file")


def to_model_square(rgb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Squash (never crop) to uint8 [size, size, 3] with Lanczos, as Bridge frames were made.

    Raises:
        ImageError: not a uint8 [H, W, 3] array.
    """
    return _squashed(Image.fromarray(_checked(rgb)), size)


def _squashed(image: Image.Image, size: int, pool: Executor | None = None) -> NDArray[np.uint8]:
    """Lanczos to [size, size, 3]. Pillow resizes rows first, then columns, with 8 bits a channel in between; in the
    first pass every row is by itself, in the second every column, so strips of them on threads give the same bits.
    Pictures taller than wide are not shared out: some of them Pillow 13 resizes columns first."""
    if pool is None or size < _STRIPS_FROM_PX or image.height > image.width:
        return np.array(image.resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)
    image.load()  # now: strips would each start to decode
    narrow = Image.new("RGB", (size, image.height))
    rows = [(0, top, image.width, low) for top, low in _strips(image.height)]
    flat = _shared(pool, lambda box: _resized(image, box, (size, box[3] - box[1])), rows)
    for box, strip in zip(rows, flat, strict=True):
        narrow.paste(strip, (0, box[1]))
    columns = [(left, 0, right, image.height) for left, right in _strips(size)]
    done = _shared(pool, lambda box: _resized(narrow, box, (box[2] - box[0], size)), columns)
    return np.concatenate([np.asarray(strip) for strip in done], axis=1)


def _resized(image: Image.Image, box: _Box, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _strips(length: int) -> list[tuple[int, int]]:
    edges = [length * part // _STRIPS for part in range(_STRIPS + 1)]
    return [(low, high) for low, high in pairwise(edges) if high > low]


def _shared(pool: Executor, work: Callable[[_Box], Image.Image], boxes: Sequence[_Box]) -> list[Image.Image]:
    """The work of each box: here the first, and whatever no thread of the pool has begun by then."""
    others = [pool.submit(work, box) for box in boxes[1:]]
    done = [work(boxes[0])]
    done += [work(box) if other.cancel() else other.result() for box, other in zip(boxes[1:], others, strict=True)]
    return done


def from_base64(text: str) -> bytes:
    """Decode base64 or a base64 `data:` URL; the bytes decide about the format, not the URL's media type.

    Raises:
        ImageError: neither; in particular another URL or a file path.
    """
    header = _DATA_URL.match(text)
    try:
        data = pybase64.b64decode(text[header.end() :] if header else text, validate=True)
    except (binascii.Error, ValueError) as error:
        message = "the image is neither base64 nor a data: URL in base64 (no line breaks, no other URLs)"
        raise ImageError(message) from error
    if not data:
        raise ImageError("the image is empty")
    return data


def to_base64(data: bytes) -> str:
    """Encode bytes as base64 without line breaks."""
    return pybase64.b64encode_as_string(data)


def _checked(rgb: Any) -> NDArray[np.uint8]:
    if not isinstance(rgb, np.ndarray) or rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        shape = getattr(rgb, "shape", None)
        raise ImageError(f"expected a uint8 array [H, W, 3], got {getattr(rgb, 'dtype', type(rgb).__name__)} {shape}")
    return np.ascontiguousarray(rgb)
