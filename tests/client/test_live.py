"""The live view: never slower, never broken for the run; and what Rerun's own reader finds of a whole episode."""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import rerun
from arm_bench import patiently
from client_fakes import make_frame
from rerun.chunk import RrdReader
from test_physical_run import ROWS, Desk, server

from vlm2vla_client import live
from vlm2vla_client.cli import main
from vlm2vla_client.live import LiveView
from vlm2vla_client.live_rerun import RerunSink, open_live
from vlm2vla_client.recorder import Recorder, read_episode


class SlowSink:
    """Shows nothing until it is let go."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.shown: list[Any] = []
        self.closed = False

    def event(self, line: Mapping[str, Any]) -> None:
        self.began.set()
        assert self.go.wait(20.0)
        self.shown.append(line["seq"])

    def picture(self, jpeg: bytes, t_s: float) -> None:
        self.event({"seq": jpeg})

    def close(self) -> None:
        self.closed = True


def test_a_slow_viewer_loses_the_oldest_and_nobody_waits_for_it() -> None:
    sink, told = SlowSink(), list[str]()
    view = LiveView(lambda: sink, told.append, queue=10)
    view.event({"seq": 0})
    assert sink.began.wait(20.0)
    for number in range(1, 100):  # the sink stands still all this time
        view.event({"seq": number})
    view.picture(b"last", 0.0)
    assert view.dropped == 90 and sink.shown == []
    sink.go.set()
    view.close()
    assert sink.shown == [0, *range(91, 100), b"last"] and sink.closed
    assert told == ["live view: too slow, 90 events or pictures were not shown; the recording has all"]
    view.event({"seq": 100})
    view.close()
    assert len(told) == 1 and len(sink.shown) == 11


class BrokenSink(SlowSink):
    def event(self, line: Mapping[str, Any]) -> None:
        self.shown.append(line["seq"])
        raise RuntimeError("the window was closed")


def test_a_broken_viewer_is_named_once_and_then_ignored() -> None:
    sink, told, heard = BrokenSink(), list[str](), threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        heard.set()

    view = LiveView(lambda: sink, tell)
    view.event({"seq": 0})
    assert heard.wait(20.0)
    for number in range(1, 1000):
        view.event({"seq": number})
    view.close()
    assert told == ["live view: RuntimeError: the window was closed; the run goes on without it"]
    assert sink.shown == [0] and view.dropped == 0


def test_a_viewer_that_never_opens_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CLOSE_S", 0.05)
    forever, told = threading.Event(), list[str]()

    def open_sink() -> SlowSink:
        forever.wait(20.0)
        raise OSError("nobody answers")

    view = LiveView(open_sink, told.append, queue=3)
    for number in range(5):
        view.event({"seq": number})
    view.close()
    assert told == ["live view: too slow, 2 events or pictures were not shown; the recording has all"]
    forever.set()


def test_a_recording_is_whole_whatever_its_viewer_does(tmp_path: Path) -> None:
    told = list[str]()
    view = LiveView(BrokenSink, told.append)
    with Recorder(tmp_path / "episode", live=view) as recorder:
        for number in range(50):
            recorder.event("row", index=number)
            recorder.frame(make_frame(number))
    view.close()
    assert len(read_episode(tmp_path / "episode").events) == 50 and len(told) == 1


def shown(file: Path) -> dict[str, list[dict[str, Any]]]:
    """By entity, every logged row in its order: component or timeline to value."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for chunk in RrdReader(file).stream():
        found[chunk.entity_path] += chunk.to_record_batch().to_pylist()
    return {entity: sorted(rows, key=lambda row: row["rerun.controls.RowId"]) for entity, rows in found.items()}


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["TextLog:text"][0] for row in rows]


