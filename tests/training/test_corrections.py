"""What becomes of an operator's words: which cycle carries them, and how they lie on other annotations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_fakes import PICK, episode_of, write_recording

from vlm2vla_training.annotation.audit import audit_steps
from vlm2vla_training.annotation.base import AnnotatedEpisode, AnnotatedStep, step_from_log
from vlm2vla_training.annotation.corrections import CorrectionsAnnotator, OnAnnotated, laid_on, on_annotator
from vlm2vla_training.annotation.findings import Finding, find
from vlm2vla_training.annotation.rules import RulesAnnotator
from vlm2vla_training.cli import main
from vlm2vla_training.curation.examples import ExampleOptions, examples_of
from vlm2vla_training.episodes import corrections as became
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.corrections import CorrectionReader
from vlm2vla_training.episodes.recordings import RecordingsSource
from vlm2vla_training.errors import DataError

Event = dict[str, Any]


def correction(cycle: int, subtask: str, plan: str | None, place: int = 0) -> Event:
    words = {"subtask": {"from": "Grasp", "to": subtask}, "motion_plan": {"from": "Policy's.", "to": plan}}
    return {"event": "correction", "cycle": cycle, "subtask_index": place, **words, "rows": []}


def cycle(
    number: int, subtask: str, plan: str, success: bool | None, rows: int = 2, outcome: str = "completed",
    verifier: str = "twin", place: int = 0, unseen: bool = False,
) -> list[Event]:  # fmt: skip
    """One cycle as the loop records it; success None: it was asked about, and nothing moved."""
    same = {"cycle": number, "subtask_index": place}
    request: Event = {"event": "request", "stage": "cycle", "subtask": subtask}
    asked: list[Event] = [request, {"event": "plan", "motion_plan": plan}]
    if success is None:
        return [{**same, **event} for event in asked]
    moved: list[Event] = [{"event": "step"}] * rows + [{"event": "step_unseen"}] * unseen
    verdict: Event = {"event": "verdict", "success": success, "verifier": verifier}
    end: list[Event] = [{"event": "chunk", "outcome": outcome}, verdict]
    return [{**same, **event} for event in [*asked, *moved, *end]]


def read(*events: Event | list[Event]) -> list[Event]:
    reader = CorrectionReader()
    for one in events:
        for event in one if isinstance(one, list) else [one]:
            reader.event(event)
    reader.close()
    return reader.found


def problems(*events: Event | list[Event]) -> list[str | None]:
    return [one["problem"] for one in read(*events)]


def test_the_rows_behind_an_edited_plan_are_found() -> None:
    before = cycle(1, "Grasp", "Policy's.", False, rows=3)
    asked = cycle(2, "Grasp", "Policy's.", None)
    (one,) = read(before, asked, correction(2, "Grasp", "Down."), cycle(3, "Grasp", "Down.", True))
    assert one == {
        "cycle": 2, "subtask": "Grasp", "motion_plan": "Down.", "problem": None, "first": 3, "last": 4,
    }  # fmt: skip


def test_an_edited_subtask_stays_until_it_is_done_with_the_plan_it_was_done_by() -> None:
    tried = cycle(2, "Take it", "First.", False)
    (one,) = read(correction(1, "Take it", None), tried, cycle(3, "Take it", "Second.", True, rows=1))
    assert (one["motion_plan"], one["first"], one["last"], one["problem"]) == ("Second.", 2, 2, None)


def test_an_answer_that_was_lost_does_not_lose_the_words() -> None:
    lost = cycle(2, "Grasp", "Down.", None)
    assert problems(correction(1, "Grasp", "Down."), lost, cycle(3, "Grasp", "Down.", True)) == [None]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (cycle(2, "Grasp", "Down.", False), became.NOT_VERIFIED),
        (cycle(2, "Grasp", "Down.", None), became.NOT_VERIFIED),
        # declined or failed, then done by the policy's own words
        (cycle(2, "Grasp", "Policy's.", True), became.NOT_VERIFIED),
        # the same words, at another subtask
        (cycle(2, "Grasp", "Down.", True, place=1), became.NOT_VERIFIED),
        (cycle(2, "Grasp", "Down.", True, verifier="none"), became.UNCHECKED),
        (cycle(2, "Grasp", "Down.", True, rows=0), became.STILL),
        (cycle(2, "Grasp", "Down.", True, unseen=True), became.UNSEEN),
        (cycle(2, "Grasp", "Down.", True, outcome="not_arrived"), became.NOT_ARRIVED),
        ([], became.NOT_VERIFIED),
    ],
)
def test_what_was_not_verified_is_named_with_its_reason(events: list[Event], expected: str) -> None:
    (one,) = read(correction(1, "Grasp", "Down."), events)
    assert one["problem"] == expected and "first" not in one


def test_a_second_edit_replaces_the_first() -> None:
    first, second = correction(1, "Take it", None), correction(2, "Take it", "Down.")
    between = cycle(2, "Take it", "Policy's.", None)
    assert problems(first, between, second, cycle(3, "Take it", "Down.", True)) == [became.REPLACED, None]
    later = correction(4, "Lift", "Up.", place=1)
    assert problems(correction(1, "Grasp", "Down."), cycle(3, "Grasp", "Policy's.", True), later) == [
        became.NOT_VERIFIED,
        became.NOT_VERIFIED,
    ]


def test_a_correction_without_words_is_damage() -> None:
    with pytest.raises(DataError, match="without its words"):
        read({"event": "correction", "seq": 7, "subtask": "Grasp"})


def test_recordings_carry_them_as_a_fact(tmp_path: Path) -> None:
    write_recording(tmp_path / "one", "pick up the carrot", rows=2)
    (plain,) = RecordingsSource(tmp_path).episodes()
    assert "corrections" not in plain.facts
    path = tmp_path / "one" / "events.jsonl"
    words = json.dumps(correction(1, "Grasp", "Down.")) + "\n"
    path.write_text(words + path.read_text())
    (told,) = RecordingsSource(tmp_path).episodes()
    assert [one["problem"] for one in told.facts["corrections"]] == [became.NOT_VERIFIED]


def step(name: str, first: int, last: int, **more: Any) -> AnnotatedStep:
    rows = [[0.001 * row, 0.0, 0.0, 1.0] for row in range(first, last + 1)]
    return AnnotatedStep(name, "Why.", "Words.", first, last, rows, **more)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 3, [("H", 0, 3, False), ("B", 4, 9, False)]),  # exactly a step
        (2, 5, [("A", 0, 1, True), ("H", 2, 5, False), ("B", 6, 9, True)]),  # parts of two
        (6, 7, [("A", 0, 3, False), ("B", 4, 5, True), ("H", 6, 7, False), ("B", 8, 9, True)]),  # inside one
        (0, 9, [("H", 0, 9, False)]),
    ],
)
def test_steps_make_room_and_every_row_stays_in_one(
    first: int, last: int, expected: list[tuple[str, int, int, bool]]
) -> None:
    laid = laid_on([step("A", 0, 3), step("B", 4, 9)], step("H", first, last, author="human"))
    assert [(one.step_description, one.first, one.last, one.cut) for one in laid] == expected
    for one in laid:
        assert one.actions == step("", one.first, one.last).actions


def picked(begin: int, end: int, plan: str | None, subtask: str = "Grasp Carrot") -> Episode:
    plain = episode_of(PICK, "pick up the carrot")
    fact = {"cycle": 1, "subtask": subtask, "motion_plan": plan, "problem": None, "first": begin, "last": end - 1}
    return Episode(**{**vars(plain), "facts": {"corrections": [fact]}})


def test_a_cut_step_gives_no_example_and_is_not_audited_for_words() -> None:
    # PICK is move 0..6, descend 7..10, close and lift; the person's words cover a part of the move only
    episode = picked(3, 6, "Move far forward and left.", "Move to Carrot")
    annotated = on_annotator(RulesAnnotator()).annotate(episode)
    kinds = [(one.first, one.last, one.author, one.cut) for one in annotated.steps]
    assert kinds[:3] == [(0, 2, "", True), (3, 5, "human", False), (6, 6, "", True)]
    assert annotated.audit["quarantine"] is None and annotated.audit["covered"]
    found = examples_of(annotated, ExampleOptions(extra_starts=2)).examples
    starts = {example.first for example in found if example.kind in ("subtasks", "motion_plan", "actions", "direction")}
    assert starts and not starts & {0, 1, 2, 6} and {3} <= starts
    # the rest of the move has the same name, and does not make the person's step a failed one
    (plan,) = [one for one in found if one.kind == "motion_plan" and one.first == 3]
    assert plan.completion == "Move far forward and left."
    lists = [example.completion for example in found if example.kind == "subtasks" and example.first == 3]
    assert [text.count("Move to Carrot") for text in lists] == [1]


def test_the_audit_does_not_hold_a_cut_step_to_its_words() -> None:
    # rows 0..9 go forward and down, the gripper closes at 11: neither is what the words say
    episode = episode_of(PICK, "pick up the carrot")
    parts = [("Release Carrot", "Move far backward.", 0, 10), ("Move to Carrot", "Move up.", 10, len(episode))]
    steps = [step_from_log(episode, name, "Why.", words, begin, end) for name, words, begin, end in parts]
    assert {finding.check for finding in find(episode, steps)} >= {"direction", "gripper"}
    assert find(episode, [replace(one, cut=True) for one in steps]) == []
    (finding,) = find(episode, [replace(one, cut=True, actions=[]) for one in steps][:1] + steps[1:])[:1]
    assert finding.check == "actions"


def test_the_end_of_a_rollout_does_not_show_its_last_step_done() -> None:
    episode = picked(14, 21, "Move up.", "Lift Carrot")
    annotated = on_annotator(RulesAnnotator()).annotate(episode)
    found = examples_of(annotated, ExampleOptions())
    assert annotated.steps[-1].author == "human"
    reasons = {(kind, reason) for kind, first, reason in found.drops if first == 14}
    assert {kind for kind, _ in reasons} == {"completion", "verify"}
    assert not [one for one in found.examples if one.kind == "verify" and one.first >= 14]


def test_words_that_contradict_the_log_are_quarantined_like_anybodys() -> None:
    annotated = on_annotator(RulesAnnotator()).annotate(picked(0, 7, "Move far backward.", "Move to Carrot"))
    assert "backward" in annotated.audit["quarantine"]


def test_what_the_annotator_below_was_quarantined_for_goes_on_to_count() -> None:
    episode = picked(0, 7, "Move far forward.", "Move to Carrot")
    under = RulesAnnotator().annotate(episode)
    copied = Finding(2, "copies", True, "half of the rows are wrong")
    audit = audit_steps(episode, under.steps, [[0.0, 0.0, 0.0, 1.0]], [copied])
    known = OnAnnotated({episode.key: replace(under, audit=audit)})
    laid = CorrectionsAnnotator(known, known.name).annotate(episode)
    assert laid.audit["quarantine"] == "copies: half of the rows are wrong"
    assert laid.audit["copy_error_rate"] == audit["copy_error_rate"] > 0.5
    assert [one["check"] for one in laid.audit["findings"]].count("copies") == 1


def test_a_policy_without_plans_gets_the_logs_words() -> None:
    (human, *_) = on_annotator(RulesAnnotator()).annotate(picked(0, 7, None)).steps
    assert human.author == "human" and human.main_movements.startswith("Move far forward")


def test_both_plan_sources_say_the_persons_words_once() -> None:
    annotated = on_annotator(RulesAnnotator()).annotate(picked(0, 7, "Move far forward."))
    found = examples_of(annotated, ExampleOptions(plan_source="both")).examples
    assert "Move far forward." in [one.completion for one in found if one.kind == "motion_plan" and one.first == 0]


def test_what_does_not_fit_is_an_error() -> None:
    episode = picked(0, 99, "Down.")
    with pytest.raises(DataError, match="rows 0 to 98"):
        on_annotator(RulesAnnotator()).annotate(episode)
    under = OnAnnotated({"other": AnnotatedEpisode("other", "", "gemini-1", [])})
    with pytest.raises(DataError, match="no annotation"):
        CorrectionsAnnotator(under, under.name).annotate(episode)
    assert under.name == "gemini-1"


def test_annotated_is_for_corrections_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--episodes", str(tmp_path), "--annotated", str(tmp_path), "--out", str(tmp_path / "o")]
    assert main(["annotate", *where]) == 2
    assert "laid on" in capsys.readouterr().err
