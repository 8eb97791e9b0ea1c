"""bench/capture_to_wire.py: the measurement is what it says; how fast it is, the benchmark prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench" / "capture_to_wire.py"


def test_the_benchmark_measures_all_of_the_way(tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    command = [sys.executable, str(BENCH), "--requests", "5", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(out.read_text())
    assert json.loads(done.stdout) == result and result["requests"] == 5
    assert result["held"] == (done.returncode == 0) == (result["last_pixel_to_wire_ms"]["p50"] < result["limit_ms"])
    assert result["jpeg_bytes"] > 50_000, "a real camera's picture is no smaller"
    assert result["last_pixel_to_wire_ms"]["p10"] > result["jpeg_ms"]["p10"] > 0.0
