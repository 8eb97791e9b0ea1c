"""The page of an episode: complete, self-contained, and harmless whatever the model said."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from client_fakes import make_frame
from PIL import Image

from vlm2vla_client.animation import MAX_PICTURES, Animation
from vlm2vla_client.errors import RecordingError
from vlm2vla_client.recorder import Recorder
from vlm2vla_client.view import write_view
from vlm2vla_schema.types import Frame

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>&"\''


class Tags(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def record(folder: Path, words: str, finish: bool = True) -> None:
    with Recorder(folder) as recorder:
        objects = [{"name": words, "position_m": [0.3, 0.1, 0.0]}]
        config = {"scenario": words, "verifier": "server", "seed": 3, "objects": objects}
        recorder.event("episode", task=words, config=config, policy={"name": words})
        recorder.event("subtasks", subtasks=[words, "Lift"])
        frame, after = recorder.frame(make_frame(1)), recorder.frame(make_frame(2))
        place = {"cycle": 1, "subtask_index": 0}
        recorder.event("request", **place, subtask=words, frame=frame)
        recorder.event("plan", **place, motion_plan=words)
        words_of = {"from": words, "to": words}
        recorder.event("correction", **place, subtask=words_of, motion_plan=words_of, rows=[])
        recorder.event("row", **place, index=0, row=[0.01, 0.0, -0.02, 1.0])
        recorder.event("answer", **place, answer={"raw_text": words})
        recorder.event("decision", **place, index=0, verdict="clip", reasons=["axis_over_limit"])
        for step in range(4):
            recorder.event("substep", **place, position_m=[0.3 + 0.01 * step, 0.02 * step, 0.15])
        recorder.event("hold", **place, reason=words)
        recorder.event("error", **place, where="cycle", message=words)
        recorder.event("verdict", **place, success=True, confidence="High", reasoning=words, after=after)
        if finish:
            physics = {"score": 2, "max_score": 2, "success": True}
            recorder.summary({"exit_code": 0, "outcome": "verified", "subtasks_done": 1, "physics": physics})


def test_the_page_shows_words_rows_decisions_verdicts_and_the_path(tmp_path: Path) -> None:
    record(tmp_path / "e", "pick up the carrot")
    page = write_view(tmp_path / "e").read_text()
    for expected in (
        "pick up the carrot",
        "axis_over_limit",
        "verified",
        "success, 2 of 2",
        "<polyline",
        "-0.02",
        "the operator, instead: pick up the carrot",
    ):
        assert expected in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert "prefers-color-scheme:dark" in page


def test_nothing_that_came_from_outside_becomes_markup(tmp_path: Path) -> None:
    record(tmp_path / "e", EVIL)
    page = write_view(tmp_path / "e").read_text()
    parsed = Tags()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    sources = [value or "" for name, value in parsed.attributes if name in ("src", "href")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert any(EVIL in text for text in parsed.texts)
    assert "default-src 'none'" in page


def test_an_episode_that_was_cut_off_has_a_page_too(tmp_path: Path) -> None:
    record(tmp_path / "e", "task", finish=False)
    (tmp_path / "e" / "frames" / "000001.jpg").unlink()
    page = write_view(tmp_path / "e", tmp_path / "page.html").read_text()
    assert "the run was cut off" in page and "picture is missing" in page
    (tmp_path / "e" / "events.jsonl").write_bytes(b"")
    write_view(tmp_path / "e")
    with pytest.raises(RecordingError):
        write_view(tmp_path)


def test_the_animation_stays_small_and_keeps_the_whole_episode(tmp_path: Path) -> None:
    animation = Animation()
    assert animation.save(tmp_path / "none.gif") is None
    for number in range(2 * MAX_PICTURES + 10):
        image = np.full((48, 64, 3), number % 250, dtype=np.uint8)
        animation.add(Frame(image, 0.0, str(number)), f"{number} 拿起胡萝卜")
    assert len(animation) <= MAX_PICTURES + 1
    path = animation.save(tmp_path / "episode.gif")
    assert path is not None
    with Image.open(path) as picture:
        assert picture.format == "GIF" and picture.size == (480, 390)
        assert getattr(picture, "n_frames", 1) > 10
