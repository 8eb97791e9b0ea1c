"""The paper's -AT and -NR variants (section 4.2), each with its own small adapter beside the main one on one server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_fixtures import TwinServer
from variant_checks import ADAPTERS, the_task_is_the_only_subtask, tokens_are_spoken_and_rows_arrive


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwinServer]:
    running = TwinServer(tmp_path_factory.mktemp("server"), **ADAPTERS)
    yield running
    running.close()


def test_action_tokens_are_spoken_and_rows_arrive(server: TwinServer, tmp_path: Path) -> None:
    tokens_are_spoken_and_rows_arrive(server.url, tmp_path / "episode")


def test_without_reasoning_the_task_is_the_only_subtask(server: TwinServer, tmp_path: Path) -> None:
    the_task_is_the_only_subtask(server.url, tmp_path / "episode")
