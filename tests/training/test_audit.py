"""The audit: what an annotation says against what the log shows, and a person's decisions on top."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from training_fakes import EGGPLANT_FISH, PICK, PLACE, RETRY, Segment, episode_of

from vlm2vla_schema.images import decode_image, from_base64
from vlm2vla_training.annotation.audit import audit_steps
from vlm2vla_training.annotation.base import AnnotatedEpisode, AnnotatedStep
from vlm2vla_training.annotation.findings import copy_error_rate, said_directions
from vlm2vla_training.annotation.rules import RulesAnnotator
from vlm2vla_training.audit_page import sample
from vlm2vla_training.cli import main
from vlm2vla_training.curation.dataset import read_examples
from vlm2vla_training.curation.decisions import FORMAT, content_hash
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.jsonio import JsonlAppender, read_json

EPISODE = episode_of(PLACE, "put the carrot on the yellow plate")
RULES = RulesAnnotator().annotate(EPISODE)


def audited(**changes: tuple[int, str | int]) -> list[tuple[str, bool, int | None]]:
    """The findings after one field of one step is replaced."""
    steps = list(RULES.steps)
    for name, (index, value) in changes.items():
        steps[index] = AnnotatedStep(**{**vars(steps[index]), name: value})
    audit = audit_steps(EPISODE, steps)
    assert bool(audit["quarantine"]) == any(one["grave"] for one in audit["findings"])
    return [(one["check"], one["grave"], one["step"]) for one in audit["findings"]]


@pytest.mark.parametrize("segments", [PICK, PLACE, EGGPLANT_FISH, RETRY])
@pytest.mark.parametrize("noise_m", [0.0, 0.001])
def test_what_the_rules_write_passes(segments: list[Segment], noise_m: float) -> None:
    episode = episode_of(segments, "put the eggplant in the pan, then lift the fish", noise_m=noise_m)
    audit = RulesAnnotator().annotate(episode).audit
    assert audit["findings"] == [] and audit["quarantine"] is None


def test_ranges_must_partition_the_episode() -> None:
    assert audited(last=(1, RULES.steps[1].last - 1)) == [("partition", True, 2)]
    assert audited(first=(1, RULES.steps[1].first - 1)) == [("partition", True, 1)]
    assert ("partition", True, None) in audited(last=(len(RULES.steps) - 1, 30))
    assert [one["check"] for one in audit_steps(EPISODE, [])["findings"]] == ["partition"]


def test_numbers_must_be_the_logs() -> None:
    steps = list(RULES.steps)
    rows = [list(row) for row in steps[2].actions]
    rows[0][2] += 0.001
    steps[2] = dataclasses.replace(steps[2], actions=rows)
    audit = audit_steps(EPISODE, steps)
    assert not audit["actions_match"] and audit["quarantine"].startswith("actions:")


def test_left_for_right_is_grave_and_has_a_name_of_its_own() -> None:
    said = RULES.steps[3].main_movements
    assert "right" in said
    assert audited(main_movements=(3, said.replace("right", "left"))) == [("left_right", True, 3)]


def test_up_for_down_is_grave() -> None:
    assert audited(main_movements=(2, "Move far down, gripper stays closed.")) == [("direction", True, 2)]


def test_a_direction_not_said_is_told_but_not_grave() -> None:
    assert audited(main_movements=(2, "Carry on, gripper stays closed.")) == [("direction", False, 2)]


def test_inside_the_dead_band_any_word_is_right() -> None:
    episode = episode_of([(0.025, -0.025, 0.0, 1, 5)], "push the cup")
    rows = episode.actions[:, [0, 1, 2, 6]].tolist()
    step = AnnotatedStep("Move to Cup", "", "Move slightly backward and left.", 0, 4, rows)
    assert audit_steps(episode, [step])["findings"] == []
    wider = episode_of([(0.026, -0.026, 0.0, 1, 5)], "push the cup")
    step = dataclasses.replace(step, actions=wider.actions[:, [0, 1, 2, 6]].tolist())
    found = audit_steps(wider, [step])["findings"]
    assert [(one["check"], one["grave"]) for one in found] == [("direction", True), ("left_right", True)]


def test_grasp_and_release_need_their_gripper_events() -> None:
    assert audited(step_description=(0, "Grasp Carrot")) == [("gripper", True, 0)]
    assert audited(step_description=(2, "Release Carrot")) == [("gripper", True, 2)]


def test_a_gripper_event_must_be_told() -> None:
    silent = audited(step_description=(1, "Go to Carrot"), main_movements=(1, "Move down."))
    assert silent == [("gripper", True, 1)]
    state_only = audited(step_description=(5, "Retreat"), main_movements=(5, "Move up, gripper stays open."))
    assert state_only == [("gripper", True, 5)]


def test_text_of_plans() -> None:
    assert ("text", True, 0) in audited(main_movements=(0, " "))
    assert audited(main_movements=(2, "Move up 12 cm, gripper stays closed.")) == [("text", False, 2)]
    assert ("text", True, 0) in audited(step_description=(0, "Move to " + "far away " * 12))
    assert ("text", True, 0) in audited(step_description=(0, "- Move to Carrot"))


def test_direction_words() -> None:
    assert said_directions("Move UPWARD, then backwards; the leftover stays") == {"up", "backward"}


def test_copies_are_compared_with_the_log() -> None:
    log = EPISODE.actions
    exact = [[round(float(v), 3) for v in row[[0, 1, 2, 6]]] for row in log]
    assert copy_error_rate(exact, log) == 0.0 and copy_error_rate(log.tolist(), log) == 0.0
    wrong = [list(row) for row in exact]
    wrong[3][0] += 0.01
    assert copy_error_rate(wrong, log) == pytest.approx(1 / len(log), abs=1e-4)
    assert copy_error_rate(exact[:-2], log) == pytest.approx(2 / len(log), abs=1e-4)
    assert copy_error_rate([], np.zeros((0, 7))) == 0.0 and copy_error_rate([[1.0]], log[:1]) == 1.0
    audit = audit_steps(EPISODE, RULES.steps, copies=wrong)
    assert audit["copy_error_rate"] > 0 and audit["quarantine"] is None


# The page and the decisions

BAD = "fake/bad"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good episodes, one whose words say left for right."""
    root = tmp_path_factory.mktemp("audit")
    with EpisodeWriter(root / "episodes") as writer, JsonlAppender(root / "annotated" / "annotated.jsonl") as file:
        for key in ("fake/0", "fake/1", "fake/2", BAD):
            episode = episode_of(PLACE, "put the <carrot> on the & plate", key)
            writer.write(episode)
            annotated = RulesAnnotator().annotate(episode)
            if key == BAD:
                steps = list(annotated.steps)
                words = steps[3].main_movements.replace("right", "left")
                steps[3] = dataclasses.replace(steps[3], main_movements=words)
                annotated = dataclasses.replace(annotated, steps=steps, audit=audit_steps(episode, steps))
            file.append(annotated.to_json())
    return root


