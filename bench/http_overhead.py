"""What the HTTP layer costs: /actions over HTTP beside the same engine called directly, request by request in one run.

    python bench/http_overhead.py --model models/twin/base --adapter twin=models/twin/adapter \
        --out bench/results/http_overhead.json

The picture is a 640x480 JPEG of the twin with a camera's noise. Over HTTP counts everything from those bytes to rows:
base64, JSON, sockets, decoding, resizing, the prompt, strict parsing, the answer. Engines: a double that answers at
once; the same at a GPU's pace (--prefill-ms, --token-ms); with --model, the real model on this CPU. Musts: at most 8 ms
at p50 with the small picture of the twin's model, and the streamed first row of a four-row chunk in at most half of
the whole chunk's time. Exit code 1 and `missed` say what did not hold; `load_average` says how busy the machine was.
A real model's own time scatters, so the difference of two calls does too: `overhead_error_ms` is the standard error of
its median, and more --requests make it smaller. `outside_engine_ms` does not scatter: of one request over HTTP what the
server did not spend in its engine. Where the error is above a millisecond, it is judged by that, with what the paced
double, whose error is small, takes longer in its engine over HTTP than directly (`judged_ms`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests" / "server"))

from direct_door import Door, served

from vlm2vla_client.evaluation.statistics import quantile
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.scenes import choose_scene
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import World

LIMIT_MS = 8.0
LIMIT_FIRST_ROW = 0.5
MAX_ERROR_MS = 1.0
PACED = "double_paced"
ROWS = 4
DEADLINE_S = 60.0
WARM_UP = 5
SCENE_SEED = 500_000
CAMERA_NOISE = 2.0
FIELDS = {"subtask": "Move to Carrot", "motion_plan": "Move forward and slightly left, then down.", "temperature": 1.0}


def picture() -> bytes:
    """The twin's 640x480 view as a camera would send it: noise makes its JPEG as large as a real one."""
    spec = choose_scene("pick up the carrot", None, SCENE_SEED).spec
    return encode_jpeg(Camera(World(dataclasses.replace(spec, noise_std=CAMERA_NOISE))).rgb())


def shares(values: Sequence[float]) -> dict[str, float]:
    """p10, p50, p95, p99 of some milliseconds."""
    ordered = sorted(values)
    return {f"p{share}": round(quantile(ordered, share / 100), 3) for share in (10, 50, 95, 99)}


def median_error(values: Sequence[float]) -> float:
    """The standard error of a median, from the middle two thirds of the values: outliers count for nothing in it."""
    ordered = sorted(values)
    spread = (quantile(ordered, 0.84) - quantile(ordered, 0.16)) / 2.0
    return round(math.sqrt(math.pi / 2.0 / len(ordered)) * spread, 3)


def overhead(connection: ServerConnection, jpeg: bytes, seeds: Sequence[int]) -> dict[str, Any]:
    """Each seed once over HTTP and once directly, the order changing from one to the next."""
    http, direct, extra, outside, preprocess, parse = [], [], [], [], [], []
    for number, seed in enumerate(seeds):
        fields = {**FIELDS, "seed": seed}
        answers: dict[str, dict[str, Any]] = {}
        for way in ("direct", "http") if number % 2 else ("http", "direct"):
            began_s = time.perf_counter()
            path = "/actions" if way == "http" else "/direct"
            answers[way] = connection.post(path, fields, {"image": jpeg}, DEADLINE_S)
            if way == "http":
                took_ms = (time.perf_counter() - began_s) * 1000.0
        if answers["http"]["attempts"] != 1 or answers["http"]["raw_text"] != answers["direct"]["text"]:
            continue  # not the same work
        http.append(took_ms)
        direct.append(answers["direct"]["ms"])
        extra.append(took_ms - direct[-1])
        timing = answers["http"]["timing_ms"]
        in_engine_ms = timing["generate"] + answers["direct"]["preprocess_ms"]  # of the same prompt
        outside.append(took_ms - in_engine_ms)
        preprocess.append(timing["preprocess"])
        parse.append(timing.get("parse", 0.0))
    return {
        "requests": len(http),
        "http_ms": shares(http),
        "direct_ms": shares(direct),
        "overhead_ms": shares(extra),
        "overhead_error_ms": median_error(extra),
        "outside_engine_ms": shares(outside),
        "server_preprocess_ms": shares(preprocess),
        "server_parse_ms": shares(parse),
        "ratio_p50": round(shares(http)["p50"] / max(shares(direct)["p50"], 1e-9), 4),
    }


def processor_ms(connection: ServerConnection, jpeg: bytes, requests: int) -> dict[str, float]:
    """Processor time of one request over HTTP, in the client and in the server: what other programs on the machine
    cannot inflate. With a double that answers at once it is what the wall time would be on an idle machine."""

    def server_s() -> float:
        return float(connection.post("/direct", {**FIELDS, "seed": 0}, {"image": jpeg}, DEADLINE_S)["cpu_s"])

    server_before_s, client_before_s = server_s(), time.process_time()
    for seed in range(requests):
        connection.post("/actions", {**FIELDS, "seed": seed}, {"image": jpeg}, DEADLINE_S)
    client_s = time.process_time() - client_before_s
    # One call of the other door lies between the two readings.
    return {
        "client": round(client_s * 1000.0 / requests, 3),
        "server": round((server_s() - server_before_s) * 1000.0 / (requests + 1), 3),
    }


