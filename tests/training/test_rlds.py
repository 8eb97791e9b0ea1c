"""The RLDS reader: the real sample, and each trap of Bridge data as a synthetic file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rlds_files import SHARD, Value, actions_of, bridge_features, write_info, write_shard
from training_fakes import flat_image

from vlm2vla_training.cli import main
from vlm2vla_training.episodes.base import Episode, binary_gripper
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.episodes.rlds import RldsSource
from vlm2vla_training.errors import DataError

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "bridge_sample"


def read(
    folder: Path, episodes: list[dict[str, Value]], options: IntakeOptions | None = None
) -> tuple[list[Episode], dict[str, Any]]:
    write_shard(folder, episodes)
    write_info(folder, [len(episodes)])
    source = RldsSource(folder, options or IntakeOptions())
    return list(source.episodes()), source.report.to_json()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_floats(values: NDArray[np.float64]) -> bytes:
    return values.astype("<f4").tobytes()


def test_the_sample_reads_as_tensorflow_reads_it() -> None:
    expected = json.loads((SAMPLE / "expected.json").read_text())
    source = RldsSource(SAMPLE, IntakeOptions())
    assert source.count() == 25
    episodes = list(source.episodes())
    assert [episode.instruction for episode in episodes] == [one["instruction"] for one in expected]
    for episode, one in zip(episodes, expected, strict=True):
        assert (episode.facts["file_path"], episode.facts["episode_id"]) == (one["file_path"], one["episode_id"])
        assert digest(b"".join(episode.images)) == one["image_0"] and len(episode) == one["steps"]
        assert digest(as_floats(episode.states)) == one["state"]
        # The gripper becomes binary; the six motions are as logged.
        assert digest(as_floats(episode.actions[:, :6])) == one["motion"]
        assert episode.actions[:, 6].tolist() == binary_gripper(np.array(one["gripper"])).tolist()
    assert len({episode.key for episode in episodes}) == 25
    report = source.report.to_json()
    assert (report["records"], report["left_out_total"], report["damage"]) == (25, 0, [])
    assert report["traps"] == {"camera_flags_all_false": 25, "gripper_between": 6}
    assert 1.0 < report["commanded_reached_gap_mm"] < 10.0


def test_a_command_ingests_the_sample_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ingest", "--format", "rlds", "--input", str(SAMPLE), "--out", str(tmp_path)]
    assert main([*arguments, "--dry-run"]) == 0 and not list(tmp_path.iterdir())
    assert main(arguments) == 0
    assert len(EpisodeDataset(tmp_path).keys()) == 25
    assert main(arguments) == 0
    assert "0 new episodes, 25 kept" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["records"] == 25 and summary["traps"]["gripper_between"] == 6
    assert main([*arguments, "--actions", "reached"]) == 2
    assert "other options" in capsys.readouterr().err


def test_episode_ids_repeat_in_every_file(tmp_path: Path) -> None:
    paths = ["/x/numpy_256/a/out.npy", "/x/numpy_256/b/out.npy"]
    episodes, report = read(tmp_path, [bridge_features(path=path, number=3) for path in paths])
    assert [episode.key for episode in episodes] == ["bridge/a/out.npy#3", "bridge/b/out.npy#3"]
    assert report["left_out"] == {}


def test_a_key_met_twice_is_left_out_and_named(tmp_path: Path) -> None:
    episodes, report = read(tmp_path, [bridge_features(), bridge_features()])
    assert len(episodes) == 1 and report["left_out"] == {"key met twice": 1}
    assert report["named"][0]["episode_key"] == "bridge/a/out.npy#0" and "record 1" in report["named"][0]["detail"]


def test_a_missing_camera_is_left_out(tmp_path: Path) -> None:
    absent = bridge_features() | {"episode_metadata/has_image_0": [0], "episode_metadata/has_image_1": [1]}
    episodes, report = read(tmp_path, [absent, bridge_features(number=1)])
    assert [episode.key[-1] for episode in episodes] == ["1"] and report["left_out"] == {"no camera image_0": 1}


def test_flags_that_are_all_false_say_nothing_and_the_frame_decides(tmp_path: Path) -> None:
    unsure = bridge_features() | {"episode_metadata/has_image_0": [0]}
    black = bridge_features(number=1) | {"episode_metadata/has_image_0": [0]}
    black["steps/observation/image_0"] = [flat_image(0)] * 4
    episodes, report = read(tmp_path, [unsure, black])
    assert [episode.key[-1] for episode in episodes] == ["0"]
    assert report["traps"]["camera_flags_all_false"] == 2 and report["left_out"] == {"no camera image_0": 1}


def test_a_first_action_of_zeros_is_kept_and_counted(tmp_path: Path) -> None:
    features = bridge_features()
    actions_of(features)[0, :6] = 0.0
    episodes, report = read(tmp_path, [features])
    assert len(episodes[0]) == 4 and not episodes[0].actions[0, :6].any()
    assert report["traps"] == {"first_action_zero": 1} and episodes[0].facts["first_action_zero"]


def test_an_all_zero_last_row_teaches_a_phantom_close_and_is_dropped(tmp_path: Path) -> None:
    features = bridge_features(rows=5)
    actions_of(features)[4] = 0.0
    episodes, report = read(tmp_path, [features])
    assert len(episodes[0]) == len(episodes[0].images) == 4 and episodes[0].actions[:, 6].tolist() == [1.0] * 4
    assert report["traps"] == {"zero_last_row_dropped": 1}


def test_the_gripper_takes_the_value_reached_next(tmp_path: Path) -> None:
    features = bridge_features(rows=5)
    actions_of(features)[:, 6] = [1.0, 0.97, 0.5, 0.01, 0.0]
    episodes, report = read(tmp_path, [features])
    assert episodes[0].actions[:, 6].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0] and report["traps"] == {"gripper_between": 1}


@pytest.mark.parametrize("how", ["empty", "flag", "feature missing", "blank"])
def test_episodes_without_instruction_are_dropped_and_counted(tmp_path: Path, how: str) -> None:
    features = bridge_features(instruction="  " if how == "blank" else "" if how == "empty" else "put it there")
    if how == "flag":
        features["episode_metadata/has_language"] = [0]
    elif how == "feature missing":
        del features["steps/language_instruction"]
    episodes, report = read(tmp_path, [features, bridge_features(number=1)])
    assert len(episodes) == 1 and report["left_out"] == {"no instruction": 1}
    kept, _ = read(tmp_path, [features, bridge_features(number=1)], IntakeOptions(keep_unlabelled=True))
    assert [episode.instruction for episode in kept] == ["", "put carrot on plate"]


def test_commanded_and_reached_actions_differ(tmp_path: Path) -> None:
    features = bridge_features()
    states = features["steps/observation/state"]
    assert isinstance(states, np.ndarray)
    states.reshape(-1, 7)[:, 5] = [3.1, -3.1, -3.0, -2.9]
    commanded, report = read(tmp_path, [features])
    assert report["commanded_reached_gap_mm"] == pytest.approx(10.0, abs=0.01)
    reached, _ = read(tmp_path, [features], IntakeOptions(actions="reached"))
    assert reached[0].actions[:3, :3] == pytest.approx(np.tile([0.01, 0.0, 0.0], (3, 1)), abs=1e-6)
    assert reached[0].actions[0, 5] == pytest.approx(2 * np.pi - 6.2, abs=1e-5)
    assert np.array_equal(reached[0].actions[3], commanded[0].actions[3])
    assert reached[0].facts["actions"] == "reached"


def test_the_old_subset_of_oxe_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, [bridge_features()])
    write_info(tmp_path, [1], name="bridge", version="0.1.0")
    with pytest.raises(DataError, match="old subset"):
        RldsSource(tmp_path, IntakeOptions())
    write_info(tmp_path, [1])
    old = bridge_features() | {"steps/action/world_vector": np.zeros(12, np.float32)}
    _, report = read(tmp_path, [old])
    assert "old subset" in report["named"][0]["detail"]


def test_rows_that_do_not_fit_are_left_out_and_named(tmp_path: Path) -> None:
    short = bridge_features() | {"steps/observation/image_0": [flat_image()]}
    bad = bridge_features(number=1)
    actions_of(bad)[1, 0] = np.nan
    ragged = bridge_features(number=2) | {"steps/action": np.ones(13, np.float32)}
    no_picture = bridge_features(number=3) | {"steps/observation/image_0": [b"x", b"x1", b"x", b"x2"]}
    episodes, report = read(tmp_path, [short, bad, ragged, no_picture, bridge_features(number=4)])
    assert len(episodes) == 1
    assert report["left_out"] == {"lengths differ": 1, "not finite": 1, "not an image": 1, "unreadable record": 1}


def test_instructions_that_vary_are_counted_and_the_commonest_counts(tmp_path: Path) -> None:
    texts: list[bytes] = [b"put it", b"put carrot", b"put carrot", b"put carrot"]
    episodes, report = read(tmp_path, [bridge_features() | {"steps/language_instruction": texts}])
    assert episodes[0].instruction == "put carrot" and report["traps"] == {"instruction_varies": 1}


def test_a_flipped_byte_is_named_and_the_rest_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_shard(tmp_path / "in", [bridge_features(number=number) for number in range(3)])
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 1
    shard.write_bytes(data)
    write_info(tmp_path / "in", [3])
    arguments = ["ingest", "--format", "rlds", "--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert f"{SHARD} record 1 at byte {len(data) // 3}" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [one["record"] for one in summary["damage"]] == [1] and summary["episodes"] == 2


def test_records_and_shards_that_are_missing_are_noticed(tmp_path: Path) -> None:
    write_shard(tmp_path, [bridge_features()], SHARD.replace("of-00001", "of-00003"))
    write_info(tmp_path, [2, 5, 5])
    source = RldsSource(tmp_path, IntakeOptions())
    assert len(list(source.episodes())) == 1
    report = source.report.to_json()
    assert report["traps"] == {"shards_missing of bridge_dataset-train": 2}
    assert "promises 2" in report["damage"][0]["what"]


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path: Path) -> None:
    """Frames of an episode that was yielded and let go are not kept anywhere."""
    import gc
    import weakref

    for shard in range(3):
        features = bridge_features(number=shard)
        write_shard(tmp_path, [features], SHARD.replace("00000-of-00001", f"{shard:05d}-of-00003"))
    alive: list[weakref.ref[Episode]] = []
    for episode in RldsSource(tmp_path, IntakeOptions()).episodes():
        alive.append(weakref.ref(episode))
        del episode
        gc.collect()
        assert sum(one() is not None for one in alive) <= 1


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tfrecord"):
        RldsSource(tmp_path, IntakeOptions())
