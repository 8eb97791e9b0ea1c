import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_fakes import PICK, PLACE, episode_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm2vla_schema.parsing import parse_actions
from vlm2vla_training.analysis.model import LoadedModel
from vlm2vla_training.analysis.tokens import Length, compare_with_processor
from vlm2vla_training.cli import main
from vlm2vla_training.curation.dataset import load_examples
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.errors import DataError
from vlm2vla_training.jsonio import read_jsonl
from vlm2vla_training.sft_data import Collator, Encoder, Tokens
from vlm2vla_training.twin_model import write_random_base

TWIN = Path(__file__).parents[2] / "models" / "twin"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    write_random_base(root / "base")
    with EpisodeWriter(root / "episodes") as writer:
        writer.write(episode_of(PICK, "pick up the carrot", "fake/0", 0.001, 0))
        writer.write(episode_of(PLACE, "put the carrot on the plate", "fake/1", 0.001, 1))
    assert main(["annotate", "--episodes", str(root / "episodes"), "--out", str(root / "annotated")]) == 0
    common = ["curate", "--episodes", str(root / "episodes"), "--annotated", str(root / "annotated")]
    assert main([*common, "--image-size", "112", "--out", str(root / "examples")]) == 0
    return root


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demos")
    drive = ["demos", "--suite", "pick_carrot", "--seed", "450000", "--episodes", "2", "--speed-m", "0.0248"]
    assert main([*drive, "--out", str(root / "episodes")]) == 0
    assert main(["annotate", "--episodes", str(root / "episodes"), "--out", str(root / "annotated")]) == 0
    return root


def examine(chain: Path, name: str, out: Path, *more: str) -> int:
    """`tokens` or `logprobs` on the random base."""
    inputs = ["--base", str(chain / "base"), "--examples", str(chain / "examples")]
    return main([name, *inputs, "--out", str(out), *more])


def predict(data: Path, out: Path, *more: str) -> int:
    """`predict` with the twin's own model."""
    inputs = ["--episodes", str(data / "episodes"), "--annotated", str(data / "annotated")]
    return main(
        ["predict", "--base", str(TWIN / "base"), "--adapter", str(TWIN / "adapter"), *inputs, "--out", str(out), *more]
    )