class Page(HTMLParser):
    """What a browser would see: episodes, pictures, addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.articles: list[dict[str, str | None]] = []
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "article":
            self.articles.append(found)
        for name in ("src", "href"):
            if found.get(name):
                (self.images if tag == "img" else self.addresses).append(str(found[name]))


def test_the_page_is_self_contained_and_shows_the_doubtful_first(data: Path, tmp_path: Path) -> None:
    arguments = ["audit", "--episodes", str(data / "episodes"), "--annotated", str(data / "annotated")]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--dry-run"]) == 0 and not (tmp_path / "a").exists()
    assert main([*arguments, "--out", str(tmp_path / "a"), "--sample", "2"]) == 0
    text = (tmp_path / "a" / "audit.html").read_text()
    page = Page(text)
    assert page.articles[0]["data-key"] == BAD and len(page.articles) == 2
    assert not page.addresses and not re.search(r"https?:(?!//www\.w3\.org)", text)
    assert page.images and all(image.startswith("data:image/jpeg;base64,") for image in page.images)
    assert decode_image(from_base64(page.images[0])).shape == (48, 64, 3)
    assert "put the &lt;carrot&gt; on the &amp; plate" in text and "<carrot>" not in text
    assert "the words say left; the log moves 15.0 cm right" in text and text.count("<svg") == 2
    assert main([*arguments, "--out", str(tmp_path / "b"), "--key", "fake/none"]) == 2


def test_the_sample_is_a_function_of_the_seed_and_half_of_it_is_doubtful() -> None:
    good = dataclasses.replace(RULES, audit={})
    bad = dataclasses.replace(RULES, audit={"quarantine": "left_right: ..."})
    many = {f"{kind}/{n}": one for n in range(30) for kind, one in (("good", good), ("bad", bad))}
    chosen = sample(many, 10, 1, ["good/7"])
    assert chosen == sample(many, 10, 1, ["good/7"]) != sample(many, 10, 2, ["good/7"])
    assert chosen[0] == "good/7" and sum(key.startswith("bad") for key in chosen) == 5 and len(set(chosen)) == 10


def curated(data: Path, out: Path, *decisions: tuple[str, str, str]) -> set[str]:
    arguments = ["curate", "--episodes", str(data / "episodes"), "--annotated", str(data / "annotated")]
    if decisions:
        entries = [
            {"episode_key": key, "decision": verdict, "content": content, "note": ""}
            for key, verdict, content in decisions
        ]
        file = out.with_suffix(".json")
        file.write_text(json.dumps({"format": FORMAT, "decisions": entries}))
        arguments += ["--decisions", str(file)]
    assert main([*arguments, "--kinds", "motion_plan", "--out", str(out)]) == 0
    return set(read_examples(out, ["episode_key"]).column("episode_key").to_pylist())


def content_of(data: Path, key: str) -> str:
    lines = (data / "annotated" / "annotated.jsonl").read_text().splitlines()
    return next(content_hash(one) for one in map(AnnotatedEpisode.from_json, map(json.loads, lines))
                if one.episode_key == key)  # fmt: skip


def test_quarantined_episodes_are_left_out_with_the_reason(data: Path, tmp_path: Path) -> None:
    assert curated(data, tmp_path / "x") == {"fake/0", "fake/1", "fake/2"}
    summary = read_json(tmp_path / "x" / "summary.json")
    assert summary["left_out"] == {"quarantined by the audit": 1}
    assert summary["left_out_episodes"][0]["episode_key"] == BAD
    assert "left_right" in summary["left_out_episodes"][0]["detail"]


def test_decisions_are_used(data: Path, tmp_path: Path) -> None:
    accept, reject = (BAD, "accept", content_of(data, BAD)), ("fake/1", "reject", content_of(data, "fake/1"))
    assert curated(data, tmp_path / "x", accept, reject) == {"fake/0", "fake/2", BAD}
    found = read_json(tmp_path / "x" / "summary.json")["decisions"]
    assert found == {"accepted_from_quarantine": [BAD], "rejected": ["fake/1"], "stale": [], "refused": []}


def test_a_decision_about_another_annotation_is_not_used(data: Path, tmp_path: Path) -> None:
    stale = ((BAD, "accept", "0" * 16), ("fake/9", "reject", "0" * 16))
    assert curated(data, tmp_path / "x", *stale) == {"fake/0", "fake/1", "fake/2"}
    assert set(read_json(tmp_path / "x" / "summary.json")["decisions"]["stale"]) == {BAD, "fake/9"}


def test_other_decisions_need_another_folder(data: Path, tmp_path: Path) -> None:
    curated(data, tmp_path / "x")
    file = tmp_path / "d.json"
    entry = {"episode_key": "fake/1", "decision": "reject", "content": content_of(data, "fake/1")}
    file.write_text(json.dumps({"format": FORMAT, "decisions": [entry]}))
    arguments = ["curate", "--episodes", str(data / "episodes"), "--annotated", str(data / "annotated")]
    arguments += ["--kinds", "motion_plan", "--out", str(tmp_path / "x"), "--decisions", str(file)]
    assert main(arguments) == 2


def test_broken_ranges_cannot_be_accepted(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "annotated"
    lines = [json.loads(line) for line in (data / "annotated" / "annotated.jsonl").read_text().splitlines()]
    broken = AnnotatedEpisode.from_json(lines[0])
    episode = episode_of(PLACE, broken.instruction, broken.episode_key)
    steps = broken.steps[:-1]
    broken = dataclasses.replace(broken, steps=steps, audit=audit_steps(episode, steps))
    with JsonlAppender(root / "annotated.jsonl") as file:
        file.append(broken.to_json())
        file.append(lines[1])
    decision = {"episode_key": "fake/0", "decision": "accept", "content": content_hash(broken)}
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"format": FORMAT, "decisions": [decision]}))
    arguments = ["curate", "--episodes", str(data / "episodes"), "--annotated", str(root), "--decisions", str(path)]
    assert main([*arguments, "--kinds", "motion_plan", "--out", str(tmp_path / "x")]) == 0
    summary = read_json(tmp_path / "x" / "summary.json")
    assert summary["decisions"]["refused"] == ["fake/0"] and summary["episodes"] == 1


@pytest.mark.parametrize("value", [[], {}, {"format": FORMAT, "decisions": [{"episode_key": 1}]}])
def test_other_files_are_no_decisions(
    data: Path, tmp_path: Path, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(value))
    arguments = ["curate", "--episodes", str(data / "episodes"), "--annotated", str(data / "annotated")]
    assert main([*arguments, "--out", str(tmp_path / "x"), "--decisions", str(path)]) == 1
    assert "d.json" in capsys.readouterr().err
