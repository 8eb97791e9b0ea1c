"""Client, real server and twin together: bytes over HTTP on one side, physics on the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from e2e_fixtures import OnEvent, ServerProcess, first_after, texts_of

from vlm2vla_client.episode import EpisodeResult
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.progress import Progress, SilentProgress
from vlm2vla_client.recorder import RecordedEpisode, read_episode
from vlm2vla_client.scenes import choose_scene
from vlm2vla_client.sim import SimRequest, run_in_twin
from vlm2vla_schema.images import decode_image

TASK = "pick up the carrot"
SEED = 500_021
LIVENESS_S, HOLD_S = 1.0, 0.25


def request(**changes: object) -> SimRequest:
    given = SimRequest(task=TASK, choice=choose_scene(TASK, None, SEED), policy="expert", verifiers=("twin",))
    return replace(given, **changes)  # type: ignore[arg-type]  # fields by name


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> RecordedEpisode:
    """The expert's own episode, in process: the source of the texts that the server recites."""
    folder = tmp_path_factory.mktemp("expert") / "episode"
    result = run_in_twin(request(), folder, SilentProgress())
    assert (result.exit_code, result.success) == (0, True), result.message
    return read_episode(folder)


@pytest.fixture
def serve(tmp_path: Path, expert: RecordedEpisode) -> Iterator[list[ServerProcess]]:
    servers: list[ServerProcess] = []
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory, expert: RecordedEpisode) -> Iterator[ServerProcess]:
    """One server for the tests that leave it alive."""
    server = ServerProcess(tmp_path_factory.mktemp("reciting"), texts_of(expert))
    yield server
    server.close()


def run(
    server: ServerProcess, folder: Path, progress: Progress | None = None, **changes: object
) -> tuple[EpisodeResult, RecordedEpisode]:
    connection = ServerConnection(server.url)
    try:
        asked = request(policy="server", connection=connection, **changes)
        result = run_in_twin(asked, folder, progress or SilentProgress())
    finally:
        connection.close()
    return result, read_episode(folder)


@pytest.mark.parametrize("execute", ["whole", "streamed"])
@pytest.mark.parametrize("verifiers", [("server",), ("twin",)])
def test_the_experts_words_over_http_pick_the_carrot(
    reciting: ServerProcess, tmp_path: Path, expert: RecordedEpisode, execute: str, verifiers: tuple[str, ...]
) -> None:
    result, episode = run(reciting, tmp_path / "episode", execute=execute, verifiers=verifiers)
    assert (result.exit_code, result.verified, result.success) == (0, True, True), result.message
    assert result.physics is not None and result.physics["score"] == result.physics["max_score"] == 2
    rows = [[event["row"] for event in recording.of("decision")] for recording in (expert, episode)]
    assert rows[0] == rows[1]
    assert (tmp_path / "episode" / "episode.gif").is_file()
    for event in episode.of("step"):
        assert decode_image(episode.frame_path(event["frame"]).read_bytes()).shape == (480, 640, 3)


@pytest.mark.clock
def test_a_server_killed_in_the_middle_of_an_answer_leaves_the_arm_holding(
    serve: list[ServerProcess], tmp_path: Path, expert: RecordedEpisode
) -> None:
    server = ServerProcess(tmp_path / "server", texts_of(expert), token_s=0.01)
    serve.append(server)
    result, episode = run(server, tmp_path / "episode", OnEvent("row", server.kill), execute="streamed", realtime=True)
    assert (result.exit_code, result.outcome) == (4, "server")
    assert server.killed_s is not None
    hold = first_after(episode, "hold", server.killed_s)
    assert hold["t_s"] - server.killed_s <= LIVENESS_S + HOLD_S
    assert episode.summary is not None and episode.of("end") and not episode.truncated


@pytest.mark.clock
def test_a_server_killed_before_any_row_leaves_the_arm_where_it_was(
    serve: list[ServerProcess], tmp_path: Path, expert: RecordedEpisode
) -> None:
    server = ServerProcess(tmp_path / "server", texts_of(expert), token_s=0.01)
    serve.append(server)
    result, episode = run(server, tmp_path / "episode", OnEvent("plan", server.kill))
    assert result.exit_code == 4 and result.rows_executed == 0
    assert server.killed_s is not None
    assert first_after(episode, "hold", server.killed_s)["t_s"] - server.killed_s <= HOLD_S
    assert episode.of("substep") == []


