from pathlib import Path

import pytest
from training_fakes import PICK, episode_of, write_recording

from vlm2vla_training.cli import main
from vlm2vla_training.episodes.parquet import EpisodeDataset, EpisodeWriter

COMMANDS = [
    "demos", "ingest", "annotate", "curate", "sft", "export", "tokens", "logprobs", "predict", "verify-report", "vqa",
    "estimate",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and command in capsys.readouterr().out


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["annotate", "--episodes", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "expected an episode dataset" in capsys.readouterr().err


def test_recordings_are_ingested_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        write_recording(tmp_path / "runs" / name, "pick up the carrot", rows=2)
    arguments = ["ingest", "--input", str(tmp_path / "runs"), "--out", str(tmp_path / "episodes")]
    assert main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "episodes").exists()
    assert main(arguments) == 0
    write_recording(tmp_path / "runs" / "three", "pick up the carrot", rows=2)
    assert main(arguments) == 0
    assert "1 new episodes, 2 kept" in capsys.readouterr().out
    assert len(EpisodeDataset(tmp_path / "episodes").keys()) == 3


def test_twin_data_passes_unchanged_without_its_truth(tmp_path: Path) -> None:
    source, out = tmp_path / "demos", tmp_path / "episodes"
    with EpisodeWriter(source) as writer:
        writer.write(episode_of(PICK, "pick up the carrot"))
    (source / "truth.jsonl").write_text("{}\n")
    assert main(["ingest", "--format", "twin", "--input", str(source), "--out", str(out)]) == 0
    assert (out / "part-00000.parquet").read_bytes() == (source / "part-00000.parquet").read_bytes()
    assert not (out / "truth.jsonl").exists()


def test_annotate_and_curate_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "episodes"
    annotate = ["annotate", "--episodes", str(folder), "--out", str(tmp_path / "annotated")]
    curate = ["curate", "--episodes", str(folder), "--annotated", str(tmp_path / "annotated")]
    curate += ["--out", str(tmp_path / "examples"), "--image-size", "28"]
    for index in range(2):
        with EpisodeWriter(folder) as writer:
            writer.write(episode_of(PICK, "pick up the carrot", f"fake/{index}"))
        assert main([*annotate, "--dry-run"]) == 0 and main(annotate) == 0
        assert main([*curate, "--dry-run"]) == 0 and main(curate) == 0
    assert "of 2 episodes" in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "examples" / "README.md").exists()
    assert len(list((tmp_path / "examples").glob("part-*.parquet"))) == 2
