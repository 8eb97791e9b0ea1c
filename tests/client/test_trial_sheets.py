"""Sheets for a real bench: blind, blocked, the same again by seed, and read back without guessing."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm2vla_client.errors import CameraError, ConfigurationError
from vlm2vla_client.evaluation.cli import main
from vlm2vla_client.evaluation.overlay import OVERLAY, blend, difference, reference_of, start_file
from vlm2vla_client.evaluation.sheet import FILLED, plan_sheet, stages_of, write_plan
from vlm2vla_client.evaluation.sheet_read import SheetError, read_sheet
from vlm2vla_client.recorder import Recorder
from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks import SUITES, Judge

SEED = 500_000
SUITES_HERE = ("pick_carrot", "eggplant_pan_fish", "pick_carrot_hi")
POLICIES = ("ours", "tokens", "openvla")
Row = dict[str, str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sheet of two blocks, without pictures."""
    write_plan(tmp_path / "sheet", plan_sheet(SUITES_HERE, POLICIES, 2, SEED, mode="paper", reactive=["openvla"]))
    return tmp_path / "sheet"


def rows_of(folder: Path) -> list[Row]:
    with (folder / "sheet.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def who(folder: Path) -> dict[str, str]:
    labels = json.loads((folder / "key.json").read_text(encoding="utf-8"))["labels"]
    return {label: item["policy"] for label, item in labels.items()}


def fill(folder: Path, change: Callable[[int, Row], None] = lambda number, row: None, separator: str = ",") -> None:
    """Every policy but openvla does everything right; then ``change`` edits line ``number`` of the file."""
    rows, names = rows_of(folder), who(folder)
    for number, row in enumerate(rows, start=2):
        reactive = names[row["policy"]] == "openvla"
        row["reached"] = "c" if reactive else "".join(stages_of(row["suite"]))
        row["plan"] = "yes" if SUITES[row["suite"]].plan_counts and not reactive else ""
        row["by"] = "a scorer"
        change(number, row)
    with (folder / "sheet.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def problems(folder: Path) -> list[str]:
    with pytest.raises(SheetError) as caught:
        read_sheet(folder)
    return caught.value.problems


# --- planning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SUITES))
def test_the_scoring_keys_are_the_judges_stages(name: str) -> None:
    suite = SUITES[name]
    assert list(stages_of(name).values()) == list(Judge(World(suite.scene(SEED)), suite).flags())


def test_every_block_has_each_policy_once_a_task_from_one_start(folder: Path) -> None:
    rows = rows_of(folder)
    assert [int(row["trial"]) for row in rows] == list(range(1, 19))
    for block, start in (("1", SEED), ("2", SEED + 1)):
        mine = [row for row in rows if row["block"] == block]
        assert Counter((row["suite"], row["policy"]) for row in mine) == Counter(
            {(suite, label): 1 for suite in SUITES_HERE for label in "ABC"}
        )
        assert {row["start"] for row in mine} == {str(start)}
        assert all(row["task"] == SUITES[row["suite"]].instruction(start) for row in mine)


def test_order_is_random_and_the_same_again_by_seed() -> None:
    one, two, other = (plan_sheet(SUITES_HERE, POLICIES, 10, seed) for seed in (SEED, SEED, SEED + 1))
    assert one == two and [line.policy for line in one.lines] != [line.policy for line in other.lines]
    orders = {tuple(line.policy for line in one.lines[place : place + 3]) for place in range(0, 90, 3)}
    assert len(orders) > 3, "policies take turns at being first"
    tasks = {tuple(line.suite for line in one.lines[place : place + 9 : 3]) for place in range(0, 90, 9)}
    assert len(tasks) > 2


def test_only_the_key_says_who_is_who(folder: Path) -> None:
    assert sorted(who(folder).values()) == sorted(POLICIES) and sorted(who(folder)) == ["A", "B", "C"]
    for path in folder.iterdir():
        if path.name != "key.json":
            assert not any(name in path.read_text(encoding="utf-8-sig") for name in POLICIES), path.name


def test_a_sheet_is_never_written_over(folder: Path) -> None:
    fill(folder)
    before = (folder / "sheet.csv").read_bytes()
    with pytest.raises(ConfigurationError, match="holds a trial sheet"):
        write_plan(folder, plan_sheet(SUITES_HERE, POLICIES, 2, SEED))
    assert (folder / "sheet.csv").read_bytes() == before


@pytest.mark.parametrize("policies", [[], ["a", "a"], ["a", ""], [f"p{n}" for n in range(27)]])
def test_policies_that_cannot_be_told_apart(policies: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="--policies"):
        plan_sheet(SUITES_HERE, policies, 1, SEED)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_filled_sheet_becomes_trials_by_policy(folder: Path, separator: str) -> None:
    fill(folder, separator=separator)
    filled = {policy.policy: policy for policy in read_sheet(folder)}
    assert list(filled) == list(POLICIES), "in the order in which they were named"
    ours = filled["ours"].trials
    assert len(ours) == 6 and all(trial.success and trial.score == trial.max_score for trial in ours)
    assert {trial.seed for trial in ours} == {SEED, SEED + 1} and {trial.verifier for trial in ours} == {"person"}
    reactive = filled["openvla"].trials
    assert all(not trial.planning and trial.score == 1 and trial.failure is not None for trial in reactive)
    assert {trial.failure for trial in reactive} == {"not_lifted", "not_grasped_eggplant"}


def test_plan_credit_follows_the_person_and_the_rubric(folder: Path) -> None:
    def no_plan(number: int, row: Row) -> None:
        if row["plan"]:
            row["plan"], row["reached"] = "no", "c"

    fill(folder, no_plan)
    trials = next(policy.trials for policy in read_sheet(folder) if policy.policy == "ours")
    scores = {trial.suite: (trial.planning_score, trial.non_planning_score) for trial in trials}
    assert scores["pick_carrot_hi"] == (0, 1), "contact alone earns nothing without the right plan (D.1)"
    assert scores["pick_carrot"] == (2, 2)


def test_a_recording_gives_words_and_times_and_the_person_has_the_last_word(folder: Path) -> None:
    names = who(folder)
    hindi = [row for row in rows_of(folder) if row["suite"] == "pick_carrot_hi"]
    line = next(row for row in hindi if names[row["policy"]] == "ours")
    with Recorder(folder / "episode") as recorder:
        recorder.event("episode", task=line["task"])
        recorder.event("request", stage="cycle")
        recorder.event("plan", motion_plan="Move to the thing.")
        recorder.event("answer", seconds=0.0, answer={})
        recorder.summary({"subtasks": ["Lift the thing"], "cycles": 7, "seconds": 31.5, "verified": True})

    def recorded(number: int, row: Row) -> None:
        if row["trial"] == line["trial"]:
            row["recording"] = "episode"

    fill(folder, recorded)
    ours = next(policy for policy in read_sheet(folder) if policy.policy == "ours")
    trial = next(trial for trial in ours.trials if trial.key == ("pick_carrot_hi", int(line["start"])))
    assert (trial.cycles, trial.seconds, trial.verified, len(trial.cycle_seconds)) == (7, 31.5, True, 1)
    assert trial.plan_credit is False, "by the keywords: no carrot in the words"
    assert ours.overrides[trial.key].plan_credit is True and ours.overrides[trial.key].by == "a scorer"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("reached", "", "reached: empty"),
        ("reached", "cx", "'x' is no key of this task"),
        ("reached", "l", "reached: lifted fish without contact fish"),
        ("reached", "cp", "reached: placed eggplant without grasped eggplant"),
        ("reached", "ct", "reached: toward fish without placed eggplant"),
        ("plan", "perhaps", "plan: expected yes or no, found 'perhaps'"),
        ("plan", "", "plan: expected yes or no, or the recording"),
        ("cycles", "-1", "cycles: expected a whole number"),
        ("cycles", "twelve", "cycles: expected a whole number"),
        ("fault", "gremlins", "fault: expected one of server, safety_stop, camera, robot"),
        ("by", "", "by: who scored it?"),
        ("recording", "nowhere", "recording: "),
        ("task", "juggle", "what was printed was changed; expected task"),
        ("policy", "Z", "what was printed was changed; expected policy"),
        ("trial", "99", "trial '99' is not in the plan"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(folder: Path, column: str, value: str, message: str) -> None:
    touched: list[int] = []

    def spoil(number: int, row: Row) -> None:
        if not touched and row["suite"] == "eggplant_pan_fish" and who(folder)[row["policy"]] == "ours":
            touched.append(number)
            row[column] = value

    fill(folder, spoil)
    found = problems(folder)
    assert any(problem.startswith(f"line {touched[0]}: ") and message in problem for problem in found), found


@pytest.mark.parametrize(
    ("suite", "policy", "message"),
    [("pick_carrot", "ours", "gives no credit"), ("pick_carrot_hi", "openvla", "this policy writes none")],
)
def test_a_plan_where_none_is_asked_for(folder: Path, suite: str, policy: str, message: str) -> None:
    def spoil(number: int, row: Row) -> None:
        if row["suite"] == suite and who(folder)[row["policy"]] == policy:
            row["plan"] = "yes"

    fill(folder, spoil)
    assert [message in problem for problem in problems(folder)] == [True, True]


def test_all_problems_are_told_at_once(folder: Path) -> None:
    def spoil(number: int, row: Row) -> None:
        if number in (3, 5):
            row["by"] = ""

    fill(folder, spoil)
    assert problems(folder) == ["line 3: by: who scored it?", "line 5: by: who scored it?"]


def test_lines_lost_doubled_or_torn(folder: Path) -> None:
    fill(folder)
    path = folder / "sheet.csv"
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    path.write_text("\n".join([*lines[:-2], lines[1], "1,2,3", ""]), encoding="utf-8")
    found = problems(folder)
    assert found[0] == "line 18: trial 1 stands on line 2 already"
    assert found[1] == f"line 19: expected {7 + len(FILLED)} columns, found 3"
    assert found[2] == "trials missing: 17, 18"
    path.write_text("reached,by\nc,me\n", encoding="utf-8")
    assert problems(folder)[0].startswith("line 1: expected the columns trial, block,")
    path.write_bytes("trial,Möhre".encode("latin-1"))
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read_sheet(folder)


def test_an_unfilled_line_is_left_out_only_when_asked(folder: Path) -> None:
    def clear(number: int, row: Row) -> None:
        if number > 10:
            row.update(dict.fromkeys(FILLED, ""))

    fill(folder, clear)
    assert len(problems(folder)) > 9
    filled = read_sheet(folder, partial=True)
    assert sum(len(policy.trials) for policy in filled) == 9 and sum(policy.left_out for policy in filled) == 9


def test_a_key_of_another_sheet_is_refused(folder: Path) -> None:
    fill(folder)
    (folder / "key.json").write_text('{"labels": {"A": {"policy": "x", "planning": true}}}', encoding="utf-8")
    with pytest.raises(ConfigurationError, match="not the key of this sheet"):
        read_sheet(folder)
    (folder / "key.json").unlink()
    with pytest.raises(ConfigurationError, match="missing"):
        read_sheet(folder)


# --- command lines ----------------------------------------------------------------------------------------------------


def test_from_a_new_sheet_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench"
    asked = ["sheet", "--suites", ",".join(SUITES_HERE), "--policies", ",".join(POLICIES), "--reactive", "openvla"]
    assert main([*asked, "--trials", "2", "--seed", str(SEED), "--out", str(out)]) == 0
    assert "18 trials, 6 starts" in capsys.readouterr().out
    printed = (out / "sheet.html").read_text(encoding="utf-8")
    assert printed.count("data:image/jpeg;base64,") == 6 and "गाजर उठाओ" in printed
    assert not any(name in printed for name in POLICIES)
    assert main_fails(["sheet-report", str(out)], SheetError)
    assert "line 2: reached: empty" in capsys.readouterr().err and not (out / "report.html").exists()
    fill(out)
    assert main(["sheet-report", str(out)]) == 0
    assert "ours: 6/6 full scores" in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "seen by a person" in page and "McNemar" in page and page.count("data:image/jpeg;base64,") == 3
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["ours"]["suites"]["pick_carrot"]["successes"] == 2 and summary["openvla"]["trials"] == 6
    assert "p at any time" not in page and main(["sheet-report", str(out), "--sequential"]) == 0
    assert "p at any time" in (out / "report.html").read_text(encoding="utf-8")


def main_fails(argv: list[str], error: type[Exception]) -> bool:
    with pytest.raises(error):
        main(argv)
    return True


def picture(value: int) -> np.ndarray:
    return np.full((48, 64, 3), value, dtype=np.uint8)


def test_the_start_over_the_live_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = rows_of(folder)[0]
    live = tmp_path / "live"
    live.mkdir()
    Image.fromarray(picture(200)).save(live / "000.png")
    drawn = start_file(folder, line["suite"], int(line["start"]))
    drawn.parent.mkdir()
    Image.fromarray(picture(100)).save(drawn, quality=95)
    camera = ["--camera", "images", "--camera-file", str(live), "--camera-repeat"]
    assert main(["overlay", str(folder), "--trial", "1", *camera]) == 0
    assert "difference 39.2 %" in capsys.readouterr().out
    shown = np.asarray(Image.open(folder / OVERLAY))
    assert shown.shape == (48, 64, 3) and abs(int(shown.mean()) - 150) <= 1
    assert main(["overlay", str(folder), "--trial", "1", "--photograph", *camera]) == 0
    reference, is_photo = reference_of(folder, line["suite"], int(line["start"]))
    assert is_photo and reference.mean() == 200, "later trials from this start are laid over the bench's own picture"
    assert main(["overlay", str(folder), "--trial", "1", *camera]) == 0
    assert "difference 0.0 %" in capsys.readouterr().out
    assert main_fails(["overlay", str(folder), "--trial", "19", *camera], ConfigurationError)
    assert main_fails(["overlay", str(folder), "--trial", "1", "--camera", "twin"], ConfigurationError)


def test_a_watched_overlay_ends_with_its_recording(folder: Path, tmp_path: Path) -> None:
    line = rows_of(folder)[0]
    drawn = start_file(folder, line["suite"], int(line["start"]))
    drawn.parent.mkdir()
    Image.fromarray(picture(100)).save(drawn)
    live = tmp_path / "live"
    live.mkdir()
    Image.fromarray(picture(10)).save(live / "000.png")
    camera = ["--camera", "images", "--camera-file", str(live), "--camera-fps", "20"]
    assert main_fails(["overlay", str(folder), "--trial", "1", "--watch", *camera], CameraError)
    assert (folder / OVERLAY).is_file()


def test_blending_and_comparing_pictures_of_any_size() -> None:
    big, small = np.full((480, 640, 3), 50, dtype=np.uint8), picture(150)
    assert blend(small, big, 0.25).shape == big.shape and abs(int(blend(small, big, 0.25).mean()) - 75) <= 1
    assert difference(big, small) == pytest.approx(100 / 255)
    with pytest.raises(ConfigurationError, match="share"):
        blend(small, big, 1.5)