@pytest.mark.clock
def test_a_server_killed_in_the_middle_of_a_chunk_stops_the_arm_in_time(
    serve: list[ServerProcess], tmp_path: Path, expert: RecordedEpisode
) -> None:
    server = ServerProcess(tmp_path / "server", texts_of(expert))
    serve.append(server)
    result, episode = run(server, tmp_path / "episode", OnEvent("decision", server.kill), realtime=True, speed=0.08)
    assert (result.exit_code, result.outcome) == (4, "server"), result.message
    assert server.killed_s is not None
    hold = first_after(episode, "hold", server.killed_s)
    # The last sign of life may be as old as one poll when the server dies.
    assert 0.3 <= hold["t_s"] - server.killed_s <= LIVENESS_S + HOLD_S
    after = [event for event in episode.of("substep") if event["t_s"] > hold["t_s"]]
    assert after == [] and episode.of("substep") != []
    assert episode.summary is not None and episode.summary["exit_code"] == 4
    planned = np.array([row[:3] for row in episode.of("answer")[0]["rows"]]).sum(axis=0)
    start, end = (np.array(episode.of(kind)[0]["position_m"]) for kind in ("step", "chunk"))
    assert np.linalg.norm(end - start) < np.linalg.norm(planned) - 0.01


@pytest.mark.clock
def test_a_server_that_freezes_between_two_rows_stops_the_arm_in_time(
    serve: list[ServerProcess], tmp_path: Path, expert: RecordedEpisode
) -> None:
    """The connection stays open and silent: only the missing sign of life tells."""
    server = ServerProcess(tmp_path / "server", texts_of(expert), token_s=0.01)
    serve.append(server)
    freezing = OnEvent("row", server.freeze)
    result, episode = run(server, tmp_path / "episode", freezing, execute="streamed", realtime=True)
    assert (result.exit_code, result.outcome) == (4, "server"), result.message
    assert server.killed_s is not None
    hold = first_after(episode, "hold", server.killed_s)
    # Its last sign of life comes with the first poll of the chunk, which begins a moment after the row.
    assert hold["t_s"] - server.killed_s <= LIVENESS_S + 2 * HOLD_S


def test_a_server_that_never_parses_costs_cycles_and_ends_in_exit_3(
    serve: list[ServerProcess], tmp_path: Path, expert: RecordedEpisode
) -> None:
    texts = {**texts_of(expert), "actions": {"": "[[0.01, nonsense"}}
    serve.append(ServerProcess(tmp_path / "server", texts))
    result, episode = run(serve[0], tmp_path / "episode", max_cycles=2)
    assert (result.exit_code, result.cycles, result.rows_executed) == (3, 2, 0)
    errors = [event for event in episode.of("error") if event["where"] == "cycle"]
    assert [event["code"] for event in errors] == ["unparseable_output"] * 2
    assert "[[0.01, no" in str(errors[0]["details"])


def test_rows_over_the_limits_are_clipped_and_the_chunk_ends(
    serve: list[ServerProcess], tmp_path: Path, expert: RecordedEpisode
) -> None:
    texts = {**texts_of(expert), "actions": {"": "[[0.0, 0.08, 0.0, 1.0], [0.01, 0.0, 0.0, 1.0]]"}}
    serve.append(ServerProcess(tmp_path / "server", texts))
    result, episode = run(serve[0], tmp_path / "episode", max_cycles=1)
    assert result.exit_code == 3 and result.rows_changed == 1 and result.rows_executed == 1
    decision = episode.of("decision")[0]
    assert decision["verdict"] == "clip" and decision["allowed"][1] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["none", "server"])
def test_verifiers_by_name(
    serve: list[ServerProcess], tmp_path: Path, expert: RecordedEpisode, name: str
) -> None:
    texts = {**texts_of(expert), "verdict": '{"success": false, "confidence": "Low", "reasoning": "No."}'}
    serve.append(ServerProcess(tmp_path / "server", texts))
    result, _ = run(serve[0], tmp_path / "episode", verifiers=(name,), max_cycles=3)
    assert (result.exit_code, result.verified) == ((0, False) if name == "none" else (3, False))
    assert result.success is (name == "none")
