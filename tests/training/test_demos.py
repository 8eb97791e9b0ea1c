import json
from pathlib import Path

import numpy as np
import pytest

from vlm2vla_training.annotation.rules import RulesAnnotator
from vlm2vla_training.cli import main
from vlm2vla_training.curation.chunking import chunk_actions
from vlm2vla_training.demo_scenes import SUITES, demo_task
from vlm2vla_training.episodes.parquet import EpisodeDataset


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_scenes_are_a_function_of_the_seed_and_hold_what_is_asked_for(suite: str) -> None:
    for seed in range(30):
        task = demo_task(suite, seed, "varied")
        assert task == demo_task(suite, seed, "varied") and not task.spec.cards
        present = {item.name for item in task.spec.objects}
        for goal in task.goals:
            assert goal.object in present and (goal.target is None or goal.target in present)
        handled = [(goal.object, goal.target) for goal in task.goals]
        assert handled != [("eggplant", "pan"), ("fish", None)]


def test_only_training_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demos", "--suite", "pick_carrot", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--seed", "500000"]) == 2
    assert "not a training seed" in capsys.readouterr().err
    assert main(["demos", "--suite", "nonsense", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_demonstrations_become_annotated_steps(tmp_path: Path) -> None:
    arguments = ["demos", "--suite", "place_any", "--episodes", "1", "--out", str(tmp_path), "--seed", "20"]
    assert main(arguments) == 0
    episodes = list(EpisodeDataset(tmp_path).episodes())
    assert episodes and all(episode.source == "twin" for episode in episodes)
    truth = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert {line["episode_key"] for line in truth} == {episode.key for episode in episodes}
    for episode in episodes:
        assert set(episode.actions[:, 6]) == {0.0, 1.0}
        gap = np.diff(episode.states[:, :3], axis=0) - episode.actions[:-1, :3]
        assert np.median(np.linalg.norm(gap, axis=1)) < 0.003
        annotated = RulesAnnotator().annotate(episode)
        titles = [step.step_description for step in annotated.steps]
        assert titles[0].startswith("Move to") and titles[-1].startswith("Release")
        release = chunk_actions(annotated.steps[-1].actions)
        assert release[0][2] < 0.0 and release[1][2] > 0.0  # opened before it rises
    before = (tmp_path / "part-00000.parquet").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "part-00000.parquet").read_bytes() == before


def test_a_missed_grasp_is_done_again_and_what_was_caught_is_kept(tmp_path: Path) -> None:
    arguments = ["demos", "--suite", "pick_carrot", "--episodes", "12", "--seed", "300", "--miss", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    truth = {
        line["episode_key"]: line["steps"]
        for line in map(json.loads, (tmp_path / "truth.jsonl").read_text().splitlines())
    }
    closings = []
    for episode in EpisodeDataset(tmp_path).episodes():
        gripper = episode.actions[:, 6]
        held = [step["held"] == "carrot" for step in truth[episode.key]]
        opened = [i for i in range(1, len(gripper)) if gripper[i] > gripper[i - 1]]
        assert not any(held[i] for i in opened), "a carrot in the gripper is never let go"
        assert held[-1] and len(opened) <= 1
        closings.append(len(opened) + 1)
    assert set(closings) == {1, 2}, "some near misses catch it after all, most are corrected"
