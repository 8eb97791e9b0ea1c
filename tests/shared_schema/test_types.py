"""The model card on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vlm2vla_schema.types import MODEL_CARD_FILE, ModelCard, ModelCardError, ReferenceLogprobs

DIGIT_MAP = {str(digit): f"<unused{6133 + digit}>" for digit in range(10)}


def card(**fields: Any) -> ModelCard:
    values: dict[str, Any] = {
        "name": "twin",
        "base_model": "models/twin/base",
        "image_size": 112,
        "stages": ["subtasks", "motion_plan", "actions"],
        "policy": True,
        "metrics": {"loss": 0.1, "by_kind": {"actions": [1, 2]}},
        "reference_logprobs": [ReferenceLogprobs(prompt="p", completion="c", token_ids=[1], logprobs=[-0.5])],
        **fields,
    }
    return ModelCard(**values)


def test_a_card_survives_the_disk(tmp_path: Path) -> None:
    for written in (card(), card(representation="tokens", digit_map=DIGIT_MAP)):
        written.write(tmp_path)
        assert ModelCard.read(tmp_path) == written
        assert [path.name for path in tmp_path.iterdir()] == [MODEL_CARD_FILE]


def test_a_card_of_a_newer_version_is_read(tmp_path: Path) -> None:
    card().write(tmp_path)
    path = tmp_path / MODEL_CARD_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_later": 1}))
    assert ModelCard.read(tmp_path) == card()


def test_the_digit_map_follows_the_representation() -> None:
    for fields in (
        {"representation": "tokens"},
        {"digit_map": DIGIT_MAP},
        {"representation": "tokens", "digit_map": {}},
    ):
        with pytest.raises(ValidationError):
            card(**fields)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"name": "x"}', "\xff", '{"name": "x", "base_model": "b", "image_size": 0}']
)
def test_unusable_cards_say_why(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / MODEL_CARD_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ModelCardError, match=MODEL_CARD_FILE):
        ModelCard.read(tmp_path)
