"""Real robot data from shards to a training run: the chain of scripts/language-data, and what sft makes of it."""

import json
from pathlib import Path

import pytest

from vlm2vla_schema.parsing import parse_actions
from vlm2vla_training.cli import main
from vlm2vla_training.curation.dataset import read_examples

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "tests" / "data" / "bridge_sample"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bridge")
    episodes, annotated = ["--episodes", str(out / "episodes")], ["--annotated", str(out / "annotated")]
    assert main(["ingest", "--format", "rlds", "--input", str(SAMPLE), "--out", str(out / "episodes")]) == 0
    assert main(["annotate", *episodes, "--out", str(out / "annotated")]) == 0
    assert main(["audit", *episodes, *annotated, "--out", str(out / "audit")]) == 0
    assert main(["curate", *episodes, *annotated, "--out", str(out / "examples"), "--image-size", "112"]) == 0
    return out


def test_every_episode_is_annotated_and_passes_the_audit(chain: Path) -> None:
    summary = json.loads((chain / "annotated" / "summary.json").read_text())
    assert summary["episodes"] == summary["audit"]["covered"] == summary["audit"]["actions_match"] == 25
    assert summary["audit"]["quarantined"] == 0
    assert {"Move to Carrot", "Grasp Carrot", "Move to Cup", "Move to Pot", "Move to Lever"} <= set(summary["steps"])


def test_every_kind_of_example_is_there_and_actions_parse(chain: Path) -> None:
    table = read_examples(chain / "examples", ["kind", "completion", "episode_key"]).to_pylist()
    assert {row["kind"] for row in table} == {
        "subtasks", "motion_plan", "actions", "completion", "verify", "direction",
    }  # fmt: skip
    assert len({row["episode_key"] for row in table}) == 25
    for row in table:
        if row["kind"] == "actions":
            assert parse_actions(row["completion"]).rows


def test_the_card_names_the_source_and_its_licence(chain: Path) -> None:
    card = (chain / "examples" / "README.md").read_text()
    assert "BridgeData V2" in card and "CC BY 4.0" in card and "bridge (25 episodes)" in card


@pytest.mark.timeout(600)
def test_the_examples_train_the_twins_base(chain: Path, tmp_path: Path) -> None:
    arguments = ["sft", "--base", str(ROOT / "models" / "twin" / "base"), "--examples", str(chain / "examples")]
    arguments += ["--out", str(tmp_path / "run"), "--max-steps", "5", "--batch-size", "2", "--warmup-steps", "1"]
    assert main([*arguments, "--threads", "1"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 5 and summary["kinds"].keys() >= {"subtasks", "motion_plan", "actions"}
