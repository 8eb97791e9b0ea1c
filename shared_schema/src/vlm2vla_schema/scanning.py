"""Scanners under `parsing`: each looks at every character once and never evaluates text.

`ScanError` carries a message only; `parsing` turns it into a ParseError with the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum, auto

from vlm2vla_schema.limits import ROW_WIDTH

SPACE = " \t\r\n"
_FENCED = re.compile(r"```[A-Za-z0-9_+ \t\r-]{0,32}\n")
_SPACES = re.compile(r"[ \t\r\n]*")
_NUMBER_RUN = re.compile(r"[-+0-9.eE]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_PLAIN = {"'": re.compile(r"[^'\\\x00-\x1f]+"), '"': re.compile(r'[^"\\\x00-\x1f]+')}
_SIMPLE_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_HEX_ESCAPES = {kind: re.compile(rf"[0-9a-fA-F]{{{width}}}") for kind, width in (("x", 2), ("u", 4), ("U", 8))}


class ScanError(Exception):
    """The text cannot be what it should be."""


def undecorate(text: str) -> str:
    """Strip white space and at most one Markdown code fence.

    Raises:
        ScanError: a fence that is opened is not closed on a line of its own.
    """
    body = text.strip(SPACE)
    if not body.startswith("```"):
        return body
    opening = _FENCED.match(body)
    if opening is None:
        raise ScanError("the opening code fence is not a line of its own")
    if not body.endswith("```"):
        raise ScanError("the code fence is not closed")
    inner = body[opening.end() : len(body) - 3]
    if inner.strip(SPACE) and not inner.rstrip(" \t").endswith("\n"):
        raise ScanError("the closing code fence is not on a line of its own")
    return inner.strip(SPACE)


class _Cursor:
    """A position in a text that only moves forward."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip_space(self) -> None:
        match = _SPACES.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, wanted: str) -> bool:
        """Step over `wanted` if it comes next."""
        found = self.text.startswith(wanted, self.at)
        if found:
            self.at += len(wanted)
        return found


def scan_string_list(text: str, max_items: int, max_chars: int) -> list[str]:
    """Read a list of strings in JSON or Python quoting, each quote as it comes.

    Not accepted: a comma after the last item, prefixes (r'', b''), triple quotes, joined literals.

    Raises:
        ScanError: anything else, over `max_items` items, or an item over `max_chars` characters.
    """
    cursor = _Cursor(text)
    if not cursor.take("["):
        raise ScanError("the text does not start with '['")
    items: list[str] = []
    cursor.skip_space()
    while True:
        items.append(_scan_string(cursor, max_chars))
        if len(items) > max_items:
            raise ScanError(f"more than {max_items} items")
        cursor.skip_space()
        if cursor.take("]"):
            break
        if not cursor.take(","):
            raise ScanError(f"no ',' or ']' after item {len(items)}")
        cursor.skip_space()
    if cursor.at != len(text):
        raise ScanError("text after the closing ']'")
    return items


def _scan_string(cursor: _Cursor, max_chars: int) -> str:
    quote = cursor.peek()
    if quote not in ("'", '"') or not quote:
        raise ScanError(f"no quoted string at character {cursor.at}")
    cursor.at += 1
    pieces: list[str] = []
    # An escape adds one piece, so the bound on pieces also bounds the work on a text made of escapes; a surrogate
    # pair takes two pieces for one character.
    while len(pieces) <= 2 * max_chars + 1:
        run = _PLAIN[quote].match(cursor.text, cursor.at)
        if run is not None:
            if run.end() - run.start() > max_chars:
                break
            pieces.append(run.group())
            cursor.at = run.end()
        if cursor.take(quote):
            value = _join_surrogates("".join(pieces))
            if len(value) <= max_chars:
                return value
            break
        if not cursor.take("\\"):
            what = "is not closed" if not cursor.peek() else "holds a raw control character"
            raise ScanError(f"the string {what} at character {cursor.at}")
        pieces.append(_scan_escape(cursor, quote))
    raise ScanError(f"a string is longer than {max_chars} characters")


def _scan_escape(cursor: _Cursor, quote: str) -> str:
    kind = cursor.peek()
    cursor.at += 1
    if kind in _SIMPLE_ESCAPES:
        return _SIMPLE_ESCAPES[kind]
    if kind == "/" and quote == '"':
        return "/"
    digits = _HEX_ESCAPES[kind].match(cursor.text, cursor.at) if kind in _HEX_ESCAPES else None
    if digits is None:
        raise ScanError(f"unknown escape at character {cursor.at - 2}")
    cursor.at = digits.end()
    code = int(digits.group(), 16)
    if code > 0x10FFFF:
        raise ScanError(f"an escape names no character at character {cursor.at}")
    return chr(code)


def _join_surrogates(value: str) -> str:
    r"""JSON writes one character above U+FFFF as two escapes (\ud83d\ude00); half a pair is no text."""
    try:
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ScanError("a string holds half a surrogate pair") from None


class _State(Enum):
    BEFORE = auto()  # white space, then an opening fence or the list
    TICKS = auto()  # inside "```" of the opening fence
    INFO = auto()  # the rest of the opening fence's line
    LIST = auto()  # before the outer '['
    FIRST_ROW = auto()  # after the outer '[': a row
    NEXT_ROW = auto()  # after ',': a row
    ROW_START = auto()  # before a number
    NUMBER = auto()  # inside a number
    NUMBER_END = auto()  # after a number: ',' or ']'
    ROW_END = auto()  # after a row: ',' or ']'
    AFTER = auto()  # after the list: white space, then the closing fence if one was opened
    AFTER_LINE = auto()  # the same, at the start of a line
    CLOSING = auto()  # inside "```" of the closing fence
    END = auto()  # only white space may follow


