"""The episode folder: what is written is read back, whatever kills the writer."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_fakes import make_frame
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vla_client import recorder as recorder_module
from vlm2vla_client.errors import RecordingError, RecordingStoppedError
from vlm2vla_client.recorder import Recorder, new_episode_folder, plain, read_episode, write_json_atomic
from vlm2vla_schema.images import decode_image


def test_events_come_back_in_order_with_monotonic_stamps(tmp_path: Path) -> None:
    with Recorder(tmp_path / "e") as recorder:
        recorder.event("episode", task="拿起胡萝卜", config={"seed": 1})
        for index in range(5):
            recorder.event("row", index=index, row=np.array([0.1, 0.0, -0.2, 1.0]))
        recorder.limits({"box": (1.0, 2.0)})
        recorder.summary({"exit_code": 0})
    episode = read_episode(tmp_path / "e")
    assert episode.task == "拿起胡萝卜"
    assert [event["seq"] for event in episode.events] == list(range(6))
    stamps = [event["t_s"] for event in episode.events]
    assert stamps == sorted(stamps)
    assert episode.of("row")[2]["row"] == [0.1, 0.0, -0.2, 1.0]
    assert episode.summary == {"exit_code": 0} and episode.limits == {"box": [1.0, 2.0]}
    assert not episode.truncated


def test_a_frame_is_stored_once_under_its_number(tmp_path: Path) -> None:
    with Recorder(tmp_path / "e") as recorder:
        assert [recorder.frame(make_frame(n)) for n in (4, 5, 4)] == [0, 1, 0]
    episode = read_episode(tmp_path / "e")
    picture = decode_image(episode.frame_path(1).read_bytes())
    assert picture.shape == (48, 64, 3)
    assert abs(int(picture[-1, 0, 0]) - int(make_frame(5).image[-1, 0, 0])) <= 3
    assert sorted(path.name for path in (tmp_path / "e" / "frames").iterdir()) == ["000000.jpg", "000001.jpg"]


def test_a_folder_is_never_reused(tmp_path: Path) -> None:
    first, second = new_episode_folder(tmp_path, "Pick up/../the carrot!"), new_episode_folder(tmp_path, "../..")
    third = new_episode_folder(tmp_path, "Pick up/../the carrot!")
    assert len({first, second, third}) == 3
    assert all(folder.parent == tmp_path for folder in (first, second, third))
    Recorder(first).close()
    with pytest.raises(RecordingError):
        Recorder(first)


def test_where_nothing_can_be_written_the_error_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="--record"):
        new_episode_folder(tmp_path / "file" / "below", "task")


CHILD = """
import sys, time
from pathlib import Path
from client_fakes import make_frame
from vlm2vla_client.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]))
recorder.event("episode", task="t")
number = 0
while True:
    recorder.event("row", index=number, row=[0.0] * 4, frame=recorder.frame(make_frame(number)), text="x" * 5000)
    number += 1
    if number == 20:
        print("running", flush=True)
