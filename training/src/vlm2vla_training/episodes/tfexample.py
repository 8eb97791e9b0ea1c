"""The part of the protobuf wire format that a tf.train.Example needs: values stay where they are until asked for.

Messages (example.proto and feature.proto of TensorFlow): Example{1: Features}, Features{1: map<string, Feature>},
Feature{1: BytesList | 2: FloatList | 3: Int64List}, each list {1: repeated value}. Most bytes of a record are pictures
of cameras that nobody reads: they are stepped over, which no library for protobuf does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KIND_NAMES = {1: "bytes", 2: "floats", 3: "integers"}
_TAG_OF_BYTES = 1 << 3 | _BYTES
# A feature of some kind is at least this long with its own length: that, the kind, the list's length.
_SHORTEST = 3
_UNSEEN = 0
_FLOAT = np.dtype("<f4")
_TAG_OF_FEATURE = bytes([2 << 3 | _BYTES])

# What the entries of a record begin with behind their lengths, in order, how long that is, and the feature's name.
Layout = tuple[tuple[bytes, int, str], ...]
_Place = tuple[int, int, int]  # kind, begin and end of the list; or `_UNSEEN`, begin and end of the whole feature


class Example:
    """Features of one serialised tf.train.Example by name; values are decoded when asked for.

    Attributes:
        layout: how the record is laid out. One writer's records are alike: give it to the next, whose features are
            then found by comparing instead of decoding.
    """

    __slots__ = ("_data", "_features", "layout")

    def __init__(self, data: bytes, layout: Layout = ()) -> None:
        """Find the features.

        Raises:
            DataError: `data` is not a tf.train.Example.
        """
        self._data = data
        self._features: dict[str, _Place] = {}
        self.layout = layout
        if not layout or not self._found_by_layout():
            self._features.clear()
            self.layout = self._indexed()

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
        begin, end = self._place(name, 1)
        values: list[bytes] = []
        position = begin
        while position + 1 < end and data[position] == _TAG_OF_BYTES:
            length, position = data[position + 1], position + 2
            if length > 0x7F:
                if data[position] > 0x7F:
                    length, position = _varint(data, position - 1, end)
                else:
                    length, position = length & 0x7F | data[position] << 7, position + 1
            elif not values and (count := _repetitions(data, begin, position + length, end)):
                return [data[position : position + length]] * count
            values.append(data[position : position + length])
            position += length
        if position == end:
            return values
        return [data[b:e] for field, kind, b, e in _fields(data, begin, end) if (field, kind) == (1, _BYTES)]

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return the numbers of a float feature, [N].

        Raises:
            DataError: as for `bytes_list`.
        """
        begin, end = self._place(name, 2)
        found = [np.frombuffer(value, _FLOAT) for value in _packed(self._data[begin:end], _FIXED32)]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def rows(self, name: str, width: int) -> NDArray[np.float64]:
        """Return the numbers of a float feature as [T, width], the caller's own.

        Raises:
            DataError: as for `bytes_list`, or they are not whole rows.
        """
        data = self._data
        begin, end = self._place(name, 2)
        length, first = _varint(data, begin + 1, end) if end - begin > 1 else (0, 0)
        count, rest = divmod(length, _FLOAT.itemsize * width)
        if first + length == end and data[begin] == _TAG_OF_BYTES and not rest:
            return np.ndarray((count, width), _FLOAT, data, first).astype(np.float64)
        floats = self.floats(name)
        if len(floats) % width:
            raise DataError(f"{name}: {len(floats)} values; expected rows of {width} numbers")
        return floats.reshape(-1, width).astype(np.float64)

    def integers(self, name: str) -> tuple[int, ...]:
        """Return the numbers of an integer (or boolean) feature.

        Raises:
            DataError: as for `bytes_list`.
        """
        kind, begin, end = self._features.get(name, (3, 0, 0))
        numbers = _integers_of_feature(self._data[begin:end]) if kind == _UNSEEN else None
        if numbers is not None:
            return numbers
        begin, end = self._place(name, 3)
        return _integers(self._data[begin:end])

    def _found_by_layout(self) -> bool:
        """Find the features where the layout has them; False when the record has others or another order."""
        data, features = self._data, self._features
        end, startswith = len(data), data.startswith
        try:
            length, position = _varint(data, 1, end)
            if data[0] != _TAG_OF_BYTES or position + length != end:
                return False
            for head, size, name in self.layout:
                begin = position + 2
                if (length := data[position + 1]) > 0x7F:
                    length, begin = _varint(data, position + 1, end)
                if not startswith(head, begin) or length < size + _SHORTEST or data[position] != _TAG_OF_BYTES:
                    return False
                position = begin + length
                features[name] = _UNSEEN, begin + size, position
        except IndexError:
            return False
        return position == end

    def _indexed(self) -> Layout:
        """Find the features field by field, however they were written; the layout as far as it is the usual one."""
        data = self._data
        layout: list[tuple[bytes, int, str]] = []
        for field, kind, begin, end in _fields(data, 0, len(data)):
            if field != 1 or kind != _BYTES:
                continue
            for part, wire, first, last in _fields(data, begin, end):
                if part == 1 and wire == _BYTES:
                    layout += self._enter(first, last)
        return tuple(layout)

    def _enter(self, begin: int, end: int) -> Layout:
        """Take in one entry of the map; its part of the layout, none when it is an unusual one."""
        data = self._data
        name, behind_name = "", 0
        place: _Place | None = None
        for field, kind, first, last in _fields(data, begin, end):
            if kind == _BYTES and field == 1:
                name, behind_name = _text(data[first:last]), last
            elif kind == _BYTES and field == 2:
                lists = ((one, b, e) for one, wire, b, e in _fields(data, first, last) if wire == _BYTES)
                place = next(lists, None)
        if place is None:
            return ()
        self._features[name] = place
        head = data[begin : behind_name + 1]
        return ((head, len(head), name),) if head.endswith(_TAG_OF_FEATURE) else ()

    def _place(self, name: str, kind: int) -> tuple[int, int]:
        found = self._features.get(name)
        if found is not None and found[0] == _UNSEEN:
            found = self._look(name, found[1], found[2])
        if found is None:
            raise DataError(f"feature '{name}' is missing; the record has {', '.join(self.names()) or 'none'}")
        if found[0] != kind:
            raise DataError(f"feature '{name}' holds {_KIND_NAMES.get(found[0])}; expected {_KIND_NAMES[kind]}")
        return found[1], found[2]

    def _look(self, name: str, begin: int, end: int) -> _Place | None:
        """Look into a feature that the layout found; where its list is."""
        place = _only_list(self._data, begin, end)
        if place is None:
            self._features.clear()
            self._indexed()
            return self._features.get(name)
        self._features[name] = place
        return place


