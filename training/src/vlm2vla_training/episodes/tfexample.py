"""The part of the protobuf wire format that a tf.train.Example needs: values stay where they are until asked for.

Messages (example.proto and feature.proto of TensorFlow): Example{1: Features}, Features{1: map<string, Feature>},
Feature{1: BytesList | 2: FloatList | 3: Int64List}, each list {1: repeated value}. Most bytes of a record are pictures
of cameras that nobody reads: they are stepped over, which no library for protobuf does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KIND_NAMES = {1: "bytes", 2: "floats", 3: "integers"}
_TAG_OF_BYTES = 1 << 3 | _BYTES
_KIND_OF_TAG = {bytes([kind << 3 | _BYTES]): kind for kind in _KIND_NAMES}
# An entry as every writer known writes it, up to its first value: its length, name, feature's length, kind, list's
# length. Anything else is read field by field.
_NUMBER = rb"([\x80-\xff]{0,4}[\x00-\x7f])"
_ENTRY = re.compile(
    rb"\n" + _NUMBER + rb"\n([\x00-\x7f])([ -~]*)\x12[\x80-\xff]{0,4}[\x00-\x7f]" + rb"([\n\x12\x1a])" + _NUMBER
)

_Place = tuple[int, int, int]  # kind, and where the list begins and ends


class Example:
    """Features of one serialised tf.train.Example by name; values are decoded when asked for."""

    def __init__(self, data: bytes) -> None:
        """Index the features.

        Raises:
            DataError: `data` is not a tf.train.Example.
        """
        self._data = data
        self._features: dict[str, _Place] = {}
        for field, kind, begin, end in _fields(data, 0, len(data)):
            if field == 1 and kind == _BYTES:
                self._index(begin, end)

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
        data = self._data
        position, end = self._place(name, 1)
        values: list[bytes] = []
        while position + 1 < end and data[position] == _TAG_OF_BYTES:
            length, position = data[position + 1], position + 2
            if length > 0x7F:
                length, position = _varint(data, position - 1, end)
            values.append(data[position : position + length])
            position += length
        if position == end:
            return values
        return [data[b:e] for field, kind, b, e in _fields(data, *self._place(name, 1)) if (field, kind) == (1, _BYTES)]

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return the numbers of a float feature, [N].

        Raises:
            DataError: as for `bytes_list`.
        """
        found = [np.frombuffer(value, dtype="<f4") for value in _packed(self._list(name, 2), _FIXED32)]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def integers(self, name: str) -> list[int]:
        """Return the numbers of an integer (or boolean) feature.

        Raises:
            DataError: as for `bytes_list`.
        """
        return list(_integers(self._list(name, 3)))

    def _index(self, position: int, end: int) -> None:
        data, features, match = self._data, self._features, _ENTRY.match
        while position < end:
            found = match(data, position, end)
            if found is None:
                position = self._index_slowly(position, end)
                continue
            length, name_length, name, tag, list_length = found.groups()
            values = found.end()
            stop = found.end(1) + (length[0] if len(length) == 1 else _number(length))
            size = list_length[0] if len(list_length) == 1 else _number(list_length)
            if values + size == stop <= end and len(name) == name_length[0]:
                features[name.decode("ascii")] = _KIND_OF_TAG[tag], values, stop
                position = stop
            else:
                position = self._index_slowly(position, end)

    def _index_slowly(self, position: int, end: int) -> int:
        """Index what one field of Features holds, however it was written; the position behind it."""
        data = self._data
        field, kind, begin, stop = next(_fields(data, position, end))
        if (field, kind) != (1, _BYTES):
            return stop
        name = ""
        place: _Place | None = None
        for part, part_kind, first, last in _fields(data, begin, stop):
            if part_kind == _BYTES and part == 1:
                name = _text(data[first:last])
            elif part_kind == _BYTES and part == 2:
                lists = ((one, b, e) for one, wire, b, e in _fields(data, first, last) if wire == _BYTES)
                place = next(lists, None)
        if place is not None:
            self._features[name] = place
        return stop

    def _place(self, name: str, kind: int) -> tuple[int, int]:
        found = self._features.get(name)
        if found is None:
            raise DataError(f"feature '{name}' is missing; the record has {', '.join(self.names()) or 'none'}")
        if found[0] != kind:
            raise DataError(f"feature '{name}' holds {_KIND_NAMES.get(found[0])}; expected {_KIND_NAMES[kind]}")
        return found[1], found[2]

    def _list(self, name: str, kind: int) -> bytes:
        begin, end = self._place(name, kind)
        return self._data[begin:end]


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("a feature's name is not UTF-8; expected a tf.train.Example") from error


@lru_cache(maxsize=4096)
def _integers(values: bytes) -> tuple[int, ...]:
    """Numbers of an Int64List; few flags and small numbers come again and again."""
    numbers: list[int] = []
    for value in _packed(values, _VARINT):
        position = 0
        while position < len(value):
            number, position = _varint(value, position, len(value))
            numbers.append(number - (1 << 64) if number >= 1 << 63 else number)
    return tuple(numbers)


def _packed(data: bytes, wire_type: int) -> Iterator[bytes]:
    """Yield the bytes of field 1's numbers, whether they were written packed or one by one."""
    for field, kind, begin, end in _fields(data, 0, len(data)):
        if field == 1 and kind in (_BYTES, wire_type):
            if kind == _BYTES and wire_type == _FIXED32 and (end - begin) % 4:
                raise DataError(f"a list of floats has {end - begin} bytes; expected a multiple of 4")
            yield data[begin:end]


def _fields(data: bytes, position: int, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, wire type, begin, end of the value) of the message data[position:limit]."""
    while position < limit:
        tag, position = _varint(data, position, limit)
        kind = tag & 7
        begin = position
        if kind == _BYTES:
            length, begin = _varint(data, position, limit)
            position = begin + length
        elif kind == _VARINT:
            _, position = _varint(data, position, limit)
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise DataError(f"wire type {kind}; expected a tf.train.Example")
        if position > limit:
            raise DataError("a message ends inside a field; expected a tf.train.Example")
        yield tag >> 3, kind, begin, position


def _number(varint: bytes) -> int:
    """A varint of at most five bytes that is known to be whole."""
    number = varint[0] & 0x7F
    for place in range(1, len(varint)):
        number |= (varint[place] & 0x7F) << 7 * place
    return number


def _varint(data: bytes, position: int, limit: int) -> tuple[int, int]:
    """Decode one varint; the number and the position behind it."""
    number = shift = 0
    while position < limit and shift < 70:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise DataError("an unfinished number; expected a tf.train.Example")
