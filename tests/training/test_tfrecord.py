import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlds_files import Value, example, message, varint

from vlm2vla_training.episodes.tfexample import Example
from vlm2vla_training.episodes.tfrecord import Damage, frame_record, masked_crc, read_records, shards_of
from vlm2vla_training.errors import DataError

RECORDS = [b"first", b"", b"third record, a little longer"]


def written(folder: Path) -> Path:
    path = folder / "data.tfrecord"
    path.write_bytes(b"".join(frame_record(data) for data in RECORDS))
    return path


def test_checksums_are_those_of_the_standard() -> None:
    # RFC 3720, B.4: CRC-32C of 32 zero bytes is 0x8a9136aa; the mask is TFRecord's.
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_whole_files_give_every_record(tmp_path: Path) -> None:
    damage: list[Damage] = []
    records = list(read_records(written(tmp_path), damage.append))
    assert [record.data for record in records] == RECORDS and not damage
    assert [record.offset for record in records] == [0, 21, 37]


@pytest.mark.parametrize("place", range(37 + 16 + len(RECORDS[2])))
def test_every_flipped_byte_is_found_and_named(tmp_path: Path, place: int) -> None:
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)
    damage: list[Damage] = []
    found = [record.data for record in read_records(path, damage.append)]
    number = 0 if place < 21 else 1 if place < 37 else 2
    begin = (0, 21, 37)[number]
    assert [(one.file, one.record, one.offset) for one in damage] == [(str(path), number, begin)]
    in_header = place - begin < 12
    assert found == (RECORDS[:number] if in_header else RECORDS[:number] + RECORDS[number + 1 :])


@pytest.mark.parametrize("length", range(37 + 16 + len(RECORDS[2])))
def test_a_cut_file_keeps_what_is_whole(tmp_path: Path, length: int) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    damage: list[Damage] = []
    found = [record.data for record in read_records(path, damage.append)]
    whole = sum(length >= end for end in (21, 37))
    assert found == RECORDS[:whole]
    assert len(damage) == (0 if length in (0, 21, 37) else 1)
    assert all("cut" in one.what and one.record == whole for one in damage)


def test_an_absurd_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    length = struct.pack("<Q", 1 << 40)
    path = tmp_path / "a.tfrecord"
    path.write_bytes(length + struct.pack("<I", masked_crc(length)) + b"x")
    damage: list[Damage] = []
    assert not list(read_records(path, damage.append)) and "expected at most" in damage[0].what


def test_shards_are_found_below_a_folder_in_order(tmp_path: Path) -> None:
    names = ["b.tfrecord-00001-of-00002", "b.tfrecord-00000-of-00002"]
    for name in [*names, "features.json"]:
        (tmp_path / "1.0.0").mkdir(exist_ok=True)
        (tmp_path / "1.0.0" / name).write_bytes(b"")
    assert [path.name for path in shards_of(tmp_path)] == sorted(names)


@given(
    st.lists(st.binary(max_size=40), min_size=1, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), max_size=9),
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=9),
    st.booleans(),
)
def test_examples_round_trip(texts: list[bytes], numbers: list[float], whole: list[int], packed: bool) -> None:
    floats = np.array(numbers, np.float32)
    features: dict[str, Value] = {"texts": texts, "floats": floats, "whole": whole}
    read = Example(example(features, packed))
    assert read.names() == ["floats", "texts", "whole"]
    assert read.bytes_list("texts") == texts and read.integers("whole") == tuple(whole)
    assert np.array_equal(read.floats("floats"), floats)


def test_unknown_fields_are_passed_over() -> None:
    extra = varint(9 << 3) + varint(5) + varint(10 << 3 | 1) + bytes(8) + message(11, b"new")
    data = extra + example({"a": [1]}) + extra
    assert Example(data).integers("a") == (1,)


def test_missing_and_wrong_features_are_named() -> None:
    read = Example(example({"a": [1]}))
    with pytest.raises(DataError, match=r"'b' is missing; the record has a"):
        read.floats("b")
    with pytest.raises(DataError, match="holds integers; expected floats"):
        read.floats("a")


@given(st.binary(max_size=60))
def test_any_bytes_give_an_example_or_a_data_error(data: bytes) -> None:
    try:
        read = Example(data)
        for name in read.names():
            for decode in (read.bytes_list, read.floats, read.integers):
                try:
                    decode(name)
                except DataError:
                    continue
    except DataError:
        pass
