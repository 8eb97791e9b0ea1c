"""`vqa`: Table 1's figures, the twin's questions, and runs against a small real HTTP server with canned answers."""

import json
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_server import serving

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.cli import main
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.pretrain_data import conversation, still
from vlm2vla_training.vqa.lmms import read_metric, refuse_failures
from vlm2vla_training.vqa.proportions import ratio_interval, wilson
from vlm2vla_training.vqa.questions import OTHER, QUESTIONS, TRAINED, constant_answer, correct, questions
from vlm2vla_training.vqa.table1 import TABLE_1, paper_retention, retention
from vlm2vla_training.vqa.twin import figures

ROOT = Path(__file__).resolve().parents[2]
Say = Callable[[str, str], tuple[int, str]]


# --- the paper's figures ----------------------------------------------------------------------------------------------


def test_the_papers_shares_come_from_its_table() -> None:
    ours, at = paper_retention("main"), paper_retention("at")
    assert ours.minimum is not None and ours.mean is not None and at.minimum is not None and at.mean is not None
    assert [round(100 * value, 1) for value in (ours.minimum, ours.mean)] == [85.2, 95.6]
    assert [round(100 * value, 1) for value in (at.minimum, at.mean)] == [75.9, 90.9]
    assert min(ours.shares, key=lambda name: ours.shares[name] or 0.0) == "OCRBench"
    assert len({one.task for one in TABLE_1}) == 12


def test_a_base_without_a_right_answer_has_no_share() -> None:
    kept = retention({"a": 0.0, "b": 0.5}, {"a": 0.2, "b": 0.4})
    assert kept.shares == {"a": None, "b": 0.8} and kept.minimum == kept.mean == 0.8
    assert retention({"a": 0.0}, {"a": 1.0}).mean is None


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_are_balanced_and_ask_the_same_twice() -> None:
    asked = questions(4, 600_000)
    assert Counter(one.kind for one in asked) == dict.fromkeys(QUESTIONS, 4)
    assert len({one.seed for one in asked}) == len(asked), "a picture of its own each"
    for kind in ("is it there", "is it held", "left or right"):
        assert Counter(one.answer for one in asked if one.kind == kind) == {"yes": 2, "no": 2}
    assert all(one.texts[TRAINED] != one.texts[OTHER] for one in asked)
    again = questions(4, 600_000)
    assert [(one.seed, one.texts, one.answer) for one in asked] == [(one.seed, one.texts, one.answer) for one in again]


def test_no_other_wording_is_ever_a_training_question() -> None:
    shown = [found[1] for seed in range(600_000, 600_020) if (found := still(seed)) is not None]
    random = np.random.default_rng(0)
    trained = {question for truth in shown for question, _ in conversation(truth, random, turns=100)}
    for _, (known, others) in QUESTIONS.values():
        assert any(_pattern(known).fullmatch(question) for question in trained), f"{known}: not a trained wording"
        for other in others:
            assert not any(_pattern(other).fullmatch(question) for question in trained), f"{other}: is trained"


def _pattern(wording: str) -> re.Pattern[str]:
    return re.compile(re.escape(wording).replace(r"\{a\}", ".+?").replace(r"\{b\}", ".+?"))


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("Yes.", "yes", True), ("the carrot", "carrot", True), (" A  yellow plate ", "yellow plate", True),
        ("yes, there is", "yes", False), ("no", "yes", False), ("", "yes", False), ("['yes']", "yes", False),
        ("carrot card", "carrot", False),
    ],
)  # fmt: skip
def test_what_counts_as_right(said: str, answer: str, right: bool) -> None:
    assert correct(said, answer) is right


# --- intervals --------------------------------------------------------------------------------------------------------


