"""The part of the protobuf wire format that a tf.train.Example needs, read without copying and only on demand.

Messages (example.proto and feature.proto of TensorFlow): Example{1: Features}, Features{1: map<string, Feature>},
Feature{1: BytesList | 2: FloatList | 3: Int64List}, each list {1: repeated value}.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KIND_NAMES = {1: "bytes", 2: "floats", 3: "integers"}


class Example:
    """Features of one serialised tf.train.Example by name; values are decoded when asked for."""

    def __init__(self, data: bytes) -> None:
        """Index the features.

        Raises:
            DataError: `data` is not a tf.train.Example.
        """
        self._features: dict[str, tuple[int, memoryview]] = {}
        for _, features in _messages(memoryview(data), 1):
            for _, entry in _messages(features, 1):
                self._index(entry)

    def __contains__(self, name: str) -> bool:
        """Tell whether the feature is there with at least one kind of value."""
        return name in self._features

    def names(self) -> list[str]:
        """Return the names of all features, sorted."""
        return sorted(self._features)

    def bytes_list(self, name: str) -> list[bytes]:
        """Return the byte strings of a feature.

        Raises:
            DataError: the feature is missing, holds another kind of value or is broken.
        """
        return [bytes(value) for _, value in _messages(self._values(name, 1), 1)]

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return the numbers of a float feature, [N].

        Raises:
            DataError: as for `bytes_list`.
        """
        found = [np.frombuffer(value, dtype="<f4") for value in _packed(self._values(name, 2), _FIXED32)]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def integers(self, name: str) -> list[int]:
        """Return the numbers of an integer (or boolean) feature.

        Raises:
            DataError: as for `bytes_list`.
        """
        numbers: list[int] = []
        for value in _packed(self._values(name, 3), _VARINT):
            position = 0
            while position < len(value):
                number, position = _varint(value, position)
                numbers.append(number - (1 << 64) if number >= 1 << 63 else number)
        return numbers

    def _index(self, entry: memoryview) -> None:
        name = ""
        feature: tuple[int, memoryview] | None = None
        for field, value in _fields(entry):
            if not isinstance(value, memoryview):
                continue
            if field == 1:
                name = _text(value)
            elif field == 2:
                feature = next(((kind, v) for kind, v in _fields(value) if isinstance(v, memoryview)), None)
        if feature is not None:
            self._features[name] = feature

    def _values(self, name: str, kind: int) -> memoryview:
        found = self._features.get(name)
        if found is None:
            raise DataError(f"feature '{name}' is missing; the record has {', '.join(self.names()) or 'none'}")
        if found[0] != kind:
            raise DataError(f"feature '{name}' holds {_KIND_NAMES.get(found[0])}; expected {_KIND_NAMES[kind]}")
        return found[1]


def _text(value: memoryview) -> str:
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("a feature's name is not UTF-8; expected a tf.train.Example") from error


def _messages(data: memoryview, wanted: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the length-delimited values of one field."""
    for field, value in _fields(data):
        if field == wanted and isinstance(value, memoryview):
            yield field, value


def _packed(data: memoryview, wire_type: int) -> Iterator[memoryview]:
    """Yield the bytes of field 1's numbers, whether they were written packed or one by one."""
    for field, kind, value in _raw_fields(data):
        if field == 1 and kind in (_BYTES, wire_type):
            if kind == _BYTES and wire_type == _FIXED32 and len(value) % 4:
                raise DataError(f"a list of floats has {len(value)} bytes; expected a multiple of 4")
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    for field, kind, value in _raw_fields(data):
        yield field, value if kind == _BYTES else None


def _raw_fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield (field number, wire type, the value's bytes) of one message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        begin = position
        if kind == _BYTES:
            length, begin = _varint(data, position)
            position = begin + length
        elif kind == _VARINT:
            _, position = _varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise DataError(f"wire type {kind}; expected a tf.train.Example")
        if position > len(data):
            raise DataError("a message ends inside a field; expected a tf.train.Example")
        yield tag >> 3, kind, data[begin:position]


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Decode one varint; the number and the position behind it."""
    number = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise DataError("an unfinished number; expected a tf.train.Example")
