"""Protobuf's wire format, as far as a tf.train.Example needs it (https://protobuf.dev/programming-guides/encoding)."""

from __future__ import annotations

from collections.abc import Iterator

from vlm2vla_training.errors import DataError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def fields(data: bytes, position: int, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, wire type, begin, end of the value) of the message data[position:limit].

    Raises:
        DataError: it is no message.
    """
    while position < limit:
        tag, position = varint(data, position, limit)
        kind = tag & 7
        begin = position
        if kind == BYTES:
            length, begin = varint(data, position, limit)
            position = begin + length
        elif kind == VARINT:
            _, position = varint(data, position, limit)
        elif kind in (FIXED32, FIXED64):
            position += 4 if kind == FIXED32 else 8
        else:
            raise DataError(f"wire type {kind}; expected a tf.train.Example")
        if position > limit:
            raise DataError("a message ends inside a field; expected a tf.train.Example")
        yield tag >> 3, kind, begin, position


def varint(data: bytes, position: int, limit: int) -> tuple[int, int]:
    """Decode one varint; the number and the position behind it.

    Raises:
        DataError: it goes on at `limit`, or for too long.
    """
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


def packed(data: bytes, wire_type: int) -> Iterator[bytes]:
    """Yield the bytes of field 1's numbers, whether they were written packed or one by one.

    Raises:
        DataError: it is no message, or floats are cut.
    """
    for field, kind, begin, end in fields(data, 0, len(data)):
        if field == 1 and kind in (BYTES, wire_type):
            if kind == BYTES and wire_type == FIXED32 and (end - begin) % 4:
                raise DataError(f"a list of floats has {end - begin} bytes; expected a multiple of 4")
            yield data[begin:end]


def integers(values: bytes) -> tuple[int, ...]:
    """Numbers of field 1, signed.

    Raises:
        DataError: it is no message.
    """
    numbers: list[int] = []
    for value in packed(values, VARINT):
        position = 0
        while position < len(value):
            number, position = varint(value, position, len(value))
            numbers.append(number - (1 << 64) if number >= 1 << 63 else number)
    return tuple(numbers)


def message(field: int, value: bytes) -> bytes:
    """Encode one field that holds a message, a text or bytes."""
    return encoded(field << 3 | BYTES) + encoded(len(value)) + value


def encoded(number: int) -> bytes:
    """Encode a varint."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