def test_wilson_against_published_values() -> None:
    assert [round(value, 4) for value in wilson(81, 263)] == [0.2553, 0.3662]  # Newcombe 1998, table I
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=20, max_size=60))
def test_a_ratio_lies_in_its_interval(pairs: list[tuple[bool, bool]]) -> None:
    base, tuned = [a for a, _ in pairs], [b for _, b in pairs]
    found = ratio_interval(base, tuned)
    if found is None:
        assert sum(base) < len(base) / 2
        return
    assert found[0] - 1e-9 <= sum(tuned) / sum(base) <= found[1] + 1e-9 or sum(base) < 5
    assert ratio_interval(base, base) == (1.0, 1.0)


def test_figures_of_hand_made_answers() -> None:
    lines = [
        {"model": model, "question": number, "kind": "k", "wording": wording, "expected": "yes" if number else "no",
         "right": model == "base" or (wording == TRAINED and number == 0)}
        for model in ("base", "a") for wording in (OTHER, TRAINED) for number in (0, 1, 2)
    ]  # fmt: skip
    found = figures(lines, ["base", "a"])
    assert found[TRAINED]["kinds"]["k"]["constant_answer"] == 0.6667 and constant_answer(["a", "b", "b"]) == 2 / 3
    assert found[TRAINED]["all"]["a"]["right"] == 1 and found[TRAINED]["retention"]["a"]["all"] == round(1 / 3, 4)
    assert found[OTHER]["retention"]["a"] == {
        "by_kind": {"k": 0.0}, "minimum": 0.0, "mean": 0.0, "all": 0.0, "all_95": [0.0, 0.0],
    }  # fmt: skip


# --- against a server -------------------------------------------------------------------------------------------------


def info() -> dict[str, Any]:
    card = ModelCard.read(ROOT / "models/twin/adapter").model_dump(mode="json")
    adapter = {"name": "twin", "hash": "h", "policy": True, "card": card}
    limits = {"max_row_translation_m": 0.1, "max_rows": 32, "max_body_mb": 8, "max_concurrency": 4}
    return {
        "protocol": 1, "model": "twin", "policy": True, "base_hash": "b", "adapters": [adapter], "prompt_versions": {},
        "limits": limits, "units": {}, "image_size": 112, "engine": "fake", "versions": {},
    }  # fmt: skip


@contextmanager
def asked_of(say: Say) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server with the adapter "twin"; `say` gives status and text for a model and a question."""
    asked: list[dict[str, Any]] = []

    def answer(_: str, body: dict[str, Any] | None) -> tuple[int, object]:
        if body is None:
            return 200, info()
        asked.append(body)
        status, text = say(body["model"], body["messages"][0]["content"][1]["text"])
        return status, {"choices": [{"message": {"content": text}}]}

    with serving(answer) as url:
        yield url, asked


def arguments(url: str, out: Path, *more: str) -> list[str]:
    return ["vqa", "--server", url, "--out", str(out), "--questions", "2", "--seed", "600000", *more]


def test_the_twins_benchmark_runs_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing = {"on": True}

    def say(model: str, question: str) -> tuple[int, str]:
        if failing["on"] and question.startswith("What colour"):
            return 500, ""
        return 200, "yes" if model == "base" else "[[0.0, 0.0, 0.0, 1.0]]"

    with asked_of(say) as (url, asked):
        assert main(arguments(url, tmp_path / "no", "--dry-run")) == 0 and not (tmp_path / "no").exists()
        assert main(arguments(url, tmp_path / "out")) == 1, "an answer that never came is no wrong answer"
        assert "500" in capsys.readouterr().err and not (tmp_path / "out/summary.json").exists()
        kept, failing["on"] = len((tmp_path / "out/answers.jsonl").read_text().splitlines()), False
        before = len(asked)
        assert main(arguments(url, tmp_path / "out")) == 0
        total = 2 * len(QUESTIONS) * 2 * 2
        assert kept > 0 and len(asked) - before == total - kept, "nothing is asked twice"
    assert all(body["messages"][0]["content"][0]["type"] == "image_url" for body in asked)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    part = summary[OTHER]
    assert summary["models"] == {"base": "b", "twin": "h"}
    assert part["kinds"]["is it there"]["models"]["base"]["right"] == 1, "yes and no are asked equally often"
    assert part["all"]["twin"]["right"] == 0 and part["retention"]["twin"]["all"] == 0.0
    page = (tmp_path / "out/report.html").read_text()
    assert "In words never seen in training" in page and "data:image/svg" in page
    assert (tmp_path / "out/retention.png").stat().st_size > 1000


def test_other_weights_or_settings_need_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with asked_of(lambda model, question: (200, "no")) as (url, _):
        assert main(arguments(url, tmp_path)) == 0
        assert main(arguments(url, tmp_path, "--questions", "3")) == 2
        assert "choose another --out" in capsys.readouterr().err
        assert main(arguments(url, tmp_path / "x", "--models", "other")) == 2
        assert "['twin']" in capsys.readouterr().err
    assert main(arguments("http://127.0.0.1:9", tmp_path / "y")) == 1
    assert "expected a running vlm2vla-server" in capsys.readouterr().err


# --- lmms-eval --------------------------------------------------------------------------------------------------------

LMMS = '''#!{python}
"""Stands in for the python of lmms-eval's environment: the check, and a run that writes what lmms-eval 0.7.3 writes."""
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
if sys.argv[1] == "-c":
    metrics = json.loads((here / "metrics.json").read_text())
    print("a line of somebody else's")
    print(json.dumps({{"version": "0.7.3", "metrics": {{name: metrics.get(name) for name in sys.argv[4:]}}}}))
    sys.exit()
