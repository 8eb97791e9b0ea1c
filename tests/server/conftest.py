"""One engine of each kind for all tests here that ask for it: starting vLLM takes most of a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_contract import PARAMETERS, QWEN, Models, Subject, started, write_models, write_qwen_models


@pytest.fixture(scope="session")
def contract_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_models(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="session")
def qwen_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_qwen_models(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def vllm_subject(contract_models: Models) -> Iterator[Subject]:
    with started("vllm", contract_models) as running:
        yield running


@pytest.fixture(scope="session", params=PARAMETERS)
def subject(request: pytest.FixtureRequest, contract_models: Models) -> Iterator[Subject]:
    if request.param == "vllm":
        yield request.getfixturevalue("vllm_subject")
        return
    models = request.getfixturevalue("qwen_models") if request.param.endswith(QWEN) else contract_models
    with started(request.param, models) as running:
        yield running