def _only_list(data: bytes, begin: int, end: int) -> _Place | None:
    """Where the list of the feature data[begin:end] is, its length included; None when there is more or less in it."""
    length, kind = _varint(data, begin, end)
    size, first = _varint(data, kind + 1, end)
    tag = data[kind]
    return (tag >> 3, first, end) if kind + length == first + size == end and tag & 0x87 == _BYTES else None


def _repetitions(data: bytes, begin: int, first_end: int, end: int) -> int:
    """How often data[begin:end] repeats data[begin:first_end] and nothing else; 0 when it does not."""
    count, rest = divmod(end - begin, first_end - begin)
    return count if not rest and data[begin:end] == data[begin:first_end] * count else 0


@lru_cache(maxsize=4096)
def _integers_of_feature(feature: bytes) -> tuple[int, ...] | None:
    """Numbers of a whole feature; None when it has to be looked into. Few flags and small numbers come often."""
    place = _only_list(feature, 0, len(feature))
    return _integers(feature[place[1] :]) if place is not None and place[0] == 3 else None


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("a feature's name is not UTF-8; expected a tf.train.Example") from error


def _integers(values: bytes) -> tuple[int, ...]:
    """Numbers of an Int64List."""
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


def _varint(data: bytes, position: int, limit: int) -> tuple[int, int]:
    """Decode one varint; the number and the position behind it."""
    if position + 3 <= limit:  # nearly all are this short
        low, middle, high = data[position : position + 3]
        if low < 0x80:
            return low, position + 1
        if middle < 0x80:
            return low & 0x7F | middle << 7, position + 2
        if high < 0x80:
            return low & 0x7F | (middle & 0x7F) << 7 | high << 14, position + 3
    number = shift = 0
    while position < limit and shift < 70:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise DataError("an unfinished number; expected a tf.train.Example")