given = {{name: sys.argv[sys.argv.index(name) + 1] for name in ("--model_args", "--tasks", "--output_path")}}
model = given["--model_args"].split(",")[0].partition("=")[2]
with (here / "calls.jsonl").open("a") as file:
    names = ("OPENAI_API_KEY", "OPENAI_API_URL", "MODEL_VERSION", "PYTHONPATH")
    file.write(json.dumps({{"arguments": sys.argv[1:], **{{name: os.environ.get(name) for name in names}}}}) + "\\n")
if (here / "crash").exists():
    sys.exit("no such data set")
task = given["--tasks"]
folder = pathlib.Path(given["--output_path"], model)
folder.mkdir(parents=True)
said = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] 503" if (here / "fail").exists() and model != "base" else "yes"
(folder / f"20260101_samples_{{task}}.jsonl").write_text(
    "".join(json.dumps({{"doc_id": n, "filtered_resps": "yes" if n else said}}) + "\\n" for n in range(3)))
values = {{"alias": task, "exact_match,none": 0.8 if model == "base" else 0.6, "exact_match_stderr,none": 0.1}}
(folder / "20260101_results.json").write_text(json.dumps({{"results": {{task: values}}}}))
'''


@pytest.fixture
def lmms(tmp_path: Path) -> Path:
    folder = tmp_path / "lmms"
    folder.mkdir()
    python = folder / "python"
    python.write_text(LMMS.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    metrics = {one.task: [one.metric, "submission"] for one in TABLE_1} | {"own": ["exact_match"]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return python


def test_a_task_runs_on_both_models_and_failed_requests_are_refused(
    lmms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    out, folder = tmp_path / "out", lmms.parent
    with asked_of(lambda model, question: (200, "")) as (url, _):
        command = ["vqa", "--server", url, "--out", str(out), "--benchmarks", "own", "--lmms-python", str(lmms)]
        (folder / "fail").touch()
        assert main([*command, "--api-key", "k"]) == 1
        assert "1 of 3 requests of own failed to the end" in capsys.readouterr().err
        assert (out / "lmms/twin/own.failed").is_dir() and not (out / "summary.json").exists()
        (folder / "fail").unlink()
        assert main([*command, "--api-key", "k"]) == 0
    calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == 3, "the base's part is not run again"
    assert calls[0]["OPENAI_API_KEY"] == "k" and calls[0]["PYTHONPATH"] is None
    assert calls[0]["OPENAI_API_URL"] == f"{url}/v1/chat/completions" and calls[0]["MODEL_VERSION"] == "base"
    assert not any(part == "k" or "api_key" in part for call in calls for part in call["arguments"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["scores"] == {"base": {"own": 80.0}, "twin": {"own": 60.0}}
    assert summary["retention"]["twin"] == {"shares": {"own": 0.75}, "minimum": 0.75, "mean": 0.75}
    assert "twin keeps 75.0 % of the base" in capsys.readouterr().out


def test_table_1_stands_beside_the_papers(lmms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = lmms.read_text().replace('"exact_match,none"', "(METRIC[task] + ',none')")
    names = json.dumps({one.task: one.metric for one in TABLE_1})
    lmms.write_text(text.replace("import json, os", f"METRIC = {names}\nimport json, os"))
    with asked_of(lambda model, question: (200, "")) as (url, _):
        given = ["vqa", "--server", url, "--out", str(tmp_path / "out"), "--benchmarks", "table1"]
        assert main([*given, "--lmms-python", str(lmms)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "75.0 %" in rows["OCRBench"] and "85.2 %" in rows["OCRBench"] and "87.3 %" in rows["OCRBench"]
    assert all(part in rows["minimum"] for part in ("85.2 %", "75.9 %"))
    assert all(part in rows["mean"] for part in ("95.6 %", "90.9 %"))


def test_task_names_are_checked(lmms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["vqa", "--check-tasks", "--lmms-python", str(lmms), "--out", str(tmp_path / "out")]
    assert main(check) == 0 and "all 12 tasks and metrics are in lmms-eval 0.7.3" in capsys.readouterr().out
    metrics = json.loads((lmms.parent / "metrics.json").read_text())
    metrics["mme"] = ["other"]
    del metrics["ai2d"]
    (lmms.parent / "metrics.json").write_text(json.dumps(metrics))
    assert main(check) == 1
    told = capsys.readouterr().err
    assert "MME: mme has other, not mme_perception_score" in told and "AI2D: no task ai2d" in told


def test_what_goes_wrong_in_that_environment_is_told(
    lmms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with asked_of(lambda model, question: (200, "")) as (url, _):
        command = ["vqa", "--server", url, "--out", str(tmp_path / "out"), "--lmms-python", str(lmms)]
        assert main([*command, "--benchmarks", "nowhere"]) == 2 and "no task nowhere" in capsys.readouterr().err
        (lmms.parent / "crash").touch()
        assert main([*command[:-2], "--benchmarks", "own", "--out", str(tmp_path / "two"), *command[-2:]]) == 1
        assert "no such data set" in capsys.readouterr().err
        assert main([*command[:-2], "--benchmarks", "own"]) == 2 and "--lmms-python" in capsys.readouterr().err
        none = str(tmp_path / "none")
        assert main([*command[:-1], none, "--benchmarks", "own", "--out", str(tmp_path / "three")]) == 2
        assert "cannot be started" in capsys.readouterr().err


def test_results_without_the_metric_or_without_answers_are_refused(tmp_path: Path) -> None:
    values = {"anls,none": 0.5, "anls_stderr,none": 0.1}
    (tmp_path / "x_results.json").write_text(json.dumps({"results": {"t": values}}))
    assert read_metric(tmp_path, "t", None) == ("anls", 0.5)
    with pytest.raises(DataError, match="expected exact_match"):
        read_metric(tmp_path, "t", "exact_match")
    with pytest.raises(DataError, match="no answers"):
        refuse_failures(tmp_path, "t")


def test_benchmark_names() -> None:
    from vlm2vla_training.vqa.command import benchmarks

    assert benchmarks("twin") == [] and benchmarks("table1") == list(TABLE_1)
    known, own = benchmarks("mme, own=anls")
    assert known == TABLE_1[2] and (own.task, own.metric) == ("own", "anls")
    with pytest.raises(UsageError, match="TASK"):
        benchmarks("a,,b")
