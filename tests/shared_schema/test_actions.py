"""The parser of action chunks: strict, linear in the text, and the same whether the text comes whole or in pieces."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.parsing import RowStream, decode_digits, encode_digits, format_actions, parse_actions
from vlm2vla_schema.types import Chunk, check_digit_map

GOLDEN = Path(__file__).parent.parent / "golden"
ROW = "[0.01, -0.02, 0.0, 1.0]"
B2_TEXT = (
    "[[-0.002, -0.004, -0.023, 1.0], [0.007, -0.002, -0.045, 1.0], "
    "[0.0, 0.0, -0.006, 1.0], [0.001, -0.003, -0.003, 0.0]]"
)
DIGIT_MAP = {str(digit): f"<unused{6133 + digit}>" for digit in range(10)}

millimetres = st.integers(-100, 100).map(lambda number: number / 1000)
rows_strategy = st.lists(
    st.tuples(millimetres, millimetres, millimetres, st.sampled_from([0.0, 1.0])).map(list), min_size=1, max_size=32
)


def _refuse(literal: str) -> NoReturn:
    raise ValueError(literal)


def reference(text: str) -> list[list[float]] | None:
    """An independent reading of undecorated text by the standard library; None where it must be refused."""
    try:
        value: Any = json.loads(text, parse_constant=_refuse, parse_int=float)
    except ValueError:
        return None
    if not isinstance(value, list) or not 1 <= len(value) <= 32:
        return None
    for row in value:
        if not isinstance(row, list) or len(row) != 4 or not all(type(number) is float for number in row):
            return None
        if any(not math.isfinite(number) or abs(number) > 0.1 for number in row[:3]) or row[3] not in (0.0, 1.0):
            return None
    return value


def outcome(text: str) -> list[list[float]] | None:
    try:
        return parse_actions(text).rows
    except ParseError as error:
        assert error.raw_text == text
        assert error.expected
        return None


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def streamed(pieces: list[str], digit_map: dict[str, str] | None = None) -> tuple[list[list[float]], Chunk | None]:
    stream = RowStream(digit_map=digit_map)
    rows: list[list[float]] = []
    try:
        for piece in pieces:
            rows += stream.feed(piece)
        return rows, stream.close()
    except ParseError as error:
        with pytest.raises(ParseError):
            stream.feed("")
        assert error.raw_text == stream.raw_text
        return rows, None


def test_the_printed_example_is_canonical() -> None:
    rows = json.loads((GOLDEN / "b2_chunking.json").read_text())["after"]
    assert format_actions(rows) == B2_TEXT
    assert parse_actions(B2_TEXT).rows == rows


@pytest.mark.parametrize(
    "text",
    [
        f"[{ROW}]",
        f" \r\n\t[ {ROW} ]\n",
        "[[0,0,0,1]]",
        "[[1e-2,0.1,-0.1,0]]",
        "[[0.010,-1E-3,1.0e-2,1.00]]",
        f"```\n[{ROW}]\n```",
        f"```json\n[{ROW}]\n```",
        f"  ```python\r\n[{ROW},\n {ROW}]\r\n```\n",
        "[" + ",".join([ROW] * 32) + "]",
        "[[0." + "0" * 5000 + "1,0,0,1]]",
    ],
)
def test_accepted(text: str) -> None:
    assert parse_actions(text).rows


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "[]",
        "[[]]",
        ROW,
        f"[{ROW}",
        f"[{ROW}],",
        f"[{ROW},]",
        f"[{ROW} {ROW}]",
        f"[,{ROW}]",
        f"[{ROW}]]",
        f"[[{ROW}]]",
        f"[{ROW}] [{ROW}]",
        f"Here: [{ROW}]",
        f"[{ROW}] done",
        "[[0,0,0]]",
        "[[0,0,0,1,0]]",
        "[[0,0,0,1,]]",
        "[[0,0,,1]]",
        "[[0 0 0 1]]",
        "[(0,0,0,1)]",
        "([0,0,0,1],)",
        "[[true,0,0,1]]",
        "[[0,0,0,true]]",
        "[[0,0,0,null]]",
        '[["0",0,0,1]]',
        "[[NaN,0,0,1]]",
        "[[Infinity,0,0,1]]",
        "[[-Infinity,0,0,1]]",
        "[[nan,0,0,1]]",
        "[[inf,0,0,1]]",
        "[[1e999,0,0,1]]",
        "[[-1e999,0,0,1]]",
        "[[0,0,0,1e999]]",
        "[[+0.01,0,0,1]]",
        "[[.01,0,0,1]]",
        "[[1.,0,0,1]]",
        "[[00.01,0,0,1]]",
        "[[01,0,0,1]]",
        "[[- 0.01,0,0,1]]",
        "[[0x1,0,0,1]]",
        "[[0_0,0,0,1]]",
        "[[1e,0,0,1]]",
        "[[--0,0,0,1]]",
        "[[0.01-0.02,0,0,1]]",
        "[[0.101,0,0,1]]",
        "[[0,-0.1001,0,1]]",
        "[[0,0,0,0.5]]",
        "[[0,0,0,-1]]",
        "[[0,0,0,2]]",
        "[[\u0661,0,0,1]]",
        "[[0,0,0,1]]\x00",
        "[[0,0,0,1]]\u00a0",
        "\ufeff[[0,0,0,1]]",
        "[" + ",".join([ROW] * 33) + "]",
        f"```\n[{ROW}]",
        f"[{ROW}]\n```",
        f"```\n```\n[{ROW}]\n```\n```",
        f"```\n[{ROW}]\n```\n```",
        f"```\n[{ROW}]\n``",
        f"```\n[{ROW}]\n````",
        f"````\n[{ROW}]\n````",
        f"```[{ROW}]```",
        f"`[{ROW}]`",
        f"```a(b)\n[{ROW}]\n```",
        "```\n```",
        '{"actions": [[0,0,0,1]]}',
        "[[0,0,0,1]] # comment",
        "[[" + "0" * 10_000 + ",0,0,1]]",
        "[[0.01,0,0,1]\ud800]",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_actions(text)
    assert caught.value.raw_text == text


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000_000,
        "[[" + "9" * 10_000_000,
        "[[0." + "1" * 10_000_000 + ",0,0,1]]",
        " " * 10_000_000,
        "```" + "\n" * 10_000_000,
        "[" + ROW + " " * 10_000_000,
        "[" + (ROW + ",") * 400_000,
        "[[1e" + "9" * 10_000_000 + ",0,0,1]]",
        "`" * 10_000_000,
    ],
    ids=["nesting", "digits", "decimals", "space", "lines", "tail", "rows", "exponent", "ticks"],
)
def test_hostile_text_costs_linear_time(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ParseError):
        parse_actions(text)
    assert time.process_time() - start < 5.0


def test_one_character_at_a_time_costs_linear_time() -> None:
    start = time.process_time()
    stream = RowStream()
    for char in "[[0." + "1" * 200_000:
        stream.feed(char)
    with pytest.raises(ParseError):
        stream.feed(",0,0,1]]" + "x")
    assert time.process_time() - start < 5.0


def test_the_limits_are_settings() -> None:
    assert parse_actions("[[0.25,0,0,1]]", max_row_translation_m=0.25).rows == [[0.25, 0.0, 0.0, 1.0]]
    with pytest.raises(ParseError):
        parse_actions("[[0.06,0,0,1]]", max_row_translation_m=0.05)
    with pytest.raises(ParseError):
        parse_actions(f"[{ROW},{ROW}]", max_rows=1)
    with pytest.raises(ValueError, match="max_row_translation_m"):
        RowStream(max_row_translation_m=math.inf)
    with pytest.raises(ValueError, match="max_rows"):
        RowStream(max_rows=0)


@given(rows_strategy)
def test_canonical_text_parses_to_the_same_rows(rows: list[list[float]]) -> None:
    text = format_actions(rows)
    assert parse_actions(text).rows == rows
    assert "-0.0," not in text
    assert format_actions(parse_actions(text).rows) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.0, "0.0"), (-0.0004, "0.0"), (0.0006, "0.001"), (0.05, "0.05"), (-0.01, "-0.01"), (0.1, "0.1"), (0, "0.0")],
)
def test_canonical_numbers(value: float, text: str) -> None:
    assert format_actions([[value, 0.0, 0.0, 1.0]]) == f"[[{text}, 0.0, 0.0, 1.0]]"


@pytest.mark.parametrize(
    "rows", [[], [[0.0] * 3], [[0.0] * 5], [[math.nan, 0, 0, 1]], [[0, 0, math.inf, 1]], [[0, 0, 0, 0.5]]]
)
def test_rows_that_cannot_be_written(rows: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"expected|at least"):
        format_actions(rows)


@given(
    st.one_of(rows_strategy.map(format_actions), rows_strategy.map(json.dumps)),
    st.lists(
        st.tuples(st.integers(0), st.integers(0, 2), st.sampled_from(list("[],. -+eE0159\n`truNaI\"'"))), max_size=4
    ),
)
def test_mutated_text_agrees_with_an_independent_reading(text: str, mutations: list[tuple[int, int, str]]) -> None:
    for place, removed, inserted in mutations:
        at = place % (len(text) + 1)
        text = text[:at] + inserted + text[at + removed :]
    assert outcome(text) == reference(text)


@given(st.text(alphabet="[]-+.,eE019 \n`", max_size=40))
def test_any_text_agrees_with_an_independent_reading(text: str) -> None:
    if "`" not in text:
        assert outcome(text) == reference(text)
    else:
        outcome(text)


@given(
    st.one_of(rows_strategy.map(format_actions), st.text(alphabet="[]-.,e01 \n`", max_size=60)),
    st.sampled_from(["{}", " {}\n", "```\n{}\n```", "```json\n{}\n``` ", "```{}```", "{}\n```", "```\n{}"]),
    st.lists(st.integers(0), max_size=12),
)
def test_pieces_give_what_the_whole_text_gives(body: str, frame: str, places: list[int]) -> None:
    text = frame.replace("{}", body)
    rows, chunk = streamed(cut(text, places))
    whole = outcome(text)
    assert (None if chunk is None else chunk.rows) == whole
    if whole is not None:
        assert rows == whole


@given(rows_strategy)
def test_a_row_is_handed_over_with_its_closing_bracket(rows: list[list[float]]) -> None:
    stream = RowStream()
    handed = 0
    for piece in format_actions(rows)[:-1]:
        fresh = stream.feed(piece)
        assert bool(fresh) == (piece == "]")
        assert fresh == rows[handed : handed + len(fresh)]
        handed += len(fresh)
    assert handed == len(rows)
    assert stream.rows == rows
    stream.feed("]")
    assert stream.close().rows == rows


def test_rows_handed_over_cannot_be_changed_from_outside() -> None:
    stream = RowStream()
    stream.feed(f"[{ROW}")[0][0] = 9.0
    stream.rows[0][0] = 9.0
    stream.feed("]")
    assert stream.close().rows == [[0.01, -0.02, 0.0, 1.0]]


@given(rows_strategy, st.lists(st.integers(0), max_size=30))
def test_token_text_streams_like_plain_text(rows: list[list[float]], places: list[int]) -> None:
    text = encode_digits(format_actions(rows), DIGIT_MAP)
    assert parse_actions(text, digit_map=DIGIT_MAP).rows == rows
    handed, chunk = streamed(cut(text, places), DIGIT_MAP)
    assert chunk is not None
    assert handed == chunk.rows == rows


def test_the_printed_token_example() -> None:
    encoded = encode_digits("[[-0.002, 0.007]]", DIGIT_MAP)
    assert encoded == (
        "[[-<unused6133>.<unused6133><unused6133><unused6135>, <unused6133>.<unused6133><unused6133><unused6140>]]"
    )
    assert decode_digits(encoded, DIGIT_MAP) == "[[-0.002, 0.007]]"


@given(st.text(alphabet="<unsed613450>[.", max_size=60))
def test_decoding_leaves_other_text_as_it_is(text: str) -> None:
    expected = text
    for digit, token in DIGIT_MAP.items():
        expected = expected.replace(token, f"\0{digit}")
    assert decode_digits(text, DIGIT_MAP) == expected.replace("\0", "")


@pytest.mark.parametrize("text", ["[[<unused6133>, 0, 0, <unused61", "[[<unused9999>,0,0,1]]", "[[<,0,0,1]]"])
def test_token_text_that_is_refused(text: str) -> None:
    with pytest.raises(ParseError):
        parse_actions(text, digit_map=DIGIT_MAP)


@pytest.mark.parametrize(
    "digit_map",
    [
        {},
        {**DIGIT_MAP, "10": "<x>"},
        {**DIGIT_MAP, "9": ""},
        {**DIGIT_MAP, "9": DIGIT_MAP["8"]},
        {**DIGIT_MAP, "9": DIGIT_MAP["8"] + "x"},
        {**DIGIT_MAP, "9": "[a"},
        {**DIGIT_MAP, "9": "1a"},
        {**DIGIT_MAP, "9": "<" * 65},
    ],
)
def test_maps_that_cannot_be_undone_are_refused(digit_map: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="digit_map"):
        check_digit_map(digit_map)
