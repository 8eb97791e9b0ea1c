"""`vlm2vla-client bench`: where a request's milliseconds are put, what is counted, what is compared."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from client_fakes import FakeServer, body_of, cycle_lines, error_response, ndjson, stage, stream_response
from PIL import Image

from vlm2vla_client.bench.floor import Device, Generation, floor_of
from vlm2vla_client.bench.plot import write_plot
from vlm2vla_client.bench.probe import PARTS, Pictures, Question, Sample, ask
from vlm2vla_client.bench.report import (
    level_figures,
    lines_of,
    percentiles,
    ratios,
    server_figures,
    summary_line,
    typical_work,
)
from vlm2vla_client.bench.run import Level, Tally, Target, measure, warm_up
from vlm2vla_client.bench.shape import read_shape
from vlm2vla_client.cli import main
from vlm2vla_client.errors import AnswerUnusableError, RequestRefusedError, ServerUnreachableError
from vlm2vla_schema.images import decode_image, from_base64, to_model_square

ROWS = [[0.01, 0.0, 0.0, 1.0], [0.0, 0.0, -0.02, 0.0]]
TIMING = {"queue": 1.0, "preprocess": 2.0, "first_token": 3.0, "generate": 10.0, "parse": 0.5, "total": 13.25}
PICTURES = Pictures(np.full((48, 64, 3), 120, np.uint8))
CYCLE = Question("cycle", "Move to Carrot", "pick up the carrot")


def usage(prompt: int, generated: int, cached: int = 0) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "cached_tokens": cached}


def cycle_answer(request: httpx.Request, **done: Any) -> httpx.Response:
    """A streamed cycle whose stages took 20 and 40 tokens."""
    fields = body_of(request)
    lines = cycle_lines(fields, ROWS)
    plan, rows = stage(fields, usage=usage(350, 20)), stage(fields, usage=usage(400, 40, 260))
    lines[-1] |= {"timing_ms": TIMING, "stages": {"motion_plan": plan, "actions": rows}, **done}
    return stream_response([ndjson(lines)])


def silent(robots: int, done: int, wanted: int) -> None:
    pass


def target(name: str, handler: Callable[[httpx.Request], httpx.Response]) -> tuple[Target, FakeServer]:
    server = FakeServer(cycle=handler)
    return Target(name, server.connection, CYCLE), server


def sample(wall_ms: float, **changes: Any) -> Sample:
    parts = {**dict.fromkeys(PARTS, 0.0), "decode": wall_ms - 1.0, "encode": 1.0}
    given: dict[str, Any] = {"first_row_ms": wall_ms / 2, "attempts": 1, "work": (Generation(300, 11),), **changes}
    return Sample(wall_ms, given.pop("parts", parts), **given)


def test_the_parts_of_a_request_add_up_to_its_wall_time() -> None:
    def slowly(request: httpx.Request) -> httpx.Response:
        time.sleep(0.03)
        return cycle_answer(request)

    _, server = target("one", slowly)
    found = ask(server.connection(), CYCLE, PICTURES.take(0), 7, "episode")
    assert sum(found.parts.values()) == pytest.approx(found.wall_ms)
    assert tuple(found.parts) == PARTS
    timed = {name: found.parts[name] for name in ("queue", "preprocess", "prefill", "decode", "parse", "rest")}
    assert timed == {"queue": 1.0, "preprocess": 2.0, "prefill": 3.0, "decode": 6.5, "parse": 0.5, "rest": 0.25}
    assert found.parts["encode"] > 0.0 and found.parts["network"] > 15.0
    assert found.first_row_ms is not None and 30.0 <= found.first_row_ms <= found.wall_ms
    assert found.work == (Generation(350, 20), Generation(400, 40, 260))
    assert found.ms_per_token == pytest.approx(6.5 / 58)
    body = body_of(server.requests[0])
    assert (body["seed"], body["episode_id"], body["subtask"]) == (7, "episode", "Move to Carrot")


@pytest.mark.parametrize(
    ("endpoint", "fields", "pictures"),
    [
        ("actions", {"image", "subtask", "motion_plan"}, 1),
        ("motion_plan", {"image", "subtask"}, 1),
        ("subtasks", {"image", "task"}, 1),
        ("verify", {"before", "after", "subtask", "next_subtask"}, 2),
        ("vqa", {"image", "question"}, 1),
    ],
)
def test_every_endpoint_gets_its_own_fields(endpoint: str, fields: set[str], pictures: int) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = stage(body_of(request), attempts=2, usage=usage(600, 30), actions=ROWS)
        if endpoint == "actions":
            rows = [{"event": "row", "index": index, "row": row} for index, row in enumerate(ROWS)]
            return stream_response([ndjson([*rows, {"event": "done", **body}])])
        return httpx.Response(200, json=body)

    server = FakeServer(**{endpoint: answer})
    question = Question(endpoint, "Move", "pick", model="twin", plans=False)
    found = ask(server.connection(), question, PICTURES.take(0), 0, "episode")
    common = {"seed", "episode_id", "frame_id", "deadline_ms", "model"}
    body = body_of(server.requests[0])
    assert set(body) == fields | common
    assert body.get("motion_plan") is None, "a model without that stage takes null"
    # Two attempts of 300 tokens in and 15 out: the floor is that of one.
    assert found.work == (Generation(300, 15, 0, pictures),) and found.attempts == 2
    assert (found.first_row_ms is None) == (endpoint != "actions")


def test_an_older_server_says_nothing_of_parsing_and_that_counts_as_decoding() -> None:
    timing = {name: value for name, value in TIMING.items() if name != "parse"}
    _, server = target("one", lambda request: cycle_answer(request, timing_ms=timing))
    found = ask(server.connection(), CYCLE, PICTURES.take(0), 0, "episode")
    assert (found.parts["parse"], found.parts["decode"]) == (0.0, 7.0)


def test_every_request_shows_another_picture_also_in_the_models_small_square() -> None:
    seen: list[bytes] = []

    def keep(request: httpx.Request) -> httpx.Response:
        square = to_model_square(decode_image(from_base64(body_of(request)["image"])), 112)
        seen.append(square.tobytes())
        return cycle_answer(request)

    one, _ = target("one", keep)
    pictures = Pictures(np.full((480, 640, 3), 120, np.uint8))
    measure([one], pictures, 1, 12, 5, silent)
    assert len(set(seen)) == 12


def test_robots_have_their_own_episodes_and_ask_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=20)

    def together(request: httpx.Request) -> httpx.Response:
        meeting.wait()  # passes only when three requests are here at once
        return cycle_answer(request)

    one, server = target("one", together)
    level = measure([one], PICTURES, 3, 4, 100, silent)
    bodies = [body_of(request) for request in server.requests]
    episodes = {body["episode_id"] for body in bodies}
    assert len(episodes) == 3 and len(level.tallies["one"].samples) == 12
    assert sorted(body["seed"] for body in bodies) == list(range(100, 112))


def test_two_servers_are_asked_by_turns_with_the_same_requests() -> None:
    order: list[tuple[str, int, str]] = []

    def noting(name: str, wait_s: float) -> Callable[[httpx.Request], httpx.Response]:
        def handler(request: httpx.Request) -> httpx.Response:
            body = body_of(request)
            order.append((name, body["seed"], body["image"]))
            time.sleep(wait_s)
            return cycle_answer(request)

        return handler

    first, second = target("first", noting("first", 0.005))[0], target("second", noting("second", 0.03))[0]
    level = measure([first, second], PICTURES, 1, 4, 0, silent)
    assert [seed for _, seed, _ in order] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [name for name, _, _ in order] == ["first", "second", "second", "first"] * 2
    assert all(a[2] == b[2] for a, b in zip(order[::2], order[1::2], strict=True))
    assert len(level.pairs) == 4
    figures = level_figures(level, None)
    assert figures["ratio"]["wall"] > 1.2 and figures["ratio"]["pairs"] == 4


def test_ratios_are_of_pairs() -> None:
    pairs = [(sample(100.0), sample(50.0)), (sample(200.0), sample(100.0)), (sample(10.0), sample(30.0))]
    found = ratios(pairs)
    assert (found["wall"], found["first_row"], found["pairs"]) == (0.5, 0.5, 3)
    assert found["parts"]["encode"] == 1.0 and found["parts"]["queue"] is None
    assert ratios([])["wall"] is None


def test_what_a_loaded_server_answers_is_counted_and_anything_else_ends_the_bench() -> None:
    answers = iter(["overloaded", None, "unparseable_output", None])

    def now_and_then(request: httpx.Request) -> httpx.Response:
        code = next(answers)
        return cycle_answer(request) if code is None else error_response(code, headers={"retry-after": "0.01"})

    one, _ = target("one", now_and_then)
    tally = measure([one], PICTURES, 1, 4, 0, silent).tallies["one"]
    assert len(tally.samples) == 2
    assert dict(tally.errors) == {"overloaded": 1, "unparseable_output": 1}
    refusing, server = target("refusing", lambda request: error_response("unknown_model"))
    with pytest.raises(RequestRefusedError):
        measure([refusing], PICTURES, 2, 50, 0, silent)
    assert len(server.requests) <= 4, "the other robots stop too"


def test_warming_up_raises_what_is_counted_later() -> None:
    one, _ = target("one", lambda request: error_response("unparseable_output"))
    with pytest.raises(AnswerUnusableError):
        warm_up([one], PICTURES)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([{"event": "plan", "motion_plan": "left"}], ServerUnreachableError),
        ([{"event": "error", "error": {"code": "unparseable_output", "message": "no"}}], AnswerUnusableError),
    ],
)
def test_a_stream_without_its_answer_is_no_sample(lines: list[dict[str, Any]], error: type[Exception]) -> None:
    _, server = target("one", lambda request: stream_response([ndjson(lines)]))
    with pytest.raises(error):
        ask(server.connection(), CYCLE, PICTURES.take(0), 0, "episode")


def test_figures_of_known_samples() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"p50": 3.0, "p95": 4.8, "p99": 4.96}
    assert percentiles([]) is None
    tally = Tally([sample(100.0), sample(300.0, attempts=2), sample(200.0)])
    figures = server_figures(tally, 1, 2.0)
    assert (figures["answers"], figures["retried"], figures["answers_per_s"]) == (3, 1, 1.5)
    assert figures["wall_ms"]["p50"] == 200.0 and figures["first_row_ms"]["p50"] == 100.0
    assert figures["parts_ms"]["decode"]["p50"] == 199.0
    assert figures["ms_per_token"]["p50"] == pytest.approx(19.9)
    assert figures["tokens_p50"] == {"prompt": 300, "generated": 11, "cached": 0}


def test_the_floor_stands_beside_the_median_for_the_tokens_that_were_generated() -> None:
    gemma, machine = read_shape("gemma-3-12b"), Device("round", 1000.0, 1000.0)
    work = (Generation(350, 20), Generation(400, 40, cached=260))
    found = typical_work([sample(4000.0, work=work)] * 3, gemma)
    # 260 cached tokens hold the picture's 256; 250 would not.
    assert found == (Generation(350, 20), Generation(400, 40, 260, pictures=0))
    assert typical_work([sample(1.0, work=(Generation(350, 20, 250),))], gemma)[0].pictures == 1
    level = Level(1, 4.0, {"first": Tally([sample(4000.0, work=work)] * 3)}, [])
    floor = level_figures(level, (gemma, machine))["servers"]["first"]["floor"]
    cycle_ms = floor_of(gemma, machine, found).cycle_ms
    assert floor["cycle_ms"] == pytest.approx(cycle_ms, abs=1e-3)
    assert floor["times_the_floor"] == pytest.approx(4000.0 / cycle_ms, abs=1e-3)
    # As far from its floor, an A100 would need this long.
    assert floor["as_on_an_a100_s"] == pytest.approx(4.0 * floor["a100_equivalents"], rel=1e-2)


def test_lines_summary_and_plot_show_what_the_report_holds(tmp_path: Path) -> None:
    shape, machine = read_shape("gemma-3-12b"), Device("round", 1000.0, 1000.0)
    levels = []
    for robots, wall_ms in ((1, 4000.0), (4, 9000.0)):
        pairs = [(sample(wall_ms), sample(wall_ms * 0.75))] * 3
        tallies = {"first": Tally([a for a, _ in pairs]), "second": Tally([b for _, b in pairs])}
        tallies["second"].errors["overloaded"] = 2
        levels.append(level_figures(Level(robots, 36.0, tallies, pairs), (shape, machine)))
    report = {"endpoint": "cycle", "levels": levels}
    text = "\n".join(lines_of(report))
    for words in ("4000", "9000", "2 overloaded", "wall 0.750", "floor on round", "a token"):
        assert words in text
    summary = summary_line(report)
    assert "median 4.000 s" in summary and "4 robots: 9.000 s" in summary and "6.1 s = 1.5 times this" in summary
    write_plot(tmp_path / "bench.svg", report)
    svg = (tmp_path / "bench.svg").read_text()
    assert svg.lstrip().startswith("<?xml") and "</svg>" in svg
    nothing = {"endpoint": "cycle", "levels": [level_figures(Level(1, 1.0, {"first": Tally()}, []), None)]}
    assert "no answer" in summary_line(nothing)
    assert lines_of(nothing)
    write_plot(tmp_path / "nothing.svg", nothing)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--requests", "0"], "--requests"),
        (["--floor", "gemma-3-12b"], "--device"),
        (["--floor", "missing.json", "--device", "h200"], "gemma-3-12b"),
        (["--floor", "gemma-3-12b", "--device", "h200", "--plan-tokens", "0"], "--plan-tokens"),
        (["--floor", "gemma-3-12b", "--bandwidth-gb-s", "-1", "--tflops", "1"], "above 0"),
        (["--image", "missing.jpg"], "missing.jpg"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("robots", ["0", "1,65", "two", ""])
def test_numbers_of_robots_are_checked(robots: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--robots", robots])
    assert caught.value.code == 2


def test_nobody_there_is_the_servers_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    Image.new("RGB", (64, 48)).save(tmp_path / "frame.png")
    code = main(["bench", "--server", "http://127.0.0.1:9", "--image", str(tmp_path / "frame.png")])
    assert code == 4 and "cannot connect" in capsys.readouterr().err


def test_the_floor_alone_needs_no_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "--floor", "gemma-3-12b", "--device", "h200", "--robots", "1,8"]
    assert main([*asked, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "12.19 billion" in text and "6.1 s on an A100" in text and "8 robots" in text
    written = json.loads((tmp_path / "floor.json").read_text())
    assert main([*asked, "--json", "--weight-bits", "8"]) == 0
    fp8 = json.loads(capsys.readouterr().out)
    alone, half = written["floors"][0], fp8["floors"][0]
    assert alone["ms_per_token"] == pytest.approx(23.532 / 4.8, rel=0.02)
    assert half["decode_ms"] == pytest.approx(alone["decode_ms"] / 2, rel=0.03)
    assert written["floors"][1]["cycle_ms"] > alone["cycle_ms"]
