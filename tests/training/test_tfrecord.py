import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as example_of
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


_FEATURES = st.dictionaries(
    st.sampled_from(["a", "b", "steps/long/name", "d"]),
    st.one_of(
        st.lists(st.binary(max_size=300), min_size=1, max_size=4),
        st.lists(st.integers(0, 1 << 40), min_size=1, max_size=40),
        st.lists(st.floats(width=32, allow_nan=False), max_size=40).map(lambda one: np.array(one, np.float32)),
    ),
)


@given(_FEATURES, _FEATURES, st.booleans())
@example_of({}, {"a": np.array([-7.8342265e15], np.float32)}, False)
def test_what_the_record_before_looked_like_changes_nothing(
    before: dict[str, Value], features: dict[str, Value], packed: bool
) -> None:
    """A layout is only a hint: with one that fits, one that does not and none, a record holds the same."""
    data = example(features, packed)
    plain = Example(data)
    for layout in (plain.layout, Example(example(before)).layout):
        hinted = Example(data, layout)
        assert hinted.names() == plain.names() == sorted(features)
        assert Example(message(1, hinted.entries(hinted.names()))).names() == hinted.names()
        for name, value in features.items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(hinted.floats(name), value)
                assert np.array_equal(hinted.rows(name, 1), value[:, None])
            elif isinstance(value[0], bytes):
                assert hinted.bytes_list(name) == value
            else:
                assert list(hinted.integers(name)) == value


def test_a_layout_is_followed_and_unusual_entries_are_still_read() -> None:
    first = Example(example({"a": [1], "b": [b"x"]}))
    second = Example(example({"a": [2, 3], "b": [b"y" * 70_000] * 2}), first.layout)
    assert second.layout is first.layout and second.integers("a") == (2, 3)
    assert second.bytes_list("b") == [b"y" * 70_000] * 2
    # The value before the name, a field behind the value, and a feature of no kind: all as the format allows.
    turned = message(1, message(2, message(3, message(1, b"\x07"))) + message(1, b"a"))
    trailing = message(1, message(1, b"b") + message(2, message(1, message(1, b"z"))) + message(9, b"new"))
    empty = message(1, message(1, b"c") + message(2, b""))
    odd = Example(message(1, turned + trailing + empty), first.layout)
    assert odd.layout is None and Example(message(1, odd.entries(["b", "a"]))).integers("a") == (7,)
    assert odd.integers("a") == (7,) and odd.bytes_list("b") == [b"z"] and "c" not in odd
    trailed = Example(
        message(
            1,
            message(1, message(1, b"a") + message(2, message(3, message(1, b"\x08"))) + b"\x48\x01")
            + message(1, message(1, b"b") + message(2, message(1, message(1, b"w")))),
        ),
        first.layout,
    )
    assert trailed.integers("a") == (8,) and trailed.bytes_list("b") == [b"w"]


def test_rows_are_whole() -> None:
    read = Example(example({"a": np.arange(6, dtype=np.float32)}))
    assert read.rows("a", 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(DataError, match="6 values; expected rows of 4"):
        read.rows("a", 4)


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
