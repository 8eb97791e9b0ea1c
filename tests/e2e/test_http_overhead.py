"""bench/http_overhead.py: the measurement is what it says; how fast it is, the benchmark prints."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm2vla_client.http import ServerConnection

BENCH = Path(__file__).resolve().parents[2] / "bench" / "http_overhead.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("http_overhead", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["http_overhead"] = module
    spec.loader.exec_module(module)
    return module


def test_a_request_is_measured_beside_the_engine_alone(bench: Any, tmp_path: Path) -> None:
    jpeg = bench.picture()
    with bench.served(bench.Door(), tmp_path / "door") as url:
        connection = ServerConnection(url)
        try:
            figures = bench.overhead(connection, jpeg, range(10))
            cost = bench.processor_ms(connection, jpeg, 30)
        finally:
            connection.close()
    assert figures["requests"] == 10
    assert figures["http_ms"]["p50"] > figures["direct_ms"]["p50"] > 0.0
    assert figures["http_ms"]["p50"] > figures["server_preprocess_ms"]["p50"] > 0.0
    assert figures["overhead_ms"]["p50"] > 0.0
    assert 0.0 < figures["outside_engine_ms"]["p50"] < figures["http_ms"]["p50"]
    assert cost["client"] > 0.0
    assert cost["server"] > 0.0


@pytest.mark.clock
def test_the_first_of_four_rows_comes_in_the_first_half(bench: Any, tmp_path: Path) -> None:
    with bench.served(bench.Door(prefill_s=0.05, token_s=0.03), tmp_path / "door") as url:
        connection = ServerConnection(url)
        try:
            bench.overhead(connection, bench.picture(), range(2))
            found = bench.streamed(connection, bench.picture(), range(5))
        finally:
            connection.close()
    assert found["chunks"] == 5
    assert found["first_row_ms"]["p50"] < found["whole_ms"]["p50"]
    assert found["ratio"]["p50"] <= bench.LIMIT_FIRST_ROW, found


def test_what_is_missed_is_named(bench: Any) -> None:
    good = {"judged_ms": 7.9, "streamed": {"ratio": {"p50": 0.49}}}
    slow = {"judged_ms": 8.1, "streamed": {"ratio": {"p50": 0.51}}}
    assert bench.missed_musts({"double_paced": good}) == []
    assert [line.split(":")[0] for line in bench.missed_musts({"double_paced": slow})] == ["double_paced"] * 2
    assert bench.missed_musts({"model": {**good, "streamed": {"chunks": 0}}}) == []
    assert json.dumps(bench.shares([1.0, 2.0, 3.0])) == '{"p10": 1.2, "p50": 2.0, "p95": 2.9, "p99": 2.98}'


def test_an_uncertain_overhead_is_composed_of_what_is_certain(bench: Any) -> None:
    paced = {"overhead_ms": {"p50": 7.0}, "overhead_error_ms": 0.2, "outside_engine_ms": {"p50": 6.5}}
    model = {"overhead_ms": {"p50": 2.0}, "overhead_error_ms": 6.0, "outside_engine_ms": {"p50": 7.25}}
    assert bench.judged_ms(paced, paced) == 7.0
    assert bench.judged_ms(model, paced) == 7.75
    assert bench.judged_ms({**model, "overhead_error_ms": 0.9}, paced) == 2.0


def test_the_error_of_a_median_falls_with_the_number_of_pairs(bench: Any) -> None:
    draw = random.Random(0)
    few, many = ([draw.gauss(8.0, 70.0) for _ in range(count)] for count in (200, 5000))
    assert bench.median_error(few) == pytest.approx(1.2533 * 70.0 / 200**0.5, rel=0.2)
    assert bench.median_error(many) == pytest.approx(1.2533 * 70.0 / 5000**0.5, rel=0.05)
