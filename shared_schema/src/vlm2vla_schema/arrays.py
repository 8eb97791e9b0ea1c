"""Arrays as other people's policy servers put them on the wire, read without trust.

Two forms of the same thing, little-endian bytes in C order beside a dtype and a shape:

- json-numpy's (OpenVLA's and MolmoAct's ``/act``): ``{"__numpy__": base64, "dtype": "<f8", "shape": [7]}``;
- openpi's msgpack map: ``{b"__ndarray__": True, b"data": bytes, b"dtype": "<f8", b"shape": [7]}``.

Their own libraries make whatever array the sender asks for. Here dtype, shape and length must fit what the caller
expects before anything is decoded or allocated, and nothing is ever unpickled.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Collection, Mapping
from typing import Any, Final

import numpy as np
import pybase64
from numpy.typing import NDArray

from vlm2vla_schema.errors import ArrayError
from vlm2vla_schema.images import to_base64

PIXELS: Final = ("|u1",)
FLOATS: Final = ("<f8", "<f4", "<f2")
MAX_DIMENSIONS: Final = 3


def to_json(array: NDArray[Any]) -> dict[str, Any]:
    """The array as json-numpy's object."""
    data = np.ascontiguousarray(array).tobytes()
    return {"__numpy__": to_base64(data), "dtype": array.dtype.str, "shape": list(array.shape)}


def to_msgpack(array: NDArray[Any]) -> dict[bytes, Any]:
    """The array as openpi's map."""
    data = np.ascontiguousarray(array).tobytes()
    return {b"__ndarray__": True, b"data": data, b"dtype": array.dtype.str, b"shape": list(array.shape)}


def from_json(value: object, dtypes: Collection[str], max_elements: int) -> NDArray[Any]:
    """The array of a json-numpy object.

    Args:
        value: parsed JSON.
        dtypes: which of numpy's names may stand there, such as ``FLOATS``.
        max_elements: the most numbers that may be in it.

    Raises:
        ArrayError: it is none, or not such a one; the value itself is not repeated.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("__numpy__"), str):
        raise ArrayError("expected an array as json-numpy writes it: __numpy__, dtype and shape")
    text, dtype, shape = value["__numpy__"], _dtype(value.get("dtype"), dtypes), _shape(value.get("shape"))
    wanted = _bytes_of(dtype, shape, max_elements)
    if len(text) != 4 * math.ceil(wanted / 3):
        raise ArrayError(f"the array's base64 text has another length than shape {list(shape)} of {dtype.str} needs")
    try:
        data = pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ArrayError("the array's bytes are not base64") from None
    return _made(data, dtype, shape, wanted)


def from_msgpack(value: object, dtypes: Collection[str], max_elements: int) -> NDArray[Any]:
    """The array of an openpi map, unpacked by msgpack without any hook; arguments and errors as ``from_json``."""
    if not isinstance(value, Mapping) or not isinstance(value.get(b"data"), bytes):
        raise ArrayError("expected an array as openpi writes it: __ndarray__, data, dtype and shape")
    dtype, shape = _dtype(value.get(b"dtype"), dtypes), _shape(value.get(b"shape"))
    return _made(value[b"data"], dtype, shape, _bytes_of(dtype, shape, max_elements))


def _dtype(name: object, dtypes: Collection[str]) -> np.dtype[Any]:
    if not isinstance(name, str) or name not in dtypes:
        raise ArrayError(f"expected an array of {' or '.join(dtypes)}")
    return np.dtype(name)


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS:
        raise ArrayError(f"expected a shape of at most {MAX_DIMENSIONS} lengths")
    if not all(type(length) is int and length >= 0 for length in value):
        raise ArrayError("expected a shape of whole numbers, 0 or more")
    return tuple(value)


def _bytes_of(dtype: np.dtype[Any], shape: tuple[int, ...], max_elements: int) -> int:
    elements = math.prod(shape)
    if elements > max_elements:
        raise ArrayError(f"expected an array of at most {max_elements} numbers")
    return elements * dtype.itemsize


def _made(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], wanted: int) -> NDArray[Any]:
    if len(data) != wanted:
        raise ArrayError(f"the array has {len(data)} bytes; shape {list(shape)} of {dtype.str} needs {wanted}")
    return np.frombuffer(data, dtype).reshape(shape)
