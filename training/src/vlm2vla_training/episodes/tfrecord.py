"""TFRecord files without TensorFlow: record after record, every checksum compared, constant memory.

A record is: length (uint64), masked CRC-32C of these 8 bytes, data, masked CRC-32C of the data; all little endian.
Source: https://www.tensorflow.org/tutorials/load_data/tfrecord (TFRecords format details).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from vlm2vla_training.errors import DataError

# A whole Bridge episode is about 2 MB; a length beyond this is refused even when its checksum holds.
MAX_RECORD_BYTES = 1 << 30
_MASK_DELTA = 0xA282EAD8
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


class Record(NamedTuple):
    """One whole record: its number in the file from 0, the byte offset of its header, and its data."""

    number: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Damage:
    """What cannot be read: the file, the record's number, where its header begins, and why."""

    file: str
    record: int
    offset: int
    what: str


def masked_crc(data: bytes) -> int:
    """CRC-32C of `data` with TFRecord's mask: rotated right by 15 bits, plus a constant, modulo 2^32."""
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def frame_record(data: bytes) -> bytes:
    """Frame `data` as one record, as a writer of TFRecords does."""
    length = struct.pack("<Q", len(data))
    return length + _FOOTER.pack(masked_crc(length)) + data + _FOOTER.pack(masked_crc(data))


def read_records(path: Path, damaged: Callable[[Damage], None]) -> Iterator[Record]:
    """Yield the whole records of one file; each damaged one is told to `damaged` and left out.

    Behind damaged data reading goes on at the next record; behind a damaged length nothing can be found any more, and
    a file that ends inside a record is cut: both end the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        number = offset = 0
        while offset < size:
            trouble = _bad_header(header := file.read(_HEADER.size), size - offset)
            if trouble:
                damaged(Damage(str(path), number, offset, f"{trouble}; the rest of the file ({size - offset} bytes)"))
                return
            length = _HEADER.unpack(header)[0]
            data = file.read(length)
            if _FOOTER.unpack(file.read(_FOOTER.size))[0] == masked_crc(data):
                yield Record(number, offset, data)
            else:
                end = offset + _HEADER.size + length + _FOOTER.size
                damaged(Damage(str(path), number, offset, f"wrong checksum of the data, bytes {offset} to {end - 1}"))
            number += 1
            offset += _HEADER.size + length + _FOOTER.size


def record_at(path: Path, number: int, offset: int) -> Record:
    """Read the one record whose header begins at `offset`.

    Raises:
        DataError: it is damaged.
    """
    with path.open("rb") as file:
        file.seek(offset)
        header = file.read(_HEADER.size)
        trouble = _bad_header(header, path.stat().st_size - offset)
        data = b"" if trouble else file.read(_HEADER.unpack(header)[0])
        if trouble or _FOOTER.unpack(file.read(_FOOTER.size))[0] != masked_crc(data):
            raise DataError(f"{path} record {number} at byte {offset}: {trouble or 'wrong checksum of the data'}")
    return Record(number, offset, data)


def _bad_header(header: bytes, left: int) -> str | None:
    """Say what is wrong with a record's header when `left` bytes of the file begin with it."""
    if len(header) < _HEADER.size:
        return "file is cut inside a record's header"
    length, crc = _HEADER.unpack(header)
    if crc != masked_crc(header[:8]):
        return "checksum of the record's length is wrong"
    if length > MAX_RECORD_BYTES:
        return f"record of {length} bytes; expected at most {MAX_RECORD_BYTES}"
    if left < _HEADER.size + length + _FOOTER.size:
        return f"file is cut inside a record: {left} bytes left of {_HEADER.size + length + _FOOTER.size}"
    return None


def shards_of(path: Path) -> list[Path]:
    """List TFRecord files: `path` itself, or every file below the folder whose name holds ".tfrecord"."""
    if path.is_file():
        return [path]
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names if ".tfrecord" in name)
    return sorted(found)
