"""Raw Bridge folders, and the reader of their serialised files, which carries out nothing."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import flat_image

from vlm2vla_training.cli import main
from vlm2vla_training.episodes.bridge_raw import BridgeRawSource
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.episodes.plain_data import plain, read_plain
from vlm2vla_training.errors import DataError

# Data for tests is written by Python's own serialiser, in a process of its own.
WRITER = """
import collections, importlib, sys
import numpy as np
value = {expression}
with open(sys.argv[1], "wb") as file:
    importlib.import_module("pickle").dump(value, file, protocol=int(sys.argv[2]))
"""


def serialised(path: Path, expression: str, protocol: int = 4) -> Path:
    code = WRITER.replace("{expression}", expression)
    subprocess.run([sys.executable, "-c", code, str(path), str(protocol)], check=True, timeout=120)
    return path


VALUES = (
    "{'a': [1, 2.5, None, True, 'text', b'bytes', (1, 2), -7, 2**70], 'n': np.arange(6.0).reshape(2, 3), "
    "'f': np.asfortranarray(np.arange(6).reshape(2, 3)), 's': np.float32(2.5), 'o': collections.OrderedDict(k=1), "
    "'t': np.array(['x', 'yz']), 'twice': [x := np.ones(2), x], 'empty': [{}, [], ()]}"
)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    read = read_plain(serialised(tmp_path / "a.pkl", VALUES, protocol))
    assert read["a"] == [1, 2.5, None, True, "text", b"bytes", (1, 2), -7, 2**70]
    assert np.array_equal(read["n"], np.arange(6.0).reshape(2, 3)) and read["n"].dtype == np.float64
    assert np.array_equal(read["f"], np.arange(6).reshape(2, 3)) and read["s"] == 2.5 and read["o"] == {"k": 1}
    assert read["t"].tolist() == ["x", "yz"] and read["twice"][1].tolist() == [1.0, 1.0]
    assert read["empty"] == [{}, [], ()]


MALICIOUS = {
    "a command": b"cos\nsystem\n(S'touch PWNED'\ntR.",
    "a command, newer form": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch PWNED\x85R.",
    "built-in execution": b"c__builtin__\nexec\n(S'open(\"PWNED\",\"w\")'\ntR.",
    "a loader inside numpy": b"cnumpy\nload\n(S'x'\ntR.",
    "another class": b"\x80\x04\x8c\x07pathlib\x8c\x04Path\x93)\x81.",
    "an instance": b"(icollections\nCounter\n.",
    "a registered extension": b"\x82\x01.",
    "an outside object": b"Pname\n.",
    "a length for bytes": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f8'\nI0\nI1\ntRI999999999999999\ntR.",
}


@pytest.mark.parametrize("name", sorted(MALICIOUS))
def test_whatever_is_not_data_is_refused_and_never_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "policy_out.pkl"
    path.write_bytes(MALICIOUS[name])
    with pytest.raises(DataError, match=r"policy_out\.pkl"):
        read_plain(path)
    assert not (tmp_path / "PWNED").exists()


def test_a_reference_bomb_stays_small() -> None:
    doublings = (b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40))
    assert len(plain(b"]q\x00" + b"".join(doublings) + b".")) == 2


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(DataError, match="nested"):
        plain(b"]" * 200 + b"a" * 199 + b".")


@given(st.binary(max_size=80))
def test_any_bytes_give_data_or_a_data_error(data: bytes) -> None:
    with contextlib.suppress(DataError):
        plain(data)


ACTIONS = "[{'actions': np.array([0.01, 0.0, -0.01 * t, 0, 0, 0, 1.0]), 'policy_type': 'x'} for t in range(4)]"
STATES = "{'full_state': np.array([[0.3 + 0.01 * t, 0, 0.1, 0, 0, 0, 1.0] for t in range(5)]), 'env_done': [False]}"


def trajectory(root: Path, date: str, words: str | None = "put the pot in the sink\nconfidence: 1\n") -> Path:
    folder = root / "toykitchen2" / "set_table" / "00" / date / "raw" / "traj_group0" / "traj0"
    (folder / "images0").mkdir(parents=True)
    serialised(folder / "policy_out.pkl", ACTIONS)
    serialised(folder / "obs_dict.pkl", STATES)
    for number in range(5):
        (folder / "images0" / f"im_{number}.jpg").write_bytes(flat_image(50 + number))
    if words is not None:
        (folder / "lang.txt").write_text(words)
    return folder


def test_a_folder_becomes_an_episode(tmp_path: Path) -> None:
    folder = trajectory(tmp_path, "2022-01-01_00-00-00")
    source = BridgeRawSource(tmp_path, IntakeOptions())
    (episode,) = source.episodes()
    assert episode.key == "bridge/toykitchen2/set_table/00/2022-01-01_00-00-00/raw/traj_group0/traj0"
    assert episode.instruction == "put the pot in the sink" and len(episode) == 4 and episode.first_step == 0
    assert episode.actions[2].tolist() == [0.01, 0.0, -0.02, 0, 0, 0, 1.0]
    assert episode.states[3, 0] == pytest.approx(0.33)
    assert episode.images[3] == (folder / "images0" / "im_3.jpg").read_bytes()
    assert source.report.to_json()["traps"] == {}


def test_frames_before_july_2021_came_one_step_late(tmp_path: Path) -> None:
    folder = trajectory(tmp_path, "2021-07-22_23-59-59")
    source = BridgeRawSource(tmp_path, IntakeOptions())
    (episode,) = source.episodes()
    assert len(episode) == 3 and episode.first_step == 1 and source.report.traps["late_frames_shifted"] == 1
    assert episode.images[0] == (folder / "images0" / "im_1.jpg").read_bytes()
    assert episode.actions[2, 2] == -0.02 and episode.states[0, 0] == pytest.approx(0.31)


def test_several_lines_and_the_confidence_line(tmp_path: Path) -> None:
    trajectory(tmp_path, "2022-01-01_00-00-00", "\nput the pot in the sink\nplace pot in sink\nconfidence: 0.8\n")
    trajectory(tmp_path, "2022-01-02_00-00-00", "confidence: 1\n")
    trajectory(tmp_path, "2022-01-03_00-00-00", None)
    source = BridgeRawSource(tmp_path, IntakeOptions())
    assert [episode.instruction for episode in source.episodes()] == ["put the pot in the sink"]
    report = source.report.to_json()
    assert report["traps"] == {"several_instructions": 1} and report["left_out"] == {"no instruction": 2}


def test_one_bad_folder_does_not_stop_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trajectory(tmp_path / "in", "2022-01-01_00-00-00")
    bad = trajectory(tmp_path / "in", "2022-01-02_00-00-00")
    (bad / "obs_dict.pkl").write_bytes(MALICIOUS["a command"])
    gap = trajectory(tmp_path / "in", "2022-01-03_00-00-00")
    (gap / "images0" / "im_2.jpg").unlink()
    arguments = ["ingest", "--format", "raw", "--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0 and len(EpisodeDataset(tmp_path / "out").keys()) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["left_out"] == {"unreadable folder": 2} and "os system" in summary["named"][0]["detail"]
    assert main(["ingest", "--format", "raw", "--input", str(tmp_path / "no"), "--out", str(tmp_path / "o2")]) == 1
    assert "policy_out" in capsys.readouterr().err
