"""The only resize and JPEG code: client, server and training all pass through these functions.

Arrays are uint8 [H, W, 3], RGB.
"""

from __future__ import annotations

import binascii
import io
import platform
import re
from typing import Any

import numpy as np
import pybase64
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vlm2vla_schema.errors import ImageError

if platform.machine() != "aarch64":
    import cykooz_resizer as fast  # Rust's fast_image_resize

    _LANCZOS = fast.ResizeOptions(resize_alg=fast.ResizeAlg.convolution(fast.FilterType.lanczos3))
else:  # Linux on ARM, for which it is not built
    fast = None

JPEG_QUALITY = 95
MAX_WIDTH = 640
MAX_HEIGHT = 480
MAX_PIXELS = 16_777_216
"""Default limit of `decode_image`: 4096 x 4096; a camera frame is 640 x 480."""

_MAX_JPEG_SCANS = 100
_FORMATS = ("JPEG", "PNG", "WEBP")
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr"})
_DATA_URL = re.compile(r"data:[A-Za-z0-9!#$&^_.+/;=-]{0,100};base64,")


def encode_jpeg(rgb: NDArray[np.uint8], max_width: int = MAX_WIDTH, max_height: int = MAX_HEIGHT) -> bytes:
    """Encode as JPEG, quality 95, 4:4:4, after shrinking (Lanczos, aspect kept, never enlarged) to fit the limits.

    Raises:
        ImageError: not a uint8 [H, W, 3] array.
    """
    rgb = _checked(rgb)
    height, width, _ = rgb.shape
    scale = min(max_width / width, max_height / height, 1.0)
    if scale < 1.0:
        rgb = _lanczos(rgb, max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode JPEG, PNG or WebP bytes to uint8 [H, W, 3], RGB; transparency is dropped, of several images the first.

    The size is read from the header and checked before any pixel is decoded.

    Raises:
        ImageError: another format, more than `max_pixels`, truncated or damaged data, or more than 8 bits a channel.
    """
    try:
        pixels = _decode_jpeg(data, max_pixels) if data.startswith(b"\xff\xd8") else None
        if pixels is None:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(image.width, image.height, max_pixels)
                if image.mode not in _EIGHT_BIT_MODES:
                    raise ImageError(f"the image has mode {image.mode}; expected 8 bits a channel")
                _check_complete(data, image.format)
                pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)
    except ImageError:
        raise
    except Exception as error:
        # Decoders of hostile bytes raise nearly anything (OSError, SyntaxError, struct.error, zlib.error, ...).
        name = type(error).__name__
        raise ImageError(f"the bytes are not a complete JPEG, PNG or WebP image ({name})") from error
    return _checked(pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """The same libjpeg-turbo and the same bits as Pillow's, straight into an array; None for colours left to Pillow."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height, max_pixels)
    _check_complete(data, "JPEG")
    if colours not in ("YCbCr", "Gray", "RGB"):
        return None
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    return pixels


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"the image has {width} x {height} pixels; at most {max_pixels} are accepted")


def _check_complete(data: bytes, kind: str | None) -> None:
    """Refuse what the decoders let pass: files cut between the last pixel and the end mark, and endless JPEG scans."""
    if kind == "PNG":
        complete = data.rfind(b"IEND\xaeB`\x82") >= 0
    elif kind == "WEBP":
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
    return _lanczos(_checked(rgb), size, size)


def _lanczos(rgb: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """By fast_image_resize in a fifth of Pillow's time, with the same bits on every processor; of a camera's picture at
    112 pixels one value in seven differs from Pillow's, by 2 of 255 at most."""
    if fast is None:
        return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.LANCZOS), dtype=np.uint8)
    # In buffers of its own: Pillow's pictures it would read by the layout of their C structures.
    source = fast.ImageData(rgb.shape[1], rgb.shape[0], fast.PixelType.U8x3, rgb.tobytes())
    resized = fast.ImageData(width, height, fast.PixelType.U8x3)
    fast.Resizer().resize(source, resized, _LANCZOS)
    return np.frombuffer(resized.get_buffer(), dtype=np.uint8).reshape(height, width, 3).copy()


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
