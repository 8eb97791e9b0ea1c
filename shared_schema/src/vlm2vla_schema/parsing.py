r"""Model text -> subtasks | motion plan | action chunk | verdict, and back to the canonical text.

Strict: white space and one Markdown code fence are the only decoration; text is never evaluated, padded, repaired or
replaced. The parsers raise ParseError and nothing else, in time linear in the text.

Canonical text is what training examples hold and what the grammars of `grammar` enforce:
- actions as in appendix B.2: `[[-0.002, -0.004, -0.023, 1.0], [0.007, -0.002, -0.045, 1.0]]`;
- subtasks as in appendix D.4's example, a Python list in single quotes, in which only `'` and `\` are escaped by `\`:
  `['Move Down to Pot', 'Grasp Pot']`;
- a verdict as one line of JSON, fields in D.5's order: `{"success": true, "confidence": "High", "reasoning": "..."}`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from vlm2vla_schema.digits import DigitDecoder, decode_digits, encode_digits
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.limits import (
    CONFIDENCES,
    DECIMALS,
    MAX_MOTION_PLAN_CHARS,
    MAX_REASONING_CHARS,
    MAX_ROW_TRANSLATION_M,
    MAX_ROWS,
    MAX_SUBTASK_CHARS,
    MAX_SUBTASKS,
    PUNCTUATION,
    ROW_WIDTH,
    check_row_limits,
)
from vlm2vla_schema.scanning import RowScanner, ScanError, scan_string_list, undecorate
from vlm2vla_schema.types import Chunk, Verdict

__all__ = [
    "DigitDecoder",
    "RowStream",
    "decode_digits",
    "encode_digits",
    "format_actions",
    "format_subtasks",
    "format_verdict",
    "parse_actions",
    "parse_motion_plan",
    "parse_subtasks",
    "parse_verdict",
]

_SUBTASKS_FORM = (
    f"a list of 1..{MAX_SUBTASKS} quoted strings of words, 1..{MAX_SUBTASK_CHARS} characters each, "
    "such as ['Move to Pot', 'Grasp Pot']"
)
_PLAN_FORM = f"1..{MAX_MOTION_PLAN_CHARS} characters of text"
_VERDICT_FORM = (
    'one JSON object {"success": true or false, "confidence": "High", "Medium" or "Low", '
    f'"reasoning": 1..{MAX_REASONING_CHARS} characters}}'
)
_VERDICT_FIELDS = {"success", "confidence", "reasoning"}


class RowStream:
    """Parse an action chunk while it is being generated.

    A row is handed over as soon as its closing bracket arrived; the rows and errors over all pieces are those of
    `parse_actions` on the whole text, wherever it is cut. After a ParseError every further call raises it again.
    """

    def __init__(
        self,
        max_row_translation_m: float = MAX_ROW_TRANSLATION_M,
        max_rows: int = MAX_ROWS,
        digit_map: dict[str, str] | None = None,
    ) -> None:
        """With a `digit_map` (representation "tokens") the pieces are token text.

        Raises:
            ValueError: limits or digit map that make no sense.
        """
        check_row_limits(max_row_translation_m, max_rows)
        self._limit_m = max_row_translation_m
        self._max_rows = max_rows
        self._decoder = None if digit_map is None else DigitDecoder(digit_map)
        self._scanner = RowScanner(self._check_row)
        self._pieces: list[str] = []
        self._rows: list[list[float]] = []
        self._seen_rows = 0
        self._error: ParseError | None = None
        self._form = (
            f"one JSON list of 1..{max_rows} rows [dx, dy, dz, gripper], each translation within "
            f"{max_row_translation_m} m, gripper 0 or 1"
        )

    @property
    def rows(self) -> list[list[float]]:
        """The rows handed over so far."""
        return [list(row) for row in self._rows]

    @property
    def raw_text(self) -> str:
        """Everything fed so far, as it came."""
        return "".join(self._pieces)

    def feed(self, delta: str) -> list[list[float]]:
        """Take the next piece of text; return the rows that it completes.

        Raises:
            ParseError: the text cannot become a valid chunk any more; rows completed by the same piece are withheld.
        """
        self._raise_again()
        self._pieces.append(delta)
        try:
            rows = self._scanner.push(delta if self._decoder is None else self._decoder.push(delta))
        except ScanError as error:
            self._fail(str(error))
        self._rows += rows
        return [list(row) for row in rows]

    def close(self) -> Chunk:
        """The text is over; return the whole chunk.

        Raises:
            ParseError: the text ends too early.
        """
        self._raise_again()
        try:
            if self._decoder is not None:
                self._rows += self._scanner.push(self._decoder.finish())
            self._scanner.finish()
        except ScanError as error:
            self._fail(str(error))
        return Chunk(rows=self.rows)

    def _check_row(self, row: list[float]) -> None:
        number = self._seen_rows + 1
        self._seen_rows = number
        if number > self._max_rows:
            raise ScanError(f"more than {self._max_rows} rows")
        for value in row[:3]:
            if not math.isfinite(value) or abs(value) > self._limit_m:
                raise ScanError(f"row {number}: {value} is beyond {self._limit_m} m")
        if row[3] not in (0.0, 1.0):
            raise ScanError(f"row {number}: gripper {row[3]} is neither 0 nor 1")

    def _fail(self, message: str) -> NoReturn:
        self._error = ParseError(message, self.raw_text, self._form)
        raise self._error from None

    def _raise_again(self) -> None:
        if self._error is not None:
            raise self._error


def parse_actions(
    text: str,
    max_row_translation_m: float = MAX_ROW_TRANSLATION_M,
    max_rows: int = MAX_ROWS,
    digit_map: dict[str, str] | None = None,
) -> Chunk:
    """Parse an action chunk: rows [dx_m, dy_m, dz_m, gripper] (section 3.1, appendix B.2).

    Each translation is a finite JSON number within `max_row_translation_m`, the gripper is equal to 0 or 1.
    With a `digit_map` the text is token text, decoded by the map before the same check (appendix B.3).

    Raises:
        ParseError: anything else.
    """
    stream = RowStream(max_row_translation_m, max_rows, digit_map)
    stream.feed(text)
    return stream.close()


def parse_subtasks(text: str) -> list[str]:
    """Parse the list of subtasks: 1..20 strings of 1..80 characters, JSON or Python quoting (appendix D.4).

    Raises:
        ParseError: anything else, a subtask without a word included.
    """
    try:
        subtasks = scan_string_list(undecorate(text), MAX_SUBTASKS, MAX_SUBTASK_CHARS)
        for place, subtask in enumerate(subtasks, start=1):
            if not subtask.strip():
                raise ScanError(f"subtask {place} is empty")
            if all(character.isspace() or character in PUNCTUATION for character in subtask):
                raise ScanError(f"subtask {place} has no words, only {subtask!r}")
    except ScanError as error:
        raise ParseError(str(error), text, _SUBTASKS_FORM) from None
    return subtasks


def parse_motion_plan(text: str) -> str:
    """Return the motion plan without the white space around it: 1..1500 characters (section 3.1).

    Raises:
        ParseError: it is empty, too long, or no Unicode text.
    """
    plan = text.strip()
    if not 1 <= len(plan) <= MAX_MOTION_PLAN_CHARS:
        raise ParseError(f"the motion plan has {len(plan)} characters", text, _PLAN_FORM)
    if not _is_unicode(plan):
        raise ParseError("the motion plan holds half a surrogate pair", text, _PLAN_FORM)
    return plan


def parse_verdict(text: str) -> Verdict:
    """Parse the verifier's JSON object with exactly the three fields of appendix D.5.

    Raises:
        ParseError: anything else: a missing, further or repeated field, another type, a bare or empty text.
    """
    try:
        return _scan_verdict(undecorate(text))
    except ScanError as error:
        raise ParseError(str(error), text, _VERDICT_FORM) from None


def _scan_verdict(body: str) -> Verdict:
    try:
        fields = json.loads(
            body,
            object_pairs_hook=_unique_fields,
            parse_int=_refuse_number,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except json.JSONDecodeError as error:
        raise ScanError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ScanError("not one flat JSON object") from None
    if not isinstance(fields, dict) or set(fields) != _VERDICT_FIELDS:
        raise ScanError("not an object with exactly the fields success, confidence and reasoning")
    success, confidence, reasoning = fields["success"], fields["confidence"], fields["reasoning"]
    if not isinstance(success, bool):
        raise ScanError("success is neither true nor false")
    if confidence not in CONFIDENCES:
        raise ScanError("confidence is none of High, Medium, Low")
    if not isinstance(reasoning, str) or not 1 <= len(reasoning) <= MAX_REASONING_CHARS or not _is_unicode(reasoning):
        raise ScanError(f"reasoning is not a text of 1..{MAX_REASONING_CHARS} characters")
    return Verdict(success=success, confidence=confidence, reasoning=reasoning)


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ScanError("a field occurs twice")
    return fields


def _refuse_number(literal: str) -> NoReturn:
    raise ScanError("a verdict holds no numbers")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def format_actions(rows: Sequence[Sequence[float]]) -> str:
    """Write rows as canonical action text (appendix B.2): 3 decimals at most, trailing zeros cut to one, never "-0.0".

    Values are rounded to millimetres. Limits are not checked here: they are a setting of whoever parses.

    Raises:
        ValueError: no rows, a row that is not four finite numbers, or a gripper that is neither 0 nor 1.
    """
    if len(rows) == 0:
        raise ValueError("an action chunk has at least one row")
    return "[" + ", ".join(_format_row(row) for row in rows) + "]"


def _format_row(row: Sequence[float]) -> str:
    values = [float(value) for value in row]
    if len(values) != ROW_WIDTH or not all(math.isfinite(value) for value in values):
        raise ValueError(f"expected a row of {ROW_WIDTH} finite numbers, got {values}")
    if values[3] not in (0.0, 1.0):
        raise ValueError(f"expected a gripper of 0 or 1, got {values[3]}")
    return "[" + ", ".join(format_number(value) for value in values) + "]"


def format_number(value: float) -> str:
    """Write one number of canonical action text: 3 decimals at most, trailing zeros cut to one, never "-0.0"."""
    text = f"{value:.{DECIMALS}f}".rstrip("0")
    text = text + "0" if text.endswith(".") else text
    return "0.0" if text == "-0.0" else text


def format_subtasks(subtasks: Sequence[str]) -> str:
    r"""Write subtasks as canonical text: `['Move Down to Pot', 'Grasp Pot']`, with `\'` and `\\` as the only escapes.

    Raises:
        ValueError: the parser would refuse the list, or a subtask starts with white space or ASCII punctuation or holds
            a control character.
    """
    if any(subtask[:1].isspace() or subtask.startswith(tuple(PUNCTUATION)) for subtask in subtasks):
        raise ValueError("a subtask starts with white space or punctuation")
    text = "[" + ", ".join(_quoted(subtask) for subtask in subtasks) + "]"
    try:
        parse_subtasks(text)
    except ParseError as error:
        raise ValueError(f"subtasks that the parser would refuse: {error}") from None
    return text


def format_verdict(verdict: Verdict) -> str:
    """Write a verdict as canonical text: one line of JSON in D.5's order of fields.

    Raises:
        ValueError: the parser would refuse it, or the reasoning holds a control character such as a line break.
    """
    success = "true" if verdict.success else "false"
    reasoning = _escape(verdict.reasoning, '"')
    text = f'{{"success": {success}, "confidence": "{verdict.confidence}", "reasoning": "{reasoning}"}}'
    try:
        parse_verdict(text)
    except ParseError as error:
        raise ValueError(f"a verdict that the parser would refuse: {error}") from None
    return text


def _quoted(subtask: str) -> str:
    return "'" + _escape(subtask, "'") + "'"


def _escape(text: str, quote: str) -> str:
    return text.replace("\\", "\\\\").replace(quote, "\\" + quote)