def streamed(connection: ServerConnection, jpeg: bytes, seeds: Sequence[int]) -> dict[str, Any]:
    """Time of the first row beside that of the whole chunk, of the chunks with four rows."""
    first, whole, ratio = [], [], []
    for seed in seeds:
        began_s = time.perf_counter()
        row_s = 0.0
        for line in connection.stream("/actions", {**FIELDS, "seed": seed}, {"image": jpeg}, DEADLINE_S):
            if line["event"] == "row" and not row_s:
                row_s = time.perf_counter() - began_s
            if line["event"] == "error":
                raise RuntimeError(f"the stream of seed {seed} failed: {line['error']}")
            rows = len(line.get("actions", ()))
        whole_s = time.perf_counter() - began_s
        if rows == ROWS:
            first.append(row_s * 1000.0)
            whole.append(whole_s * 1000.0)
            ratio.append(row_s / whole_s)
    if not first:
        return {"chunks": 0}
    return {"chunks": len(first), "first_row_ms": shares(first), "whole_ms": shares(whole), "ratio": shares(ratio)}


def four_row_seeds(connection: ServerConnection, jpeg: bytes, wanted: int, tries: int) -> list[int]:
    """Seeds whose chunk has four rows: a real model answers with as many as it likes, the same by the same seed."""
    found: list[int] = []
    for seed in range(tries):
        answer = connection.post("/actions", {**FIELDS, "seed": seed}, {"image": jpeg}, DEADLINE_S)
        if len(answer["actions"]) == ROWS:
            found.append(seed)
            if len(found) == wanted:
                break
    return found


def measure(door: Door, folder: Path, jpeg: bytes, requests: int) -> dict[str, Any]:
    """Both measurements on one server."""
    with served(door, folder) as url:
        connection = ServerConnection(url)
        try:
            overhead(connection, jpeg, range(WARM_UP))
            figures = overhead(connection, jpeg, range(requests))
            count = min(requests, 50)
            seeds = list(range(count)) if door.model is None else four_row_seeds(connection, jpeg, count, 20 * count)
            if door.model is None and not door.token_s:
                figures["processor_ms"] = processor_ms(connection, jpeg, requests)
            return {**figures, "streamed": streamed(connection, jpeg, seeds)}
        finally:
            connection.close()


def doors(options: argparse.Namespace) -> dict[str, Door]:
    """The servers to measure, by name."""
    pace = {"prefill_s": options.prefill_ms / 1000, "token_s": options.token_ms / 1000}
    found = {"double_at_once": Door(), PACED: Door(**pace), "double_at_once_896px": Door(image_size=896)}
    if options.model:
        adapter = options.adapter.partition("=")[2] if options.adapter else None
        found["model"] = Door(model=options.model, adapter=adapter)
    return found


def judged_ms(found: dict[str, Any], paced: dict[str, Any]) -> float:
    """The overhead at p50: as measured where that is certain, else composed of the two parts that are."""
    if found["overhead_error_ms"] <= MAX_ERROR_MS:
        return float(found["overhead_ms"]["p50"])
    inside = paced["overhead_ms"]["p50"] - paced["outside_engine_ms"]["p50"]
    return round(float(found["outside_engine_ms"]["p50"] + inside), 3)


def missed_musts(figures: dict[str, Any]) -> list[str]:
    """What did not hold, in words."""
    missed = []
    for name, found in figures.items():
        over = found["judged_ms"]
        if over > LIMIT_MS and not name.endswith("px"):
            missed.append(f"{name}: overhead {over} ms at p50, limit {LIMIT_MS}")
        ratio = found["streamed"].get("ratio")
        paced = not name.startswith("double_at_once")
        if ratio is not None and paced and ratio["p50"] > LIMIT_FIRST_ROW:
            missed.append(f"{name}: first row after {ratio['p50']} of the chunk's time, limit {LIMIT_FIRST_ROW}")
    return missed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base of a real model; left out, only the double is measured")
    parser.add_argument("--adapter", help="NAME=PATH")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="pairs for each engine (200)")
    parser.add_argument("--paced-requests", type=int, default=50, metavar="N", help="of them for the paced double (50)")
    parser.add_argument("--prefill-ms", type=float, default=40.0)
    parser.add_argument("--token-ms", type=float, default=7.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    jpeg, loads = picture(), [os.getloadavg()[0]]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, door in doors(options).items():
            requests = min(options.requests, options.paced_requests) if door.token_s else options.requests
            figures[name] = measure(door, Path(scratch) / name, jpeg, requests)
            figures[name]["judged_ms"] = judged_ms(figures[name], figures.get(PACED, figures[name]))
            loads.append(os.getloadavg()[0])
            print(f"{name}: {json.dumps(figures[name])}", file=sys.stderr, flush=True)
    missed = missed_musts(figures)
    report = {**about(options, jpeg), "load_average": [round(load, 2) for load in loads], **figures, "missed": missed}
    text = json.dumps(report, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 1 if missed else 0


def event_loop() -> str:
    """What the server's event loop is: uvloop where it is installed."""
    return f"uvloop {metadata.version('uvloop')}" if find_spec("uvloop") else "asyncio"


def about(options: argparse.Namespace, jpeg: bytes) -> dict[str, Any]:
    """What a published figure must name."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    return {
        "command": " ".join(["python bench/http_overhead.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip(),
        "event_loop": event_loop(),
        "real_time": os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} {platform.machine()} cores",
        "jpeg_bytes": len(jpeg),
        "prefill_ms": options.prefill_ms,
        "token_ms": options.token_ms,
    }


if __name__ == "__main__":
    sys.exit(main())
