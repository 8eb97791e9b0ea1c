"""The paper's -AT and -NR variants (section 4.2), each with its own small adapter beside the main one on one server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_fixtures import MODEL, TwinServer

from vlm2vla_client.episode import EpisodeResult
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import RecordedEpisode, read_episode
from vlm2vla_client.scenes import choose_scene
from vlm2vla_client.sim import SimRequest, run_in_twin
from vlm2vla_schema.parsing import parse_actions
from vlm2vla_schema.types import ModelCard

TASK, SEED = "pick up the carrot", 500_021


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwinServer]:
    running = TwinServer(tmp_path_factory.mktemp("server"), main="adapter", at="adapter-at", nr="adapter-nr")
    yield running
    running.close()


def episode(server: TwinServer, model: str, folder: Path) -> tuple[EpisodeResult, RecordedEpisode]:
    """Three cycles in the twin with one adapter."""
    connection = ServerConnection(server.url)
    try:
        request = SimRequest(
            TASK, choose_scene(TASK, None, SEED), verifiers=("none",), connection=connection, model=model,
            animate=False, max_cycles=3,
        )  # fmt: skip
        result = run_in_twin(request, folder, SilentProgress())
    finally:
        connection.close()
    return result, read_episode(folder)


def sent(recorded: RecordedEpisode) -> list[str]:
    return [str(event["stage"]) for event in recorded.of("request")]


def test_action_tokens_are_spoken_and_rows_arrive(server: TwinServer, tmp_path: Path) -> None:
    result, recorded = episode(server, "at", tmp_path / "episode")
    digits = ModelCard.read(MODEL / "adapter-at").digit_map
    assert digits is not None
    answers = recorded.of("answer")
    raw = [event["answer"]["stages"]["actions"]["raw_text"] for event in answers]
    assert raw and all(any(token in text for token in digits.values()) for text in raw), "tokens, not digits (Table 2)"
    assert [parse_actions(text, digit_map=digits).rows for text in raw] == [event["rows"] for event in answers]
    assert result.rows_executed > 0


def test_without_reasoning_the_task_is_the_only_subtask(server: TwinServer, tmp_path: Path) -> None:
    result, recorded = episode(server, "nr", tmp_path / "episode")
    assert "subtasks" not in sent(recorded) and recorded.of("plan") == []
    assert result.rows_executed > 0
