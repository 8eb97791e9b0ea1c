"""Actions as tokens (appendix B.3, Table 2): each digit of action text is written as a reserved token's string."""

from __future__ import annotations

import re

from vlm2vla_schema.types import check_digit_map

_DIGIT = re.compile(r"[0-9]")


def encode_digits(text: str, digit_map: dict[str, str]) -> str:
    """Replace every digit by its token string, e.g. "0.1" by "<unused6133>.<unused6134>".

    Raises:
        ValueError: the map is not a digit map.
    """
    check_digit_map(digit_map)
    return _DIGIT.sub(lambda match: digit_map[match[0]], text)


def decode_digits(text: str, digit_map: dict[str, str]) -> str:
    """Undo `encode_digits`; everything that is not a token string of the map stays as it is.

    Raises:
        ValueError: the map is not a digit map.
    """
    decoder = DigitDecoder(digit_map)
    return decoder.push(text) + decoder.finish()


class DigitDecoder:
    """`decode_digits` for text that arrives in pieces; a token string may be cut anywhere between two pushes."""

    def __init__(self, digit_map: dict[str, str]) -> None:
        """Raises ValueError when the map is not a digit map."""
        check_digit_map(digit_map)
        self._digits = {token: digit for digit, token in digit_map.items()}
        self._token = re.compile("|".join(re.escape(token) for token in self._digits))
        self._longest = max(len(token) for token in self._digits)
        self._held = ""

    def push(self, text: str) -> str:
        """Return what is certain so far; the start of a possible token string is held back."""
        text = self._held + text
        parts: list[str] = []
        done = 0
        for match in self._token.finditer(text):
            parts += (text[done : match.start()], self._digits[match[0]])
            done = match.end()
        held = self._length_to_hold(text, done)
        parts.append(text[done : len(text) - held])
        self._held = text[len(text) - held :]
        return "".join(parts)

    def finish(self) -> str:
        """Return what was held back: it is no token string."""
        held, self._held = self._held, ""
        return held

    def _length_to_hold(self, text: str, done: int) -> int:
        for length in range(min(self._longest - 1, len(text) - done), 0, -1):
            tail = text[len(text) - length :]
            if any(token.startswith(tail) for token in self._digits):
                return length
        return 0
