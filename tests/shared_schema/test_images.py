"""The one place where images are decoded, resized and encoded."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cykooz_resizer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from vlm2vla_schema import images
from vlm2vla_schema.errors import ImageError
from vlm2vla_schema.images import (
    decode_image,
    encode_jpeg,
    from_base64,
    to_base64,
    to_model_square,
)


def gradient(width: int, height: int) -> NDArray[np.uint8]:
    """A smooth colour picture."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, axis=0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, axis=1)
    return np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(gradient(*size)).convert(mode).save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_images_are_read_exactly(kind: str) -> None:
    assert np.array_equal(decode_image(encoded(kind)), gradient(40, 30))


def test_jpeg_at_full_size_keeps_colours_and_is_4_4_4() -> None:
    picture = gradient(64, 48)
    data = encode_jpeg(picture)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]  # JPEG files have it
    difference = np.abs(decode_image(data).astype(int) - picture.astype(int))
    assert difference.max() <= 12
    assert difference.mean() < 1.5


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (640, 480)),
        ((320, 240), (320, 240)),
        ((1280, 720), (640, 360)),
        ((480, 640), (360, 480)),
        ((3000, 2), (640, 1)),
    ],
)
def test_large_frames_are_shrunk_and_small_ones_left(size: tuple[int, int], expected: tuple[int, int]) -> None:
    decoded = decode_image(encode_jpeg(gradient(*size)))
    assert decoded.shape == (expected[1], expected[0], 3)
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("PNG", "1"), ("JPEG", "L"), ("JPEG", "CMYK")]
)
def test_other_modes_become_rgb(kind: str, mode: str) -> None:
    decoded = decode_image(encoded(kind, mode))
    assert decoded.shape == (30, 40, 3)
    assert decoded.flags.writeable


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageError):
        decode_image(encoded(kind))


def test_sixteen_bit_images_are_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(buffer, format="PNG")
    with pytest.raises(ImageError, match="8 bits"):
        decode_image(buffer.getvalue())


@pytest.mark.parametrize("size", [(5000, 5000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (0, 5)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_promise_of_many_pixels_is_refused_from_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError):
        decode_image(png_header(*size))


def test_the_pixel_limit_is_a_setting() -> None:
    data = encoded("PNG")
    assert decode_image(data, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(ImageError, match="40 x 30"):
        decode_image(data, max_pixels=1199)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_files_cut_anywhere_are_refused(kind: str) -> None:
    data = encoded(kind, size=(16, 12))
    for length in range(len(data)):
        with pytest.raises(ImageError):
            decode_image(data[:length])


@pytest.mark.parametrize("size", [(640, 480), (1, 1), (17, 33), (101, 8)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:0", "progressive": True},
        {"keep_rgb": True},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_files_are_read_as_pillow_reads_them(size: tuple[int, int], options: dict[str, Any], mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, format="JPEG", **options)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        assert np.array_equal(decode_image(buffer.getvalue()), np.asarray(image.convert("RGB")))


def test_jpeg_files_damaged_inside_are_refused_though_pillow_shows_something() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = bytearray(encode_jpeg(noise))
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff\x00" * 20
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    with pytest.raises(ImageError, match="complete"):
        decode_image(bytes(data))


def test_jpeg_files_of_endless_scans_are_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(gradient(64, 64)).save(buffer, format="JPEG", progressive=True)
    data = buffer.getvalue()
    assert decode_image(data).shape == (64, 64, 3)
    last_scan = data[data.rfind(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="scans"):
        decode_image(data[:-2] + last_scan * 200 + data[-2:])


def test_bytes_after_the_end_do_no_harm() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert decode_image(encoded(kind) + b"\0\0").shape == (30, 40, 3)


@given(
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
    st.lists(st.tuples(st.integers(0), st.binary(max_size=4)), min_size=1, max_size=6),
)
def test_damaged_files_decode_or_raise_image_error(kind: str, damage: list[tuple[int, bytes]]) -> None:
    data = bytearray(encoded(kind, size=(16, 12)))
    for place, patch in damage:
        at = place % len(data)
        data[at : at + len(patch)] = patch
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(data), max_pixels=100_000).shape[2] == 3


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data)


def test_the_model_square_squashes_and_never_crops() -> None:
    picture = np.zeros((48, 96, 3), dtype=np.uint8)
    picture[:, :48] = (255, 0, 0)
    picture[:, 48:] = (0, 0, 255)
    square = to_model_square(picture, 32)
    assert square.shape == (32, 32, 3)
    assert square[:, :12].mean(axis=(0, 1)) == pytest.approx([255, 0, 0])
    assert square[:, -12:].mean(axis=(0, 1)) == pytest.approx([0, 0, 255])


def test_the_model_square_of_a_square_is_itself() -> None:
    picture = gradient(32, 32)
    assert np.array_equal(to_model_square(picture, 32), picture)
    assert np.array_equal(to_model_square(picture[:, ::-1], 32), picture[:, ::-1])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
    ],
)
def test_arrays_that_are_no_picture_are_refused(array: NDArray[np.uint8]) -> None:
    with pytest.raises(ImageError, match="uint8"):
        encode_jpeg(array)
    with pytest.raises(ImageError, match="uint8"):
        to_model_square(array, 8)


def test_base64_and_data_urls() -> None:
    data = encoded("JPEG")
    text = to_base64(data)
    assert from_base64(text) == data
    for kind in ("image/jpeg", "image/png", "", "image/jpeg;name=a.jpg"):
        assert from_base64(f"data:{kind};base64,{text}") == data


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "a b=",
        "!!!!",
        "http://example.org/a.jpg",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:image/jpeg,abcd",
        "data:;base64,",
        "dätä",
        "QUJD\nQUJD",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ImageError):
        data = from_base64(text)
        decode_image(data)


@pytest.mark.parametrize("text", ["QUJDRA", "QUJDRA==QUJD", "QUJD====", "QU=D", "QUJ-", "QUJ_", "QUJD\n", "QUJD\0"])
def test_base64_is_read_strictly(text: str) -> None:
    with pytest.raises(ImageError, match="neither base64 nor"):
        from_base64(text)


def test_bridge_frame_size_round_trip() -> None:
    frame = gradient(256, 256)
    sent = encode_jpeg(frame)
    assert base64.b64decode(to_base64(sent)) == sent
    assert to_model_square(decode_image(sent), 112).shape == (112, 112, 3)


def camera_picture(width: int, height: int) -> NDArray[np.uint8]:
    """A smooth picture with a camera's noise."""
    noise = np.random.default_rng(width + height).normal(0.0, 2.0, (height, width, 3))
    return np.clip(gradient(width, height) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (256, 256), (1280, 720), (3000, 60), (20, 900)])