"""


def test_killing_the_writer_loses_at_most_the_last_line(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "running"
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=10) == -signal.SIGKILL
    child.stdout.close()
    episode = read_episode(folder)
    rows = episode.of("row")
    assert len(rows) >= 20 and episode.summary is None
    assert [row["index"] for row in rows] == list(range(len(rows)))
    for row in rows:
        decode_image(episode.frame_path(row["frame"]).read_bytes())


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    with Recorder(tmp_path / "e") as recorder:
        recorder.event("episode", task="t")
        recorder.event("row", index=0)
    path = tmp_path / "e" / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    episode = read_episode(tmp_path / "e")
    assert episode.truncated and len(episode.events) == 1


def test_damage_before_the_last_line_is_reported(tmp_path: Path) -> None:
    with Recorder(tmp_path / "e") as recorder:
        recorder.event("episode", task="t")
        recorder.event("row", index=0)
    path = tmp_path / "e" / "events.jsonl"
    path.write_bytes(b"{broken\n" + path.read_bytes())
    with pytest.raises(RecordingError, match="line 1"):
        read_episode(tmp_path / "e")


def test_what_is_not_an_episode_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordingError):
        read_episode(tmp_path)
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "summary.json").write_text("[")
    with pytest.raises(RecordingError):
        read_episode(tmp_path)


def test_a_summary_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"a": 1})
    for _ in range(20):
        reader = threading.Thread(target=lambda: json.loads(path.read_text()))
        reader.start()
        write_json_atomic(path, {"a": list(range(1000))})
        reader.join()
    assert list(tmp_path.iterdir()) == [path]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=values)
def test_anything_can_be_recorded_as_standard_json(value: Any) -> None:
    def refuse(name: str) -> float:
        raise AssertionError(name)

    text = json.dumps(plain(value), allow_nan=False)
    json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_keep_their_name() -> None:
    assert plain({"row": [math.nan, math.inf, 0.1]}) == {"row": ["nan", "inf", 0.1]}


def test_events_after_the_end_are_ignored(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "e")
    recorder.event("episode", task="t")
    recorder.close()
    recorder.event("late")
    recorder.close()
    assert len(read_episode(tmp_path / "e").events) == 1


def test_several_threads_never_mix_their_lines(tmp_path: Path) -> None:
    with Recorder(tmp_path / "e") as recorder:

        def write(number: int) -> None:
            for _ in range(100):
                recorder.event("x", n=number, text="y" * 300)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = read_episode(tmp_path / "e").events
    assert [event["seq"] for event in events] == list(range(400))


def test_text_that_is_no_unicode_is_recorded_and_read_back(tmp_path: Path) -> None:
    with Recorder(tmp_path / "e") as recorder:
        recorder.event("answer", raw_text="lone \ud800 surrogate")
        recorder.summary({"message": "\udfff"})
    episode = read_episode(tmp_path / "e")
    assert episode.events[0]["raw_text"] == "lone \ud800 surrogate"
    assert episode.summary == {"message": "\udfff"}


def of_free(*answers: int) -> Callable[[Path], int]:
    """A disk with less and less free; the last answer stays."""
    left = list(answers)
    return lambda folder: left.pop(0) if len(left) > 1 else left[0]


def test_below_the_floor_only_the_end_of_the_episode_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "ROOM_CHECK_S", 0.0)
    recorder = Recorder(tmp_path / "e", min_free_bytes=100 << 20, free_bytes=of_free(200 << 20, 150 << 20, 99 << 20))
    recorder.event("episode", task="t")
    with pytest.raises(RecordingStoppedError, match=r"99 MiB are free .* below the 100 MiB .*min_free_disk_mb"):
        recorder.event("row", index=0)
    with pytest.raises(RecordingStoppedError):
        recorder.frame(make_frame(1))
    for kind in ("hold", "error", "end"):
        recorder.event(kind, why="the disk")
    recorder.summary({"exit_code": 3})
    recorder.close()
    episode = read_episode(tmp_path / "e")
    assert [event["event"] for event in episode.events] == ["episode", "row", "hold", "error", "end"]
    assert episode.summary == {"exit_code": 3} and not episode.truncated
    assert list((tmp_path / "e" / "frames").iterdir()) == []


def test_a_full_disk_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="give --record DIR") as caught:
        Recorder(tmp_path / "e", min_free_bytes=100, free_bytes=of_free(99))
    assert caught.value.exit_code == 2
    assert list((tmp_path / "e").iterdir()) == []
    Recorder(tmp_path / "never looks", min_free_bytes=0, free_bytes=of_free(0)).close()


FULL_DISK = """
import resource, sys
from pathlib import Path
from client_fakes import make_frame
from vlm2vla_client.errors import RecordingStoppedError
from vlm2vla_client.recorder import Recorder, read_episode
folder = Path(sys.argv[1])
recorder = Recorder(folder)
recorder.event("episode", task="t")
size = (folder / "events.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))
for attempt in (lambda: recorder.event("row", text="x" * 5000), lambda: recorder.frame(make_frame(1)),
                lambda: recorder.summary({"exit_code": 3, "text": "x" * 5000})):
    try:
        attempt()
    except RecordingStoppedError as error:
        print(error)
recorder.event("end", text="x" * 5000)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
recorder.event("hold", reason="there is room again")
recorder.close()
"""


def test_a_write_that_fails_leaves_whole_lines_and_whole_files(tmp_path: Path) -> None:
    """The kernel refuses, half a line in: what stands in the file is what a reader can read."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "e")]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("cannot be written: File too large") == 3, done
    episode = read_episode(tmp_path / "e")
    assert [event["event"] for event in episode.events] == ["episode", "hold"] and not episode.truncated
    assert [event["seq"] for event in episode.events] == [0, 1]
    assert episode.summary is None and list((tmp_path / "e" / "frames").iterdir()) == []
    assert list((tmp_path / "e").glob("*.part")) == []
