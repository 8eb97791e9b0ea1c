"""What an episode in the twin must show with each of the paper's variants (section 4.2), whatever engine serves it."""

from __future__ import annotations

from pathlib import Path

from e2e_fixtures import MODEL

from vlm2vla_client.episode import EpisodeResult
from vlm2vla_client.evaluation.trial import ANSWER_LIMIT_S
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import RecordedEpisode, read_episode
from vlm2vla_client.scenes import choose_scene
from vlm2vla_client.sim import SimBench, SimRequest, make_policy, make_verifier, run_parts
from vlm2vla_schema.parsing import parse_actions
from vlm2vla_schema.types import ModelCard

TASK, SEED = "pick up the carrot", 500_021
ADAPTERS = {"main": "adapter", "at": "adapter-at", "nr": "adapter-nr"}
"""On one server, by the names that requests use."""


def episode(url: str, model: str, folder: Path) -> tuple[EpisodeResult, RecordedEpisode]:
    """Three cycles in the twin with one adapter of the server, on simulated time: beside other tests an answer may take
    longer than a robot would wait."""
    connection = ServerConnection(url)
    request = SimRequest(
        TASK, choose_scene(TASK, None, SEED), verifiers=("none",), connection=connection, model=model, animate=False,
        max_cycles=3, limits={"max_answer_age_s": ANSWER_LIMIT_S},
    )  # fmt: skip
    bench = SimBench.open(request.choice, request.limits, realtime=False, simulated=True)
    try:
        policy, verifier = make_policy(request, bench.world), make_verifier(request, bench)
        result = run_parts(request, bench, policy, verifier, folder, SilentProgress())
    finally:
        bench.close()
        connection.close()
    return result, read_episode(folder)


def tokens_are_spoken_and_rows_arrive(url: str, folder: Path) -> None:
    """-AT: the model's text is the tokens of Table 2, and the rows are what the card's map makes of it."""
    result, recorded = episode(url, "at", folder)
    digits = ModelCard.read(MODEL / ADAPTERS["at"]).digit_map
    assert digits is not None
    answers = recorded.of("answer")
    raw = [event["answer"]["stages"]["actions"]["raw_text"] for event in answers]
    assert raw and all(any(token in text for token in digits.values()) for text in raw), "tokens, not digits (Table 2)"
    assert [parse_actions(text, digit_map=digits).rows for text in raw] == [event["rows"] for event in answers]
    assert result.rows_executed > 0


def the_task_is_the_only_subtask(url: str, folder: Path) -> None:
    """-NR: neither subtasks nor plans are asked for, and the arm moves."""
    result, recorded = episode(url, "nr", folder)
    asked = [str(event["stage"]) for event in recorded.of("request")]
    assert "cycle" in asked and "subtasks" not in asked and recorded.of("plan") == []
    assert result.rows_executed > 0
