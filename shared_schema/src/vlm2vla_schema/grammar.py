"""Grammars (EBNF as xgrammar reads it) that constrained decoding enforces, built from the limits of the parsers.

Each accepts exactly the canonical text of its stage (see `parsing`): every completion that training writes, byte for
byte, and nothing that the parser would refuse. A motion plan has no grammar.
"""

from __future__ import annotations

from decimal import Decimal

from vlm2vla_schema.digits import encode_digits
from vlm2vla_schema.limits import (
    CONFIDENCES,
    MAX_REASONING_CHARS,
    MAX_ROW_TRANSLATION_M,
    MAX_ROWS,
    MAX_SUBTASK_CHARS,
    MAX_SUBTASKS,
    PUNCTUATION,
    check_row_limits,
)
from vlm2vla_schema.types import check_digit_map

_MM_PER_M = 1000
_MAX_LIMIT_MM = 9999
_MAX_UTF8_BYTES = 4
_LAST_CHARACTER = 0x10FFFF
_CONTROL = (0x00, 0x1F)
# Left out by name: a negated class would also accept the bytes of half a surrogate pair, which are no UTF-8 text.
_SURROGATES = (0xD800, 0xDFFF)
# A subtask without a word is refused by the parser, so its first character is no white space, whatever the script, and
# no punctuation.
_SPACES = (
    (0x20, 0x20),
    (0x85, 0x85),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
)


def actions_grammar(
    max_row_translation_m: float = MAX_ROW_TRANSLATION_M,
    max_rows: int = MAX_ROWS,
    digit_map: dict[str, str] | None = None,
) -> str:
    """The grammar of canonical action text (appendix B.2); with a `digit_map`, of its token text (appendix B.3).

    Raises:
        ValueError: a limit below 1 mm or from 10 m on, no rows, or no digit map.
    """
    limit_mm = _limit_mm(max_row_translation_m, max_rows)
    digits = _Digits(digit_map)
    rules = [
        f'root ::= "[" row (", " row){{0,{max_rows - 1}}} "]"' if max_rows > 1 else 'root ::= "[" row "]"',
        'row ::= "[" number ", " number ", " number ", " gripper "]"',
        f'gripper ::= {digits.span(0, 1)} "." {digits.span(0, 0)}',
        f'number ::= {digits.span(0, 0)} "." {digits.span(0, 0)} | "-"? size',
        "size ::= " + " | ".join(_sizes(limit_mm, digits)),
        f"any ::= {digits.span(0, 9)}",
        f"some ::= {digits.span(1, 9)}",
    ]
    return "\n".join(rules) + "\n"


class _Digits:
    """Writes digits as EBNF terms, in plain or in token text."""

    def __init__(self, digit_map: dict[str, str] | None) -> None:
        if digit_map is not None:
            check_digit_map(digit_map)
        self._map = digit_map

    def span(self, low: int, high: int) -> str:
        """One digit of low..high."""
        if self._map is None:
            return f"[{low}-{high}]"
        return "(" + " | ".join(_literal(self._map[str(digit)]) for digit in range(low, high + 1)) + ")"


def _literal(text: str) -> str:
    return '"' + "".join(char if char.isalnum() and char.isascii() else f"\\U{ord(char):08x}" for char in text) + '"'


def _sizes(limit_mm: int, digits: _Digits) -> list[str]:
    """Alternatives for canonical decimals of 1..limit_mm thousandths, e.g. 0.001, 0.01, 0.1."""
    metres, rest_mm = divmod(limit_mm, _MM_PER_M)
    sizes: list[str] = []
    if metres == 0:
        return [f'{digits.span(0, 0)} "." {term}' for term in _fractions(rest_mm, digits)]
    full = _fractions(_MM_PER_M - 1, digits)
    sizes += [f'{digits.span(0, 0)} "." {term}' for term in full]
    if metres > 1:
        sizes += [f'{digits.span(1, metres - 1)} "." {term}' for term in [digits.span(0, 0), *full]]
    sizes += [f'{digits.span(metres, metres)} "." {term}' for term in [digits.span(0, 0), *_fractions(rest_mm, digits)]]
    return sizes


def _fractions(limit: int, digits: _Digits) -> list[str]:
    """Alternatives for the digits after the point of 1..limit thousandths, without trailing zeros; limit 0..999."""
    first, rest = divmod(limit, 100)
    terms: list[str] = []
    if first > 0:
        terms += [f"{digits.span(0, 0)} some", f"{digits.span(0, 0)} any some"]
    if first > 1:
        below = digits.span(1, first - 1)
        terms += [below, f"{below} some", f"{below} any some"]
    head = digits.span(first, first)
    if first > 0:
        terms.append(head)
    second, third = divmod(rest, 10)
    if second > 0:
        terms += [f"{head} {digits.span(1, second)}", f"{head} {digits.span(0, second - 1)} some"]
    if third > 0:
        terms.append(f"{head} {digits.span(second, second)} {digits.span(1, third)}")
    return terms


