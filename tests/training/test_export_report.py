import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from training_fakes import flat_image

from vlm2vla_schema.types import ModelCard
from vlm2vla_training.cli import main
from vlm2vla_training.errors import DataError
from vlm2vla_training.export_report import REPORT_FILE
from vlm2vla_training.jsonio import read_json, read_jsonl
from vlm2vla_training.path_on_image import paths_svg, projected, read_projection, twin_projection, waypoints

TWIN = Path(__file__).parents[2] / "models" / "twin"
RUN = {
    "command": "sft", "base_path": str(TWIN / "base"), "artifact": "adapter", "full_finetune": False, "variant": "main",
    "preset": {"name": "twin", "scope": "language_model"}, "adapted_modules": 28, "examples": 10, "steps": 20,
    "kinds": {"actions": 10}, "tokens": {"max": 226}, "loss": 1.5, "held_out_loss": 1.25, "seed": 0, "max_steps": 20,
    "plan_source": "main_movements", "data_hash": "0" * 64, "sources": ["twin"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed adapter as a finished run, so that there is something to predict."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    (folder / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(TWIN / "adapter" / name, folder / "adapter" / name)
    (folder / "summary.json").write_text(json.dumps({**RUN, "base_hash": ModelCard.read(TWIN / "base").base_hash}))
    lines = [
        {"step": 10, "loss": 2.0, "mean_token_accuracy": 0.5},
        {"step": 20, "loss": 1.0},
        {"step": 20, "eval_loss": 1.25},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demos")
    drive = ["demos", "--suite", "pick_carrot", "--seed", "450000", "--episodes", "1", "--mode", "paper"]
    assert main([*drive, "--speed-m", "0.0248", "--out", str(root / "episodes")]) == 0
    assert main(["annotate", "--episodes", str(root / "episodes"), "--out", str(root / "annotated")]) == 0
    return root


def export(run: Path, out: Path, *more: str) -> int:
    return main(["export", "--run", str(run), "--out", str(out), "--no-references", *more])


def test_a_report_shows_losses_and_paths_and_loads_nothing(run: Path, demos: Path, tmp_path: Path) -> None:
    data = ["--episodes", str(demos / "episodes"), "--annotated", str(demos / "annotated")]
    assert export(run, tmp_path / "adapter", *data) == 0
    text = (tmp_path / "adapter" / REPORT_FILE).read_text()
    figures = ModelCard.read(tmp_path / "adapter").metrics["predict"]
    assert figures["parse_rate"] == 1.0 and text.count("<article>") == figures["steps"] >= 2
    assert text.count('class="predicted"') == text.count('class="logged"') == figures["steps"]
    assert text.count("data:image/svg+xml") == 1 and "http" not in text.replace("http-equiv", "")
    assert "<!--" not in text and f"end point off {figures['end_error_mm']['max']:.1f} mm" in text


def test_without_episodes_the_report_says_that_nothing_was_predicted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "adapter") == 0
    assert "Nothing was predicted" in (tmp_path / "adapter" / REPORT_FILE).read_text()
    assert "predict" not in read_json(tmp_path / "adapter" / "model_card.json")["metrics"]
    assert export(run, tmp_path / "other", "--episodes", "somewhere") == 2 and "--annotated" in capsys.readouterr().err


def test_the_twins_projection_is_the_simulators(demos: Path) -> None:
    compared = 0
    for episode in read_jsonl(demos / "episodes" / "truth.jsonl"):
        for step in episode["steps"]:
            for name, place in {**step["objects"], "gripper": step["gripper_m"]}.items():
                found = projected(np.array([place]), twin_projection())[0]
                assert found == pytest.approx(step["pixels"][name], abs=1e-4)
                compared += 1
    assert compared > 10


def test_what_lies_behind_the_camera_is_not_drawn() -> None:
    ahead = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    assert np.isnan(projected(np.array([[0.0, 0.0, -1.0]]), ahead)).all()
    rows = [[0.1, 0.0, -0.2, 1.0], [0.0, 0.0, -2.0, 0.0]]
    drawing = paths_svg(flat_image(), [0.1, 0.2, 1.0], {"logged": rows}, 1.0, ahead)
    assert 'points="32.0,48.0 80.0,60.0"' in drawing and "circle" not in drawing


def test_without_a_camera_paths_are_seen_from_above() -> None:
    rows = [[0.05, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    drawing = paths_svg(flat_image(), [0.3, 0.0, 0.1], {"logged": rows}, 1.0, None)
    assert "from above" in drawing and 'class="logged closing"' in drawing
    assert waypoints([0.3, 0.0, 0.1], rows)[-1] == pytest.approx([0.35, 0.0, 0.1])


@pytest.mark.parametrize("text", ["{}", "[1]", '{"matrix": [[1, 2], [3, 4]]}', '{"matrix": "x"}'])
def test_a_camera_file_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "camera.json").write_text(text)
    with pytest.raises(DataError, match="3 lists of 4 numbers"):
        read_projection(tmp_path / "camera.json")
