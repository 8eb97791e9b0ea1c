"""The parsers of subtasks, motion plans and verdicts, and the canonical texts of the first and the last."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.limits import PUNCTUATION
from vlm2vla_schema.parsing import format_subtasks, format_verdict, parse_motion_plan, parse_subtasks, parse_verdict
from vlm2vla_schema.types import Verdict

subtask = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80).filter(
    lambda text: any(not character.isspace() and character not in PUNCTUATION for character in text)
)
subtasks = st.lists(subtask, min_size=1, max_size=20)
written = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=80).filter(
    lambda text: not text[0].isspace() and text[0] not in PUNCTUATION
)
verdicts = st.builds(
    Verdict,
    success=st.booleans(),
    confidence=st.sampled_from(["High", "Medium", "Low"]),
    reasoning=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=500),
)


@given(subtasks)
def test_both_quotings_are_read(names: list[str]) -> None:
    assert parse_subtasks(repr(names)) == names
    assert parse_subtasks(json.dumps(names)) == names
    assert parse_subtasks(json.dumps(names, ensure_ascii=False, indent=1)) == names


@given(st.lists(written, min_size=1, max_size=20))
def test_canonical_subtasks_parse_to_the_same_names(names: list[str]) -> None:
    text = format_subtasks(names)
    assert text.startswith("['")
    assert parse_subtasks(text) == names


def test_canonical_subtasks_look_like_the_printed_example() -> None:
    names = ["Move Down to Pot", "Grasp Pot", "Release"]
    assert format_subtasks(names) == "['Move Down to Pot', 'Grasp Pot', 'Release']"
    assert format_subtasks(["the pot's \\"]) == r"['the pot\'s \\']"


@pytest.mark.parametrize(
    "names", [[], [""], [" "], [" a"], [", "], ["(a)"], ["a\nb"], ["a\x00"], ["x" * 81], ["x"] * 21, ["\ud800"]]
)
def test_subtasks_that_cannot_be_written(names: list[str]) -> None:
    with pytest.raises(ValueError, match="subtask"):
        format_subtasks(names)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("['a', \"b's\"]", ["a", "b's"]),
        ("```python\n['a']\n```", ["a"]),
        ('\n```json\n[ "a" ,\n"b" ]\n```\n', ["a", "b"]),
        (r"""["\u00e9\/\ud83d\ude00", '\x41\'\U0001f600']""", ["é/😀", "A'😀"]),
        ("['" + "x" * 80 + "']", ["x" * 80]),
        ("['x" + r"\'" * 79 + "']", ["x" + "'" * 79]),
        ("['- Move to Pot', '(Grasp)', '2']", ["- Move to Pot", "(Grasp)", "2"]),
        ('["' + r"\ud83d\ude00" * 80 + '"]', ["😀" * 80]),
    ],
)
def test_accepted_subtasks(text: str, names: list[str]) -> None:
    assert parse_subtasks(text) == names


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "['']",
        "['a', '']",
        "['  ']",
        "[', ', 'Move to Carrot', 'Grasp Carrot']",
        "['Move to Carrot', '...']",
        "['-']",
        "['a',]",
        "['a' 'b']",
        "['a'; 'b']",
        "[a]",
        "['a'",
        "['a",
        "['a\"]",
        "['a']]",
        "[['a']]",
        "('a',)",
        "['a'] ok",
        "1. a",
        "[1]",
        "[None]",
        "[true]",
        "[r'a']",
        "[b'a']",
        "[f'{a}']",
        "['''a''']",
        "['a' + 'b']",
        "['a'*2]",
        "[__import__('os')]",
        "['a\nb']",
        "['a\tb']",
        r"['\q']",
        r"['\/']",
        r"['\x4']",
        r"['\u12']",
        r"['\U00110000']",
        r"['\N{DASH}']",
        r"['\ud800']",
        r"['\ude00\ud83d']",
        "['\ud800']",
        "['a\\",
        "['" + "x" * 81 + "']",
        "['" + r"\'" * 81 + "']",
        '["' + r"\ud83d\ude00" * 81 + '"]',
        "[" + ",".join(["'x'"] * 21) + "]",
        "```\n['a']",
        "['a']\n```",
        "```['a']```",
        "```\n```\n['a']\n```\n```",
        "```",
        "```\n```",
        "{'a': 'b'}",
    ],
)
def test_refused_subtasks(text: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_subtasks(text)
    assert caught.value.raw_text == text


@given(
    st.lists(written, min_size=1, max_size=3).map(repr),
    st.lists(st.tuples(st.integers(0), st.integers(0, 3), st.sampled_from(list("[]'\"\\,xuU0`\n{"))), max_size=4),
)
def test_mutated_lists_of_subtasks_parse_or_raise_parse_error(text: str, mutations: list[tuple[int, int, str]]) -> None:
    for place, removed, inserted in mutations:
        at = place % (len(text) + 1)
        text = text[:at] + inserted + text[at + removed :]
    try:
        names = parse_subtasks(text)
    except ParseError:
        return
    assert 1 <= len(names) <= 20
    assert all(1 <= len(name) <= 80 and name.strip() and name.encode() for name in names)


HOSTILE = {
    "nesting": "[" * 10_000_000,
    "objects": '{"a":' * 2_000_000,
    "open string": "['" + "x" * 10_000_000,
    "escapes": "['" + "\\'" * 5_000_000,
    "surrogates": '["' + "\\ud83d" * 1_600_000,
    "items": "[" + "'x'," * 2_500_000,
    "space": "[" + " " * 10_000_000 + "x",
    "fence": "```" * 3_000_000,
    "number": "1" * 10_000_000,
    "long verdict": '{"success": true, "confidence": "High", "reasoning": "' + "\\n" * 5_000_000 + '"}',
    "many fields": "{" + '"success": true, ' * 500_000 + '"a": true}',
    "long number": '{"success": ' + "1" * 10_000_000 + "}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_costs_linear_time(text: str) -> None:
    start = time.process_time()
    for parse in (parse_subtasks, parse_verdict, parse_motion_plan):
        with pytest.raises(ParseError):
            parse(text)
    assert time.process_time() - start < 6.0


def test_motion_plans() -> None:
    assert parse_motion_plan("\n Move left. \n") == "Move left."
    assert len(parse_motion_plan("x" * 1500)) == 1500
    for text in ("", " \n", "x" * 1501, "a\ud800"):
        with pytest.raises(ParseError):
            parse_motion_plan(text)


@given(verdicts)
def test_canonical_verdicts_parse_to_the_same_verdict(verdict: Verdict) -> None:
    text = format_verdict(verdict)
    assert parse_verdict(text) == verdict
    assert "\n" not in text


@given(verdicts, st.booleans(), st.sampled_from([None, 0, 3]))
def test_any_json_of_a_verdict_is_read(verdict: Verdict, ascii_only: bool, indent: int | None) -> None:
    fields = {"reasoning": verdict.reasoning, "success": verdict.success, "confidence": verdict.confidence}
    text = json.dumps(fields, ensure_ascii=ascii_only, indent=indent)
    assert parse_verdict(text) == verdict
    assert parse_verdict(f"```json\n{text}\n```") == verdict


def test_canonical_verdict_text() -> None:
    verdict = Verdict(success=True, confidence="High", reasoning='the "pot" is up')
    assert format_verdict(verdict) == r'{"success": true, "confidence": "High", "reasoning": "the \"pot\" is up"}'
    for reasoning in ("", "x" * 501, "a\nb", "\ud800"):
        with pytest.raises(ValueError, match="verdict"):
            format_verdict(Verdict(success=True, confidence="Low", reasoning=reasoning))


GOOD = '"success": true, "confidence": "High", "reasoning": "ok"'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "true",
        "[]",
        "[{" + GOOD + "}]",
        GOOD,
        "{" + GOOD,
        "{" + GOOD + ",}",
        "{" + GOOD + ', "x": 1}',
        "{" + GOOD + ', "x": "1"}',
        "{" + GOOD + ', "success": false}',
        "{" + GOOD + "} {}",
        "Sure! {" + GOOD + "}",
        '{"success": true, "confidence": "High"}',
        "{'success': true, 'confidence': 'High', 'reasoning': 'ok'}",
        '{"success": True, "confidence": "High", "reasoning": "ok"}',
        '{"success": "true", "confidence": "High", "reasoning": "ok"}',
        '{"success": 1, "confidence": "High", "reasoning": "ok"}',
        '{"success": null, "confidence": "High", "reasoning": "ok"}',
        '{"success": NaN, "confidence": "High", "reasoning": "ok"}',
        '{"success": true, "confidence": "high", "reasoning": "ok"}',
        '{"success": true, "confidence": null, "reasoning": "ok"}',
        '{"success": true, "confidence": ["High"], "reasoning": "ok"}',
        '{"success": true, "confidence": "High", "reasoning": ""}',
        '{"success": true, "confidence": "High", "reasoning": 1}',
        '{"success": true, "confidence": "High", "reasoning": 1e999}',
        '{"success": true, "confidence": "High", "reasoning": "\\ud800"}',
        '{"success": true, "confidence": "High", "reasoning": "a\nb"}',
        '{"success": true, "confidence": "High", "reasoning": "' + "x" * 501 + '"}',
        '{"success": true, "confidence": "High", "reasoning": {"success": true}}',
        "```\n{" + GOOD + "}",
        "\ufeff{" + GOOD + "}",
        '"\ud800',
    ],
)
def test_refused_verdicts(text: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_verdict(text)
    assert caught.value.raw_text == text


@given(st.text(max_size=50))
def test_any_text_parses_or_raises_parse_error(text: str) -> None:
    for parse in (parse_subtasks, parse_verdict, parse_motion_plan):
        try:
            parse(text)
        except ParseError as error:
            assert error.raw_text == text