def test_rerun_is_shown_the_whole_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "shown" / "episode.rrd"
    arguments = ["run", "--sim", "--policy", "expert", "--verifier", "twin", "--seed", "500021", "--json", "--shadow"]
    code = main([*arguments, "--task", "pick up the carrot", "--record", str(tmp_path), "--rerun", str(file)])
    captured = capsys.readouterr()
    assert code == 0 and "live view" not in captured.err
    folder = Path(json.loads(captured.out)["folder"])
    episode, view = read_episode(folder), shown(file)

    pictures = [bytes(row["EncodedImage:blob"][0]) for row in view["/camera"]]
    assert pictures == [path.read_bytes() for path in sorted((folder / "frames").iterdir())]
    decisions = episode.of("decision")
    assert [text.split(":")[1].split()[0] for text in texts(view["/safety"])] == [d["verdict"] for d in decisions]
    assert len(view["/verdict"]) == len(episode.of("verdict")) and len(view["/shadow"]) == len(episode.of("forecast"))
    words = texts(view["/words"])
    assert words[0] == "task: pick up the carrot" and [w for w in words if w.startswith("plan: ")] == [
        f"plan: {event['motion_plan']}" for event in episode.of("plan")
    ]
    moves = [event for event in episode.events if event["event"] in ("step", "substep", "chunk")]
    points = [row["Points3D:positions"][0] for row in view["/arm/end_effector"]]
    assert len(points) == len(moves)
    assert points[-1] == pytest.approx(moves[-1]["position_m"], abs=1e-6)
    cycles = {event["cycle"] for event in moves}
    assert cycles == {int(entity.rsplit("/", 1)[1]) for entity in view if entity.startswith("/arm/path/")}
    arrows = view["/arm/rows"][-1]
    last = [event["row"][:3] for event in decisions if event["cycle"] == max(cycles)]
    assert arrows["cycle"] == max(cycles)
    assert [list(vector) for vector in arrows["Arrows3D:vectors"]] == [pytest.approx(row, abs=1e-6) for row in last]
    assert len(view["/limits"]) == 1 and texts(view["/events"])[-1].startswith("end: All 3 subtasks verified")


def test_what_goes_wrong_is_shown_with_its_weight(tmp_path: Path) -> None:
    recording = rerun.RecordingStream("test")
    recording.save(tmp_path / "x.rrd")
    sink = RerunSink(rerun, recording)
    lines: list[dict[str, Any]] = [
        {"event": "limits", "box_min_m": (0.1, -0.2, 0.0), "box_max_m": (0.4, 0.2, 0.3), "counter_z_m": 0.05,
         "forbidden_boxes": [((0.1, 0.1, 0.0), (0.2, 0.2, 0.1))]},
        {"event": "request", "stage": "cycle", "cycle": 1, "subtask": "Lift", "position_m": [0.3, 0.0, 0.1]},
        {"event": "row", "index": 0, "row": [0.0, 0.0, -0.2, 1.0]},
        {"event": "decision", "index": 0, "row": [0.0, 0.0, -0.2, 1.0], "verdict": "refuse",
         "reasons": ["axis_far_over_limit"]},
        {"event": "hold", "reason": "refused: axis_far_over_limit"},
        {"event": "fault", "reason": "the server is gone"},
        {"event": "correction", "subtask": {"from": "Lift", "to": "Lift it"}, "motion_plan": {"to": None}},
        {"event": "substep", "position_m": [0.3, 0.0, 0.1]},
        {"event": "of a later version", "position_m": None},
    ]  # fmt: skip
    for number, line in enumerate(lines):
        sink.event({**line, "t_s": 100.0 + number})
    sink.close()
    view = shown(tmp_path / "x.rrd")
    assert view["/safety"][0]["TextLog:level"] == ["ERROR"]
    assert view["/safety"][0]["TextLog:text"] == ["row 0 [0.0, 0.0, -0.2, 1.0]: refuse axis_far_over_limit"]
    assert [row["TextLog:level"][0] for row in view["/events"]] == ["WARN", "ERROR"]
    assert texts(view["/words"])[-1] == "the operator, instead: Lift it"
    assert view["/arm/rows"][-1]["Arrows3D:origins"][0] == pytest.approx([0.3, 0.0, 0.1])
    assert view["/arm/rows"][0]["Arrows3D:colors"] != view["/arm/rows"][-1]["Arrows3D:colors"]
    middles = view["/limits"][0]["Boxes3D:centers"]
    assert middles[0] == pytest.approx([0.25, 0.0, 0.20]) and middles[1] == pytest.approx([0.15, 0.15, 0.10])


@patiently
def test_a_physical_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch, keys="")
    desk.commission()
    assert desk.run(server(ROWS), "--rerun", str(tmp_path / "arm.rrd")) == 0
    view = shown(tmp_path / "arm.rrd")
    assert len(view["/safety"]) == len(ROWS) and "/arm/path/1" in view


def test_where_it_is_shown_is_checked_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "--sim", "--policy", "expert", "--task", "t", "--record", str(tmp_path / "runs")]
    assert open_live(None) is None
    assert main([*run, "--rerun", "episode.mp4"]) == 2
    assert "expected nothing, FILE.rrd or rerun+http" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert main([*run, "--rerun"]) == 2
    assert "pip install 'vlm2vla-client[rerun]'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
