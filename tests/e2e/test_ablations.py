"""bench/ablations.py: counts, pairs and retention of made-up results, told by hand beforehand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bench_programs import program

from vlm2vla_client.evaluation.trials import Trial
from vlm2vla_twin.tasks import SUITES

SEED = 600_000


@pytest.fixture
def bench() -> Iterator[Any]:
    with program("ablations") as module:
        yield module


def trial(suite: str, seed: int, success: bool) -> Trial:
    return Trial(
        suite=suite, task=SUITES[suite].instruction(seed), seed=seed, mode="varied", policy="server", model="m",
        verifier="twin", planning=True, score=2 if success else 0, max_score=2, planning_score=2 if success else 0,
        non_planning_score=2 if success else 0, plan_credit=None, success=success, verified=success,
        failure=None if success else "no_contact", flags={}, outcome="verified", message="", cycles=3, seconds=1.0,
        subtasks=[], plans=[], subtasks_done=0, rows_executed=3, rows_changed=0, rows_refused=0, cycle_seconds=[1.0],
        verify_seconds=[], retried_cycles=0, retries=0, commit="c0", finished_utc="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def answer(model: str, number: int, right: bool, text: str = "q") -> list[dict[str, Any]]:
    return [
        {"model": model, "question": number, "kind": "is it there", "seed": SEED + number, "wording": wording,
         "text": f"{text}{number}", "expected": "no", "said": "no" if right else "yes", "right": right}
        for wording in ("other", "trained")
    ]  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """main wins 8 of 10 on carrots, at 5 of them (one that main loses), nr was only run on the first four."""
    won = {"main": range(8), "at": [0, 1, 2, 3, 9], "nr": range(4)}
    for name, wins in won.items():
        count = 4 if name == "nr" else 10
        lines = [asdict(trial("pick_carrot", SEED + place, place in wins)) for place in range(count)]
        if name == "nr":  # broken off: a quick success beyond seeds that are still under way
            lines.append(asdict(trial("pick_carrot", SEED + 7, True)))
        write(tmp_path / name / "trials.jsonl", lines)
    right = {"base": 10, "main": 5, "at": 8}
    asked = [line for name, count in right.items() for n in range(12) for line in answer(name, n, n < count)]
    write(tmp_path / "vqa" / "answers.jsonl", asked)
    write(tmp_path / "vqa_full" / "answers.jsonl", [line for n in range(12) for line in answer("base", n, n < 1)])
    again = [line for n in range(12) for line in (*answer("base", n, False), *answer("nr", n, n < 6))]
    write(tmp_path / "vqa_nr" / "answers.jsonl", again)
    return tmp_path


def test_counts_pairs_and_shares_are_those_told(bench: Any, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--results", str(results)]) == 0
    found = json.loads((results / "ablations.json").read_text(encoding="utf-8"))
    carrot = found["success"]["pick_carrot"]
    counts = {name: (one["successes"], one["trials"]) for name, one in carrot.items()}
    assert counts == {"main": (8, 10), "at": (5, 10), "nr": (4, 4)}
    assert carrot["main"]["wilson_95"] == [0.4902, 0.9433]
    at, nr = found["minus_main"]["at"]["pick_carrot"], found["minus_main"]["nr"]["pick_carrot"]
    assert (at["seeds"], at["only_main"], at["only_this"], at["difference"]) == (10, 4, 1, -0.3)
    assert at["mcnemar_p"] == 0.375, "two tails of Binomial(5, 1/2): 2 (1 + 5) / 32"
    assert (nr["seeds"], nr["difference"]) == (4, 0.0), "only seeds that both ran"
    assert (nr["score_difference"], nr["bootstrap_95"]) == (0.0, [0.0, 0.0])
    assert at["score_difference"] == -0.6, "four seeds two points less, one two more"
    assert -1.5 < at["bootstrap_95"][0] < -0.6 < at["bootstrap_95"][1] < 0.5
    kept = found["retention"]["trained"]["retention"]
    assert {name: one["all"] for name, one in kept.items()} == {"main": 0.5, "at": 0.8, "nr": 0.6, "full": 0.1}
    assert found["retention"]["right_answers_minus_main_trained"]["full"]["difference"] == round(-4 / 12, 4)
    said = capsys.readouterr().out
    assert "| pick_carrot | 8 of 10 (49.0 to 94.3 %), score 1.60 of 2 |" in said
    assert "| pick_carrot | -30 points (" in said and "| full fine-tune | 10.0 % (" in said


def test_the_figure_shows_each_model_and_comes_out_the_same_twice(bench: Any, results: Path) -> None:
    bench.main(["--results", str(results)])
    first = (results / "ablations.svg").read_bytes()
    bench.main(["--results", str(results)])
    assert (results / "ablations.svg").read_bytes() == first
    drawn = {colour for colour in bench.COLOURS if colour in first.decode()}
    assert drawn == set(bench.COLOURS)
    assert not re.search(rb"<(script|image)", first)


def test_the_full_models_questions_must_be_the_others(bench: Any, results: Path) -> None:
    write(results / "vqa_full" / "answers.jsonl", [line for n in range(12) for line in answer("base", n, True, "r")])
    with pytest.raises(SystemExit, match="different questions"):
        bench.main(["--results", str(results)])


def test_without_trials_nothing_is_written(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--results", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