def _characters(*excluded: tuple[int, int]) -> str:
    """The class of all Unicode characters but control characters, surrogates, `\\` and the given ranges."""
    backslash = (ord("\\"), ord("\\"))
    start, ranges = 0, []
    for low, high in sorted((_CONTROL, _SURROGATES, backslash, *excluded)):
        if start < low:
            ranges.append(f"\\U{start:08x}-\\U{low - 1:08x}")
        start = high + 1
    return "[" + "".join(ranges) + f"\\U{start:08x}-\\U{_LAST_CHARACTER:08x}]"


def subtasks_grammar() -> str:
    """The grammar of canonical subtask lists: single quotes as in appendix D.4's example, `\\'` and `\\\\` escaped."""
    quote = (ord("'"), ord("'"))
    punctuation = ((ord(mark), ord(mark)) for mark in PUNCTUATION)
    return (
        f'root ::= "[" subtask (", " subtask){{0,{MAX_SUBTASKS - 1}}} "]"\n'
        f'subtask ::= "\'" first char{{0,{MAX_SUBTASK_CHARS - 1}}} "\'"\n'
        f"first ::= {_characters(*punctuation, *_SPACES)}\n"
        f"char ::= {_characters(quote)} | escape\n"
        'escape ::= "\\\\\'" | "\\\\\\\\"\n'
    )


def verdict_grammar() -> str:
    """The grammar of canonical verdicts: one line of JSON with the fields of appendix D.5 in its order."""
    confidences = " | ".join(f'"{confidence}"' for confidence in CONFIDENCES)
    quote = (ord('"'), ord('"'))
    # Counted in blocks: the matcher's time for a token grows with the count, and one count of 500 costs 20 ms a token.
    size = _largest_divisor(MAX_REASONING_CHARS, 25)
    blocks = MAX_REASONING_CHARS // size
    return (
        'root ::= "{\\"success\\": " ("true" | "false") ", \\"confidence\\": \\"" confidence '
        f'"\\", \\"reasoning\\": \\"" block{{0,{blocks - 1}}} char{{1,{size}}} "\\"}}"\n'
        f"block ::= char{{{size}}}\n"
        f"confidence ::= {confidences}\n"
        f'char ::= {_characters(quote)} | "\\\\\\"" | "\\\\\\\\"\n'
    )


def _largest_divisor(number: int, most: int) -> int:
    return max(size for size in range(1, most + 1) if number % size == 0)


def longest_actions_text(
    max_row_translation_m: float = MAX_ROW_TRANSLATION_M,
    max_rows: int = MAX_ROWS,
    digit_map: dict[str, str] | None = None,
) -> str:
    """A longest sentence of `actions_grammar`: a server may tokenize it to set its default `max_tokens`.

    Raises:
        ValueError: as `actions_grammar`.
    """
    limit_mm = _limit_mm(max_row_translation_m, max_rows)
    thousandths = limit_mm if limit_mm % 10 or limit_mm == 1 else limit_mm - 1
    number = f"-{thousandths // _MM_PER_M}.{thousandths % _MM_PER_M:03d}"
    row = f"[{number}, {number}, {number}, 1.0]"
    text = "[" + ", ".join([row] * max_rows) + "]"
    return text if digit_map is None else encode_digits(text, digit_map)


def longest_actions_chars(
    max_row_translation_m: float = MAX_ROW_TRANSLATION_M,
    max_rows: int = MAX_ROWS,
    digit_map: dict[str, str] | None = None,
) -> int:
    """Characters of the longest sentence of `actions_grammar`; each mapped digit counts as one, being one token.

    The text is ASCII and every token holds at least one character, so this many tokens always suffice (and one for the
    end of the turn). The default limits give 992.

    Raises:
        ValueError: as `actions_grammar`.
    """
    if digit_map is not None:
        check_digit_map(digit_map)
    return len(longest_actions_text(max_row_translation_m, max_rows))


def longest_subtasks_bytes() -> int:
    """UTF-8 bytes of the longest sentence of `subtasks_grammar`; no tokenizer needs more tokens than bytes."""
    quoted = MAX_SUBTASK_CHARS * _MAX_UTF8_BYTES + len("''")
    return MAX_SUBTASKS * quoted + (MAX_SUBTASKS - 1) * len(", ") + len("[]")


def longest_verdict_bytes() -> int:
    """UTF-8 bytes of the longest sentence of `verdict_grammar`; no tokenizer needs more tokens than bytes."""
    frame = '{"success": false, "confidence": "Medium", "reasoning": ""}'
    return len(frame) + MAX_REASONING_CHARS * _MAX_UTF8_BYTES


def _limit_mm(max_row_translation_m: float, max_rows: int) -> int:
    """The limit in whole millimetres, rounded down: canonical text has no finer step."""
    check_row_limits(max_row_translation_m, max_rows)
    limit_mm = int(Decimal(repr(float(max_row_translation_m))) * _MM_PER_M)
    if not 1 <= limit_mm <= _MAX_LIMIT_MM:
        raise ValueError(f"max_row_translation_m must be at least 0.001 and below 10, got {max_row_translation_m}")
    return limit_mm
