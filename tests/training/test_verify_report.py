"""`verify-report`: pairs, the probability that is read, and the arithmetic of its figures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training_fakes import PICK, PLACE, episode_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm2vla_schema.images import decode_image, to_model_square
from vlm2vla_schema.types import ModelCard
from vlm2vla_training.analysis.verify import pairs_of
from vlm2vla_training.analysis.verify_figures import at_most, curve, figures, halves, reliability
from vlm2vla_training.annotation.files import read_annotated
from vlm2vla_training.cli import main
from vlm2vla_training.curation.examples import ExampleOptions
from vlm2vla_training.episodes.parquet import EpisodeDataset, EpisodeWriter
from vlm2vla_training.jsonio import read_jsonl
from vlm2vla_training.sft_data import Encoder

BASE = Path(__file__).parents[2] / "models" / "twin" / "base"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    with EpisodeWriter(root / "episodes") as writer:
        writer.write(episode_of(PICK, "pick up the carrot", "fake/0", 0.001, 0))
        writer.write(episode_of(PLACE, "put the carrot on the plate", "fake/1", 0.001, 1))
    assert main(["annotate", "--episodes", str(root / "episodes"), "--out", str(root / "annotated")]) == 0
    return root


def report(data: Path, out: Path, *more: str) -> int:
    inputs = ["--episodes", str(data / "episodes"), "--annotated", str(data / "annotated"), "--verify-pairs", "2"]
    return main(["verify-report", "--base", str(BASE), *inputs, "--out", str(out), *more])


def test_margins_are_the_models_own_and_a_stopped_run_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert report(data, out, "--dry-run") == 0 and not out.exists()
    assert report(data, out) == 0 and "balanced accuracy" in capsys.readouterr().out
    lines, text = list(read_jsonl(out / "pairs.jsonl")), (out / "pairs.jsonl").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert {line["kind"] for line in lines} == {"verify", "completion"} and summary["episodes"] == 2
    assert sum(kind["served"]["pairs"] for kind in summary["kinds"].values()) == len(lines)
    line = next(one for one in lines if one["kind"] == "verify")
    assert line["margin_nat"] == pytest.approx(by_hand(data, line), abs=2e-3)
    assert all((out / f"verify.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
    first = sum(one["episode_key"] == lines[0]["episode_key"] for one in lines)
    (out / "pairs.jsonl").write_text("".join(text.splitlines(keepends=True)[: first + 2]) + '{"episode_key": "fa')
    assert report(data, out) == 0
    again = json.loads((out / "summary.json").read_text())
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert report(data, out, "--no-next-subtask") == 2 and "next_subtask" in capsys.readouterr().err
    assert report(data, tmp_path / "no", "--max-false-success", "1") == 2


def test_a_threshold_is_stored_in_the_adapters_card_and_then_served(data: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(BASE.parent / "adapter", adapter)
    first = ("--adapter", str(adapter), "--max-false-success", "0.1", "--write-threshold")
    assert report(data, tmp_path / "out", *first) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    asked = [line for line in read_jsonl(tmp_path / "out" / "pairs.jsonl") if line["kind"] == "verify"]
    found = ModelCard.read(adapter).verify_threshold
    assert found is not None and found == summary["written_threshold"] and summary["threshold"] == 0.5
    margin = math.log(found / (1 - found))
    assert 0 < at_most(asked, 0.1) < margin < at_most(asked, 0.1) + 0.01
    assert figures(asked, margin)["false_success"] <= 0.1 < figures(asked, 0.0)["false_success"]
    assert report(data, tmp_path / "again", "--adapter", str(adapter)) == 0
    served = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert served["threshold"] == found and served["kinds"]["verify"]["served"] == figures(asked, margin)
    assert report(data, tmp_path / "no", "--write-threshold") == 2


def by_hand(data: Path, line: dict[str, Any]) -> float:
    """ln p(true) - ln p(false) behind `{"success":`, through the processor and without the collator."""
    annotated = read_annotated(data / "annotated")[line["episode_key"]]
    options = ExampleOptions(kinds=("verify", "completion"), verify_pairs=2)
    pair = next(
        one for one in pairs_of(annotated, options)
        if one.example.kind == "verify" and list(one.example.images) == line["images"] and one.done == line["done"]
    )  # fmt: skip
    skip = frozenset(EpisodeDataset(data / "episodes").keys()) - {line["episode_key"]}
    episode = next(iter(EpisodeDataset(data / "episodes").episodes(skip)))
    pictures = [
        Image.fromarray(to_model_square(decode_image(episode.images[step - episode.first_step]), 112))
        for step in pair.example.images
    ]
    processor: Any = AutoProcessor.from_pretrained(BASE)
    encoder = Encoder(processor, 112)
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    found = []
    for word in ("true", "false"):
        answer = f'{{"success": {word}, "confidence": "High", "reasoning": "x"}}'
        text = encoder.prompt_text(pair.example.prompt, 2) + answer
        inputs = processor(text=[text], images=[pictures], add_special_tokens=False, return_tensors="pt")
        whole = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        other = processor.tokenizer(answer.replace(word, "true" if word == "false" else "false"),
                                    add_special_tokens=False)["input_ids"]  # fmt: skip
        place = next(index for index, (a, b) in enumerate(zip(whole, other, strict=False)) if a != b)
        at = inputs["input_ids"].shape[1] - len(whole) + place - 1
        with torch.no_grad():
            found.append(float(torch.log_softmax(model(**inputs).logits[0, at].float(), dim=-1)[whole[place]]))
    return found[0] - found[1]


def test_sorts_of_negatives(data: Path) -> None:
    options = ExampleOptions(kinds=("verify", "completion"), verify_pairs=6)
    for annotated in read_annotated(data / "annotated").values():
        ends = [step.first for step in annotated.steps[1:]] + [annotated.steps[-1].last]
        for pair in pairs_of(annotated, options):
            step = next(one for one in annotated.steps if one.last == pair.example.last)
            end, after = ends[annotated.steps.index(step)], pair.example.images[1]
            assert pair.done == (after == end) == (pair.sort == "done")
            if pair.sort == "hard":
                assert end - 3 <= after < end and after > step.first
            if pair.sort == "earlier":
                assert step.first < after < end - 3
            if pair.sort == "other":
                assert not step.first < after <= end
        assert {"done", "hard"} <= {pair.sort for pair in pairs_of(annotated, options)}
        asked = [pair.example.prompt for pair in pairs_of(annotated, options, with_next=False)]
        assert asked != [pair.example.prompt for pair in pairs_of(annotated, options)]


def pair(margin: float, done: bool, sort: str = "hard", key: str = "a") -> dict[str, Any]:
    return {"margin_nat": margin, "done": done, "sort": "done" if done else sort, "episode_key": key}


def test_rates_calibration_and_thresholds() -> None:
    pairs = [pair(3.0, True), pair(1.0, True), pair(-1.0, True), pair(2.0, False), pair(-2.0, False, "other"),
             pair(-3.0, False, "other"), pair(-4.0, False)]  # fmt: skip
    found = figures(pairs, 0.0)
    assert (found["accepted"], found["false_success"]) == (0.6667, 0.25)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 3 / 4) / 2, abs=1e-4)
    assert found["rejected"] == {"hard": 0.5, "other": 1.0} and found["negatives"] == {"hard": 2, "other": 2}
    assert figures(pairs, 2.0)["false_success"] == 0.0 and figures(pairs[:1], 0.0)["balanced_accuracy"] is None
    assert at_most(pairs, 0.2) == 2.0 and at_most(pairs, 0.25) == -2.0
    assert figures(pairs, at_most(pairs, 0.25))["false_success"] == 0.25
    assert at_most(pairs[:3], 0.02) == -math.inf
    wrong, accepted = curve(pairs)
    assert wrong.tolist()[-1] == accepted.tolist()[-1] == 1.0 and accepted[0] == pytest.approx(1 / 3)
    sure = [pair(math.log(9), number < 9) for number in range(10)]  # says 0.9, and 9 of 10 are
    assert reliability(sure)["expected_calibration_error"] == 0.0
    (line,) = reliability([pair(math.log(3), False)] * 4)["table"]
    assert (line["said"], line["done"], line["pairs"]) == (0.75, 0.0, 4)
    one, other = halves([pair(0.0, True, key=str(number // 2)) for number in range(20)])
    assert len(one) == len(other) == 10 and not {p["episode_key"] for p in one} & {p["episode_key"] for p in other}