@pytest.mark.parametrize("size", [1, 3, 112, 224, 448, 896])
def test_a_square_is_pillows_lanczos_but_for_its_rounding(width: int, height: int, size: int) -> None:
    picture = camera_picture(width, height)
    square = to_model_square(picture, size)
    pillow = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS), dtype=np.int16)
    assert square.flags.writeable
    assert np.abs(square - pillow).max() <= 2


def test_where_the_fast_resizer_is_not_built_pillow_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = camera_picture(640, 480)
    fast = to_model_square(picture, 112)
    monkeypatch.setattr(images, "fast", None)
    slow = to_model_square(picture, 112)
    assert np.array_equal(slow, np.asarray(Image.fromarray(picture).resize((112, 112), Image.Resampling.LANCZOS)))
    assert not np.array_equal(slow, fast)


@pytest.mark.parametrize("extensions", ["none", "sse4_1", "avx2"])
@pytest.mark.parametrize("size", [112, 224, 896])
def test_a_square_has_the_same_bits_on_every_processor(
    extensions: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = camera_picture(640, 480)
    square = to_model_square(picture, size)

    class Older(cykooz_resizer.Resizer):  # type: ignore[misc]  # a library without types
        def __init__(self) -> None:
            super().__init__()
            self.cpu_extensions = cykooz_resizer.CpuExtensions[extensions]

    monkeypatch.setattr(cykooz_resizer, "Resizer", Older)
    assert np.array_equal(to_model_square(picture, size), square)


def test_squares_made_by_many_threads_at_once_are_those_of_one() -> None:
    pictures = [camera_picture(600 + number, 480) for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(to_model_square, pictures, [112] * len(pictures)))
    for picture, square in zip(pictures, together, strict=True):
        assert np.array_equal(square, to_model_square(picture, 112))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70))
def test_any_picture_becomes_a_square_of_any_size(width: int, height: int, size: int) -> None:
    square = to_model_square(np.full((height, width, 3), (7, 130, 255), dtype=np.uint8), size)
    assert square.shape == (size, size, 3)
    assert (square == (7, 130, 255)).all()
