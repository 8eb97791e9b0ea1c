"""Features of a serialised tf.train.Example: values stay where they are until asked for.

Messages (example.proto and feature.proto of TensorFlow): Example{1: Features}, Features{1: map<string, Feature>},
Feature{1: BytesList | 2: FloatList | 3: Int64List}, each list {1: repeated value}. Most bytes of a record are pictures
of cameras that nobody reads: they are stepped over, which no library for protobuf does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.episodes.wire import BYTES, FIXED32, encoded, fields, integers, message, packed, varint
from vlm2vla_training.errors import DataError

_KIND_NAMES = {1: "bytes", 2: "floats", 3: "integers"}
_TAG_OF_BYTES = 1 << 3 | BYTES
_TAG_OF_FEATURE = bytes([2 << 3 | BYTES])
# A feature of some kind is at least this long with its own length: that, the kind, the list's length.
_SHORTEST = 3
_FLOAT = np.dtype("<f4")


# Where a feature is: the kind, begin and end of its list's message; begin and end of its entry in the map.
_Place = tuple[int, int, int, int, int]


class _Entry(NamedTuple):
    """What an entry of the map looked like: usually the next record's looks the same, but for the values.

    Attributes:
        lead: all bytes before its list's message: the lengths of everything in it, its name, the kind of the list.
        size: of the whole entry.
        head: the part of `lead` that stays when lengths change: the name and the tag behind it.
        kind: of the list.
    """

    lead: bytes
    size: int
    head: bytes
    kind: int


class Layout:
    """How the entries of a record lie one after another.

    Attributes:
        entries: in order.
        numbers: the place of each name in `entries`.
    """

    __slots__ = ("entries", "numbers")

    def __init__(self, places: dict[str, _Place]) -> None:
        """Describe a record with features at these places, written as every library writes them."""
        self.entries = tuple(_entry(name.encode(), place) for name, place in places.items())
        self.numbers = {name: number for number, name in enumerate(places)}


def _entry(name: bytes, place: _Place) -> _Entry:
    number, begin, end, _, _ = place
    size = end - begin
    kind = encoded(number << 3 | BYTES) + encoded(size)
    head = message(1, name) + _TAG_OF_FEATURE
    behind = head + encoded(len(kind) + size) + kind
    lead = bytes([_TAG_OF_BYTES]) + encoded(len(behind) + size) + behind
    return _Entry(lead, len(lead) + size, head, number)


class Example:
    """Features of one record by name; values are decoded when asked for.

    Attributes:
        layout: how the record is laid out; None when it is an unusual one. One writer's records are alike: give it to
            the next, whose features are then found by comparing instead of decoding.
    """

    __slots__ = ("_begins", "_data", "_places", "layout")

    def __init__(self, data: bytes, layout: Layout | None = None) -> None:
        """Find the features.

        Raises:
            DataError: `data` is not a tf.train.Example.
        """
        self._data = data
        self._places: dict[str, _Place] = {}
        self._begins: list[int] = []  # of the layout's entries and of what follows
        self.layout = layout
        if layout is None or not self._follow(layout):
            self._index()
            layout = Layout(self._places)
            self.layout = layout if self._follow(layout) else None

    def __contains__(self, name: str) -> bool:
        """Tell whether the feature is there with at least one kind of value."""
        return name in (self._places if self.layout is None else self.layout.numbers)

    def names(self) -> list[str]:
        """Return the names of all features, sorted."""
        return sorted(self._places if self.layout is None else self.layout.numbers)

    def entries(self, names: Sequence[str]) -> bytes:
        """Return the entries of some features as they were written: when the bytes are the same, the values are.

        Args:
            names: of features that are there.
        """
        data, begins = self._data, self._begins
        if begins and self.layout is not None:
            numbers = [self.layout.numbers[name] for name in names]
            return b"".join([data[begins[number] : begins[number + 1]] for number in numbers])
        places = [self._places[name] for name in names]
        return b"".join([data[begin:end] for *_, begin, end in places])

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
                    length, position = varint(data, position - 1, end)
                else:
                    length, position = length & 0x7F | data[position] << 7, position + 1
            behind = position + length
            values.append(data[position:behind])
            position = behind
        if position == end:
            return values
        return [data[b:e] for field, kind, b, e in fields(data, begin, end) if (field, kind) == (1, BYTES)]

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return the numbers of a float feature, [N].

        Raises:
            DataError: as for `bytes_list`.
        """
        begin, end = self._place(name, 2)
        found = [np.frombuffer(value, _FLOAT) for value in packed(self._data[begin:end], FIXED32)]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def rows(self, name: str, width: int) -> NDArray[np.float32]:
        """Return the numbers of a float feature as [T, width], not to be written to.

        Raises:
            DataError: as for `bytes_list`, or they are not whole rows.
        """
        data = self._data
        begin, end = self._place(name, 2)
        # One by one they have another tag, and a number's bytes may look like a length without end.
        length, first = varint(data, begin + 1, end) if end > begin and data[begin] == _TAG_OF_BYTES else (0, 0)
        count, rest = divmod(length, _FLOAT.itemsize * width)
        if first + length == end and not rest:
            return np.ndarray((count, width), _FLOAT, data[first:end])
        floats = self.floats(name)
        if len(floats) % width:
            raise DataError(f"{name}: {len(floats)} values; expected rows of {width} numbers")
        return floats.reshape(-1, width)

    def integers(self, name: str) -> tuple[int, ...]:
        """Return the numbers of an integer (or boolean) feature.

        Raises:
            DataError: as for `bytes_list`.
        """
        begin, end = self._place(name, 3)
        return _integers(self._data[begin:end])

    def _follow(self, layout: Layout) -> bool:
        """Find the entries where the layout has them; False when the record has others or another order."""
        data, begins = self._data, list[int]()
        end, startswith = len(data), data.startswith
        try:
            length, position = varint(data, 1, end)
            if data[0] != _TAG_OF_BYTES or position + length != end:
                return False
            for lead, size, head, _ in layout.entries:
                begins.append(position)
                if startswith(lead, position):
                    position += size
                    continue
                length, begin = data[position + 1], position + 2
                if length > 0x7F:
                    length, begin = varint(data, position + 1, end)
                if not startswith(head, begin) or length < len(head) + _SHORTEST or data[position] != _TAG_OF_BYTES:
                    return False
                position = begin + length
        except (IndexError, DataError):
            return False
        if position != end:
            return False
        self._begins = [*begins, end]
        return True

    def _index(self) -> None:
        """Find the features field by field, however they were written."""
        data = self._data
        for field, kind, begin, end in fields(data, 0, len(data)):
            if field == 1 and kind == BYTES:
                before = begin
                for part, wire, first, last in fields(data, begin, end):
                    if part == 1 and wire == BYTES:
                        self._enter(before, first, last)
                    before = last

    def _enter(self, entry_begin: int, begin: int, end: int) -> None:
        """Take in one entry of the map."""
        data = self._data
        name = ""
        place: _Place | None = None
        for field, kind, first, last in fields(data, begin, end):
            if kind == BYTES and field == 1:
                name = _text(data[first:last])
            elif kind == BYTES and field == 2:
                lists = ((one, b, e) for one, wire, b, e in fields(data, first, last) if wire == BYTES)
                place = next(((*one, entry_begin, end) for one in lists), None)
        if place is not None:
            self._places[name] = place

    def _place(self, name: str, kind: int) -> tuple[int, int]:
        """Where the list's message of a feature is."""
        found = self._places.get(name) or self._place_by_layout(name)
        if found is None:
            raise DataError(f"feature '{name}' is missing; the record has {', '.join(self.names()) or 'none'}")
        if found[0] != kind:
            raise DataError(f"feature '{name}' holds {_KIND_NAMES.get(found[0])}; expected {_KIND_NAMES[kind]}")
        return found[1], found[2]

    def _place_by_layout(self, name: str) -> _Place | None:
        """Look into an entry that the layout found."""
        layout, data = self.layout, self._data
        if layout is None or name not in layout.numbers:
            return None
        number = layout.numbers[name]
        lead, size, head, kind = layout.entries[number]
        begin = self._begins[number]
        if data.startswith(lead, begin):
            return kind, begin + len(lead), begin + size, begin, begin + size
        end = self._begins[number + 1]
        _, first = varint(data, begin + 1, end)
        place = _only_list(data, first + len(head), end)
        if place is None:
            self.layout = None
            self._index()
            return self._places.get(name)
        return *place, begin, end


def _only_list(data: bytes, begin: int, end: int) -> tuple[int, int, int] | None:
    """Where the list of the feature data[begin:end] is, its length included; None when there is more or less in it."""
    length, kind = varint(data, begin, end)
    size, first = varint(data, kind + 1, end)
    tag = data[kind]
    return (tag >> 3, first, end) if kind + length == first + size == end and tag & 0x87 == BYTES else None


@lru_cache(maxsize=4096)
def _integers(values: bytes) -> tuple[int, ...]:
    """Numbers of a list; few flags and small numbers come often."""
    return integers(values)


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("a feature's name is not UTF-8; expected a tf.train.Example") from error