_STEP: dict[tuple[_State, str], _State] = {
    (_State.LIST, "["): _State.FIRST_ROW,
    (_State.FIRST_ROW, "["): _State.ROW_START,
    (_State.NEXT_ROW, "["): _State.ROW_START,
    (_State.NUMBER_END, ","): _State.ROW_START,
    (_State.ROW_END, ","): _State.NEXT_ROW,
    (_State.ROW_END, "]"): _State.AFTER,
}
_WANTED = {
    _State.LIST: "'['",
    _State.FIRST_ROW: "a row starting with '['",
    _State.NEXT_ROW: "a row starting with '['",
    _State.ROW_START: "a number",
    _State.NUMBER_END: "',' or ']'",
    _State.ROW_END: "',' or ']'",
}
_MAX_INFO_CHARS = 32


class RowScanner:
    """A push scanner for a list of rows of `ROW_WIDTH` JSON numbers; text may be cut anywhere between two pushes."""

    def __init__(self, check_row: Callable[[list[float]], None]) -> None:
        """`check_row` sees each row once, in order, and raises ScanError for one that must not pass."""
        self._check_row = check_row
        self._state = _State.BEFORE
        self._fenced = False
        self._count = 0
        self._number: list[str] = []
        self._row: list[float] = []

    def push(self, text: str) -> list[list[float]]:
        """Take the next piece of text; return the rows whose closing bracket it holds.

        Raises:
            ScanError: no continuation of the text so far can be a list of rows.
        """
        rows: list[list[float]] = []
        at = 0
        while at < len(text):
            at = self._advance(text, at, rows)
        return rows

    def finish(self) -> None:
        """The text is over.

        Raises:
            ScanError: the list, or the fence around it, is not closed.
        """
        after = self._state in (_State.AFTER, _State.AFTER_LINE)
        if self._state is _State.END or (after and not self._fenced):
            return
        list_closed = after or self._state is _State.CLOSING
        raise ScanError("the code fence is not closed" if list_closed else "the list is not closed")

    def _advance(self, text: str, at: int, rows: list[list[float]]) -> int:
        """Use up at least one character or change the state; return the new position."""
        state = self._state
        if state is _State.NUMBER:
            return self._in_number(text, at, rows)
        if state in (_State.TICKS, _State.INFO, _State.CLOSING):
            return self._in_fence(text, at)
        if state in (_State.AFTER, _State.AFTER_LINE, _State.END):
            return self._after_list(text, at)
        spaces = _SPACES.match(text, at)
        assert spaces is not None
        if spaces.end() > at:
            return spaces.end()
        char = text[at]
        if state is _State.BEFORE:
            self._state = _State.TICKS if char == "`" else _State.LIST
            return at
        if state is _State.ROW_START and _NUMBER_RUN.match(char):
            self._state = _State.NUMBER
            return at
        if state is _State.NUMBER_END and char == "]":
            self._end_row(rows)
            return at + 1
        following = _STEP.get((state, char))
        if following is None:
            raise ScanError(f"expected {_WANTED[state]}")
        self._state = following
        return at + 1

    def _in_number(self, text: str, at: int, rows: list[list[float]]) -> int:
        run = _NUMBER_RUN.match(text, at)
        if run is not None:
            self._number.append(run.group())
            return run.end()
        literal = "".join(self._number)
        self._number.clear()
        if _NUMBER.fullmatch(literal) is None:
            raise ScanError(f"{literal[:32]!r} is not a JSON number")
        if len(self._row) == ROW_WIDTH:
            raise ScanError(f"a row has more than {ROW_WIDTH} numbers")
        self._row.append(float(literal))
        self._state = _State.NUMBER_END
        return at

    def _end_row(self, rows: list[list[float]]) -> None:
        if len(self._row) != ROW_WIDTH:
            raise ScanError(f"a row has {len(self._row)} numbers, not {ROW_WIDTH}")
        self._check_row(self._row)
        rows.append(self._row)
        self._row = []
        self._state = _State.ROW_END

    def _in_fence(self, text: str, at: int) -> int:
        char = text[at]
        if self._state is _State.INFO:
            return self._in_info(char, at)
        if char != "`":
            raise ScanError("a code fence has exactly three backticks")
        self._count += 1
        if self._count == 3:
            opening = self._state is _State.TICKS
            self._fenced = True
            self._state, self._count = (_State.INFO if opening else _State.END), 0
        return at + 1

    def _in_info(self, char: str, at: int) -> int:
        if char == "\n":
            self._state, self._count = _State.LIST, 0
        else:
            self._count += 1
            if self._count > _MAX_INFO_CHARS or not (char.isascii() and (char.isalnum() or char in "_+- \t\r")):
                raise ScanError("the opening code fence is not a line of its own")
        return at + 1

    def _after_list(self, text: str, at: int) -> int:
        spaces = _SPACES.match(text, at)
        assert spaces is not None
        if spaces.end() > at:
            if self._state is _State.AFTER and "\n" in spaces.group():
                self._state = _State.AFTER_LINE
            return spaces.end()
        if self._state is _State.AFTER_LINE and self._fenced and text[at] == "`":
            self._state, self._count = _State.CLOSING, 0
            return at
        raise ScanError("text after the list")
