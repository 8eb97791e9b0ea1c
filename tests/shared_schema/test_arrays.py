"""Arrays of other people's wire formats, against their own libraries, and what must not be made of hostile ones."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import json_numpy
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpi_client import msgpack_numpy

from vlm2vla_schema.arrays import FLOATS, PIXELS, from_json, from_msgpack, to_json, to_msgpack
from vlm2vla_schema.errors import ArrayError

ARRAYS: list[np.ndarray[Any, Any]] = [
    np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    np.array([0.5, -1.25, 3.0]),
    np.array([[1, 2], [3, 4]], dtype=np.float32),
    np.zeros((0, 7)),
    np.arange(6.0).reshape(2, 3).T,
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_their_libraries_read_ours_and_we_read_theirs(array: np.ndarray[Any, Any]) -> None:
    dtypes = (*PIXELS, *FLOATS)
    theirs = json_numpy.loads(json.dumps(to_json(array)))
    ours = from_json(json.loads(json_numpy.dumps(array)), dtypes, 100)
    assert theirs.dtype == ours.dtype == array.dtype and np.array_equal(theirs, array) and np.array_equal(ours, array)
    theirs = msgpack_numpy.unpackb(msgpack.packb(to_msgpack(array)))
    ours = from_msgpack(msgpack.unpackb(msgpack_numpy.packb(array)), dtypes, 100)
    assert theirs.dtype == ours.dtype == array.dtype and np.array_equal(theirs, array) and np.array_equal(ours, array)


GOOD: dict[str, Any] = {"__numpy__": "AAAAAAAAAAA=", "dtype": "<f8", "shape": [1]}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "|O"},
        {"dtype": "<U9"},
        {"dtype": "<i8"},
        {"dtype": [["x", "<f8"]]},
        {"dtype": None},
        {"shape": [2]},
        {"shape": [-1]},
        {"shape": [True]},
        {"shape": [1.0]},
        {"shape": [1, 1, 1, 1]},
        {"shape": [10**9, 10**9]},
        {"shape": 1},
        {"__numpy__": "AAAAAAAAAA=="},
        {"__numpy__": "!!!!!!!!!!!="},
        {"__numpy__": 3},
    ],
    ids=str,
)
def test_nothing_is_made_of_what_is_no_such_array(changes: dict[str, Any]) -> None:
    assert from_json(GOOD, FLOATS, 10)[0] == 0.0
    with pytest.raises(ArrayError):
        from_json({**GOOD, **changes}, FLOATS, 10)
    data = changes.get("__numpy__", b"\0" * 8)
    data = data if isinstance(data, bytes) else b"\0" * 7
    value = {**GOOD, **changes}
    with pytest.raises(ArrayError):
        from_msgpack({b"data": data, b"dtype": value["dtype"], b"shape": value["shape"]}, FLOATS, 10)


def test_more_numbers_than_expected_are_refused_before_they_are_decoded() -> None:
    many = to_json(np.zeros(11))
    with pytest.raises(ArrayError, match="at most 10"):
        from_json(many, FLOATS, 10)
    with pytest.raises(ArrayError, match="at most 10"):
        from_msgpack(to_msgpack(np.zeros(11)), FLOATS, 10)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional={"__numpy__": anything, "dtype": anything, "shape": anything}) | anything)
def test_whatever_comes_is_an_array_or_an_array_error(value: Any) -> None:
    values = [value]
    if isinstance(value, dict):
        values.append({b"data": value.get("__numpy__"), b"dtype": value.get("dtype"), b"shape": value.get("shape")})
    for one, read in zip(values, (from_json, from_msgpack), strict=False):
        with contextlib.suppress(ArrayError):
            assert read(one, FLOATS, 100).size <= 100