def test_dry_runs_write_nothing(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert predict(chain, out, "--dry-run") == 0 and "predict: would ask" in capsys.readouterr().out
    for name in ("tokens", "logprobs"):
        assert examine(chain, name, out, "--dry-run") == 0 and f"{name}: would" in capsys.readouterr().out
    assert not out.exists()


def test_lengths_are_those_of_the_processor(chain: Path, tmp_path: Path) -> None:
    assert examine(chain, "tokens", tmp_path / "out", "--max-tokens", "60") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    examples = load_examples(chain / "examples", 112, ("actions",))
    processor = AutoProcessor.from_pretrained(chain / "base")
    encoder, totals = Encoder(processor, 112), []
    for prompt, completion, images in zip(examples.prompts, examples.completions, examples.images, strict=True):
        pictures = [Image.fromarray(examples.pixels[number]) for number in images]
        text = encoder.prompt_text(prompt, len(pictures)) + completion + "<end_of_turn>"
        ids = processor(text=[text], images=[pictures], add_special_tokens=False)["input_ids"][0]
        totals.append(len(ids))
    actions = summary["kinds"]["actions"]
    assert (actions["examples"], actions["total"][-1]) == (len(totals), max(totals))
    assert actions["total"][0] == int(np.quantile(totals, 0.5, method="higher"))
    assert actions["over_limit"] == sum(total > 60 for total in totals) > 0
    assert "| actions |" in (tmp_path / "out" / "tokens.md").read_text()
    assert (tmp_path / "out" / "tokens.png").read_bytes().startswith(b"\x89PNG")


def test_a_count_that_the_processor_does_not_share_is_an_error(chain: Path) -> None:
    encoder = Encoder(AutoProcessor.from_pretrained(chain / "base"), 112)
    count = len(encoder.encode("Where is the carrot?", "", 1).prompt)
    compare_with_processor(Length("a", "Where is the carrot?", 1, count, 1), encoder, 112)
    with pytest.raises(DataError, match=f"makes {count} tokens"):
        compare_with_processor(Length("a", "Where is the carrot?", 1, count - 1, 1), encoder, 112)


def test_scores_are_the_models_log_probabilities_and_a_stopped_run_goes_on(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert examine(chain, "logprobs", out, "--bins", "16", "--batch-size", "4") == 0
    whole, summary = (out / "scores.jsonl").read_text(), json.loads((out / "summary.json").read_text())
    lines = list(read_jsonl(out / "scores.jsonl"))
    examples = load_examples(chain / "examples", 112, ("actions",))
    assert len(lines) == len(examples) == summary["scored"]
    line = lines[1]
    ids = AutoProcessor.from_pretrained(chain / "base").tokenizer(
        examples.completions[line["example"]], add_special_tokens=False
    )["input_ids"]
    assert (line["text"]["tokens"], line["least_likely"]["tokens"]) == (len(ids), 4 * line["rows"])
    assert line["text"]["sum"] == pytest.approx(reference(chain / "base", examples, line["example"], ids), abs=1e-3)
    mean = np.mean([one["tokens"]["sum"] / one["tokens"]["tokens"] for one in lines])
    assert summary["representations"]["tokens"]["per_token"]["mean"] == pytest.approx(mean, abs=1e-4)
    for name in ("logprobs.svg", "logprobs.png"):
        assert (out / name).stat().st_size > 5000
    (out / "scores.jsonl").write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"example": 4, "te')
    assert examine(chain, "logprobs", out, "--bins", "16", "--batch-size", "4") == 0
    resumed = list(read_jsonl(out / "scores.jsonl"))
    assert [one["example"] for one in resumed] == [one["example"] for one in lines]
    assert [one["bins"]["sum"] for one in resumed] == pytest.approx([one["bins"]["sum"] for one in lines], abs=1e-3)
    assert examine(chain, "logprobs", out, "--bins", "16", "--limit", "2") == 2
    assert "other settings (actions)" in capsys.readouterr().err


def reference(base: Path, examples: object, place: int, ids: list[int]) -> float:
    """One example alone, without padding, by the processor and the model themselves."""
    prompts, images, pixels = (getattr(examples, name) for name in ("prompts", "images", "pixels"))
    processor = AutoProcessor.from_pretrained(base)
    pictures = [Image.fromarray(pixels[number]) for number in images[place]]
    text = Encoder(processor, 112).prompt_text(prompts[place], len(pictures))
    inputs = dict(processor(text=[text], images=[pictures], add_special_tokens=False, return_tensors="pt"))
    start, answer = inputs["input_ids"].shape[1], torch.tensor([ids])
    for name, more in (("input_ids", answer), ("token_type_ids", 0 * answer), ("attention_mask", 0 * answer + 1)):
        inputs[name] = torch.cat([inputs[name], more], dim=1)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = torch.log_softmax(model(**inputs).logits[0, start - 1 : -1], dim=-1)
    return float(rows[range(len(ids)), ids].sum())


def test_the_least_likely_tokens_are_less_likely_than_any_other(chain: Path, tmp_path: Path) -> None:
    assert examine(chain, "logprobs", tmp_path / "out", "--bins", "16") == 0
    book = json.loads((tmp_path / "out" / "least_likely.json").read_text())
    assert len(set(book["ids"])) == 16 and book["mean_probability"] == sorted(book["mean_probability"])
    examples = load_examples(chain / "examples", 112, ("actions",))
    model = LoadedModel(chain / "base", None, 112)
    tokens = {
        place: model.encoder.encode(examples.prompts[place], examples.completions[place], 1)
        for place in range(len(examples))
    }
    collator = Collator(examples, tokens, model.encoder.processor)
    found = torch.cat(model.log_probabilities(collator([{"example": place} for place in tokens])))
    mean = found.exp().mean(dim=0)[: len(model.encoder.tokenizer)].numpy()
    others = [token for token in range(len(mean)) if token not in {*book["ids"], *model.control_ids}]
    assert mean[book["ids"]].max() <= mean[others].min() * (1 + 1e-4)
    assert book["positions"] == len(found)


def test_log_probabilities_sum_to_one_at_every_position(chain: Path) -> None:
    model = LoadedModel(chain / "base", None, 112)
    examples = load_examples(chain / "examples", 112, ("actions",))
    short = {0: Tokens(model.encoder.encode(examples.prompts[0], "", 1).prompt, np.asarray([300, 301], dtype=np.int32))}
    (found,) = model.log_probabilities(Collator(examples, short, model.encoder.processor)([{"example": 0}]))
    assert found.shape[0] == 2 and torch.allclose(found.exp().sum(dim=1), torch.ones(2), atol=1e-4)


def test_a_model_trained_to_act_is_no_subject_of_fig_3(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "base"
    shutil.copytree(chain / "base", trained)
    card = json.loads((trained / "model_card.json").read_text())
    (trained / "model_card.json").write_text(json.dumps({**card, "policy": True}))
    arguments = [
        "logprobs",
        "--base",
        str(trained),
        "--examples",
        str(chain / "examples"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 2 and "before fine-tuning" in capsys.readouterr().err


def test_predictions_are_compared_with_the_log_and_resumed(
    demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert predict(demos, out) == 0
    lines = list(read_jsonl(out / "predictions.jsonl"))
    whole = (out / "predictions.jsonl").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert {line["episode_key"] for line in lines} == {f"twin/pick_carrot/{seed}" for seed in (450000, 450001)}
    assert summary["steps"] == len(lines)
    parsed = [line for line in lines if line["rows"] is not None]
    assert parsed and summary["parse_rate"] == pytest.approx(len(parsed) / len(lines), abs=1e-4)
    for line in parsed:
        assert line["rows"] == parse_actions(line["text"]).rows
        moved = np.sum(line["rows"], axis=0)[:3] - np.sum(line["logged"], axis=0)[:3]
        assert line["comparison"]["end_error_mm"] == pytest.approx(1000 * np.linalg.norm(moved), abs=0.01)
    assert sum(part["steps"] for part in summary["by_verb"].values()) == len(lines)
    (out / "predictions.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))  # stopped in the last episode
    assert predict(demos, out) == 0
    assert (out / "predictions.jsonl").read_text() == whole
    assert predict(demos, out, "--plan", "logged") == 2
    assert "other settings (plan)" in capsys.readouterr().err


def test_a_logged_plan_is_not_counted_as_said_and_held_out_episodes_are_those_of_sft(
    demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(demos, tmp_path / "out", "--plan", "logged", "--held-out", "0.5") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["episodes"] == 1 and summary["plan_parse_rate"] is None and summary["plan_axes_named"] is None
    assert predict(demos, tmp_path / "zero", "--held-out", "0") == 2
    assert "1 takes every episode" in capsys.readouterr().err


def test_where_nothing_parses_there_is_no_end_point(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The twin's model before grey pictures, of which it was shown none."""
    assert predict(chain, tmp_path / "out", "--limit", "1") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    lines = list(read_jsonl(tmp_path / "out" / "predictions.jsonl"))
    assert lines and all(line["rows"] is line["comparison"] is None for line in lines)
    assert (summary["parse_rate"], summary["end_error_mm"]) == (0.0, None)
    assert "parsed 0.0 %" in capsys.readouterr().out
