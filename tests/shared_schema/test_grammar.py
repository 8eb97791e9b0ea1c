"""The grammars, run by the real xgrammar: they accept all canonical text, and all that they accept parses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import xgrammar as xgr
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_schema import grammar
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.limits import PUNCTUATION
from vlm2vla_schema.parsing import (
    decode_digits,
    encode_digits,
    format_actions,
    format_subtasks,
    format_verdict,
    parse_actions,
    parse_subtasks,
    parse_verdict,
)
from vlm2vla_schema.types import Verdict

GOLDEN = Path(__file__).parent.parent / "golden"
END = 256
DIGIT_MAP = {str(digit): f"<unused{6133 + digit}>" for digit in range(10)}

millimetres = st.integers(-100, 100).map(lambda number: number / 1000)
rows_strategy = st.lists(
    st.tuples(millimetres, millimetres, millimetres, st.sampled_from([0.0, 1.0])).map(list), min_size=1, max_size=32
)
written = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=80).filter(
    lambda text: not text[0].isspace() and text[0] not in PUNCTUATION
)
verdicts = st.builds(
    Verdict,
    success=st.booleans(),
    confidence=st.sampled_from(["High", "Medium", "Low"]),
    reasoning=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=500),
)


@cache
def compiler() -> xgr.GrammarCompiler:
    """A vocabulary of single bytes and an end token: every grammar can be walked character by character."""
    vocabulary = [bytes([value]) for value in range(256)] + [b"</s>"]
    return xgr.GrammarCompiler(xgr.TokenizerInfo(vocabulary, xgr.VocabType.RAW, stop_token_ids=[END]))


@cache
def compiled(ebnf: str) -> xgr.CompiledGrammar:
    return compiler().compile_grammar(xgr.Grammar.from_ebnf(ebnf))


def accepts(ebnf: str, text: str | bytes) -> bool:
    matcher = xgr.GrammarMatcher(compiled(ebnf))
    return bool(matcher.accept_string(text)) and bool(matcher.accept_token(END))


def sentence(ebnf: str, seed: int, prefer: bytes = b"", max_bytes: int = 20_000) -> bytes:
    """A random sentence: at each byte one of those that the grammar allows, mostly from `prefer` where it can."""
    chooser = random.Random(seed)
    matcher = xgr.GrammarMatcher(compiled(ebnf))
    mask = xgr.allocate_token_bitmask(1, END + 1)
    out = bytearray()
    while len(out) < max_bytes:
        matcher.fill_next_token_bitmask(mask)
        bits = mask[0].to(torch.int64).tolist()
        allowed = [token for token in range(END + 1) if bits[token // 32] >> (token % 32) & 1]
        preferred = [token for token in allowed if token < END and token in prefer]
        token = chooser.choice(preferred if preferred and chooser.random() < 0.97 else allowed)
        assert matcher.accept_token(token)
        if token == END:
            return bytes(out)
        out.append(token)
    raise AssertionError("the grammar has no end in sight")


@given(rows_strategy)
def test_every_canonical_chunk_is_accepted(rows: list[list[float]]) -> None:
    text = format_actions(rows)
    assert accepts(grammar.actions_grammar(), text)
    assert accepts(grammar.actions_grammar(digit_map=DIGIT_MAP), encode_digits(text, DIGIT_MAP))


def test_the_printed_example_is_accepted() -> None:
    rows = json.loads((GOLDEN / "b2_chunking.json").read_text())["after"]
    assert accepts(grammar.actions_grammar(), format_actions(rows))


@pytest.mark.parametrize("limit_m", [0.001, 0.009, 0.01, 0.05, 0.0505, 0.099, 0.1, 0.123, 0.2, 0.999, 1.0, 1.05, 2.345])
def test_exactly_the_canonical_numbers_within_the_limit_are_accepted(limit_m: float) -> None:
    ebnf = grammar.actions_grammar(limit_m, 1)
    matcher_of_numbers = ebnf.replace('root ::= "[" row "]"', "root ::= number")
    for thousandths in range(-2400, 2401):
        number = format_actions([[thousandths / 1000, 0, 0, 1]])[2:].split(",")[0]
        assert accepts(matcher_of_numbers, number) == (abs(thousandths) / 1000 <= limit_m), number


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[[]]",
        "[[0, 0, 0, 1]]",
        "[[0.0,0.0,0.0,1.0]]",
        "[[0.0, 0.0, 0.0, 1.0],[0.0, 0.0, 0.0, 1.0]]",
        "[[0.0, 0.0, 0.0, 1.0], ]",
        "[[0.0, 0.0, 0.0, 1]]",
        "[[0.0, 0.0, 0.0, 0.5]]",
        "[[0.0, 0.0, 0.0, 1.00]]",
        "[[-0.0, 0.0, 0.0, 1.0]]",
        "[[-0.000, 0.0, 0.0, 1.0]]",
        "[[0.00, 0.0, 0.0, 1.0]]",
        "[[0.010, 0.0, 0.0, 1.0]]",
        "[[0.0101, 0.0, 0.0, 1.0]]",
        "[[0.101, 0.0, 0.0, 1.0]]",
        "[[0.11, 0.0, 0.0, 1.0]]",
        "[[1.0, 0.0, 0.0, 1.0]]",
        "[[+0.01, 0.0, 0.0, 1.0]]",
        "[[0.0, 0.0, 1.0]]",
        "[[0.0, 0.0, 0.0, 0.0, 1.0]]",
        " [[0.0, 0.0, 0.0, 1.0]]",
        "[[0.0, 0.0, 0.0, 1.0]]\n",
        "[" + ", ".join(["[0.0, 0.0, 0.0, 1.0]"] * 33) + "]",
    ],
)
def test_text_that_is_not_canonical_is_not_accepted(text: str) -> None:
    assert not accepts(grammar.actions_grammar(), text)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("limit_m", "max_rows"), [(0.1, 32), (0.037, 3), (1.5, 1)])
def test_random_sentences_of_actions_parse_and_are_canonical(seed: int, limit_m: float, max_rows: int) -> None:
    text = sentence(grammar.actions_grammar(limit_m, max_rows), seed).decode()
    rows = parse_actions(text, limit_m, max_rows).rows
    assert format_actions(rows) == text
    assert len(text) <= grammar.longest_actions_chars(limit_m, max_rows)


@pytest.mark.parametrize("seed", range(6))
def test_random_token_sentences_parse(seed: int) -> None:
    text = sentence(grammar.actions_grammar(digit_map=DIGIT_MAP), seed).decode()
    rows = parse_actions(text, digit_map=DIGIT_MAP).rows
    assert format_actions(rows) == decode_digits(text, DIGIT_MAP)


def test_mapped_digits_may_be_single_tokens() -> None:
    vocabulary = ["[", "]", ", ", ".", "-", *DIGIT_MAP.values(), "</s>"]
    info = xgr.TokenizerInfo(vocabulary, xgr.VocabType.RAW, stop_token_ids=[len(vocabulary) - 1])
    ebnf = grammar.actions_grammar(digit_map=DIGIT_MAP)
    matcher = xgr.GrammarMatcher(xgr.GrammarCompiler(info).compile_grammar(xgr.Grammar.from_ebnf(ebnf)))
    token_of = {token: place for place, token in enumerate(vocabulary)}
    pieces = ["[", "[", *(["-", "0", ".", "0", "2", ", "] * 3), "1", ".", "0", "]", "]"]
    for piece in pieces:
        assert matcher.accept_token(token_of[DIGIT_MAP.get(piece, piece)])
    assert matcher.accept_token(len(vocabulary) - 1)


@given(st.lists(written, min_size=1, max_size=20))
def test_every_canonical_list_of_subtasks_is_accepted(names: list[str]) -> None:
    assert accepts(grammar.subtasks_grammar(), format_subtasks(names))


@given(verdicts)
def test_every_canonical_verdict_is_accepted(verdict: Verdict) -> None:
    assert accepts(grammar.verdict_grammar(), format_verdict(verdict))


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "['']",
        "[' ']",
        "['\u3000a']",
        "[', ', 'a']",
        "['(a)']",
        "['\\'a']",
        "['\u00a0']",
        '["a"]',
        "['a','b']",
        "['a\n']",
        "['" + "x" * 81 + "']",
        "['\\x41']",
    ],
)
def test_other_lists_of_subtasks_are_not_accepted(text: str) -> None:
    assert not accepts(grammar.subtasks_grammar(), text)


def test_the_bounds_on_subtasks_and_reasoning_are_met() -> None:
    names = ["😀" * 80] * 20
    text = format_subtasks(names)
    assert accepts(grammar.subtasks_grammar(), text)
    assert len(text.encode()) == grammar.longest_subtasks_bytes()
    assert not accepts(grammar.subtasks_grammar(), text[:-1] + ", 'x']")
    verdict = format_verdict(Verdict(success=False, confidence="Medium", reasoning="😀" * 500))
    assert accepts(grammar.verdict_grammar(), verdict)
    assert len(verdict.encode()) == grammar.longest_verdict_bytes()
    assert not accepts(grammar.verdict_grammar(), verdict.replace("😀", "😀😀", 1))
    assert not accepts(grammar.verdict_grammar(), '{"success": true, "confidence": "High", "reasoning": ""}')


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("ebnf", "parse"),
    [(grammar.subtasks_grammar(), parse_subtasks), (grammar.verdict_grammar(), parse_verdict)],
    ids=["subtasks", "verdict"],
)
@pytest.mark.parametrize("prefer", [b"ab '\\\",]}", b"", b"\xf0\xa0\xed\xe0\x80\xc3"])
def test_random_sentences_of_bytes_parse(ebnf: str, parse: Callable[[str], object], prefer: bytes, seed: int) -> None:
    parse(sentence(ebnf, seed, prefer).decode("utf-8", "replace"))


def test_the_longest_chunk_is_a_sentence() -> None:
    text = grammar.longest_actions_text()
    assert accepts(grammar.actions_grammar(), text)
    assert len(text) == grammar.longest_actions_chars() == grammar.longest_actions_chars(digit_map=DIGIT_MAP)
    assert len(parse_actions(text).rows) == 32
    for limit_m in (0.001, 0.01, 0.011, 0.05, 1.0, 1.5):
        text = grammar.longest_actions_text(limit_m, 2, DIGIT_MAP)
        assert accepts(grammar.actions_grammar(limit_m, 2, DIGIT_MAP), text)


@pytest.mark.parametrize(("limit_m", "max_rows"), [(0.0, 1), (0.0009, 1), (10.0, 1), (float("nan"), 1), (0.1, 0)])
def test_limits_without_a_grammar_are_refused(limit_m: float, max_rows: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        grammar.actions_grammar(limit_m, max_rows)


def test_a_sentence_that_the_parser_refuses_is_a_parse_error() -> None:
    with pytest.raises(ParseError):
        parse_actions(grammar.longest_actions_text(), max_row_translation_m=0.05)
