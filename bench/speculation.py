"""Does n-gram speculation make action text come sooner? The vLLM engine with and without it, request by request.

    python bench/speculation.py --server-program .venv-vllm/bin/vlm2vla-server --out bench/results/speculation.json

n-gram speculation lets a step of the model check several tokens that followed the same words earlier in the prompt or
the answer; rows of numbers repeat themselves. Two servers with the twin's model run side by side; every frame's motion
plan and rows are asked of both in turn, the order changing from frame to frame, greedily and as the policy samples.
Told are the medians of `timing_ms.generate` and of the paired ratio (below 1: sooner), and how many texts are equal,
which greedy ones must be but for near ties. There is no limit to hold: the figure is for the choice of an option, and
on a GPU, where a step costs more than the checking, it is another one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soak import free_port, machine, wait_until_ready

from vlm2vla_client.errors import AnswerUnusableError
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.scenes import choose_scene
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import World

MODEL = ("--model", "models/twin/base", "--adapter", "twin=models/twin/adapter")
FIRST_SEED = 500_000
SUBTASK = "Move to Carrot"
DEADLINE_S = 300.0
WARM_UP = 3
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
STAGES = ("motion_plan", "actions")


@contextlib.contextmanager
def served(program: Path, options: list[str]) -> Iterator[ServerConnection]:
    """A ready server on the vLLM engine; it ends with the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(program), "serve", "--engine", "vllm", *MODEL, "--port", str(port), *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(url, server)
        connection = ServerConnection(url)
        yield connection
        connection.close()
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(5)


def frame(seed: int) -> bytes:
    """The start of a development seed's scene as the client sends it."""
    return encode_jpeg(Camera(World(choose_scene("pick up the carrot", None, seed).spec)).rgb())


def asked(server: ServerConnection, stage: str, plan: str, jpeg: bytes, seed: int, heat: float) -> dict[str, Any]:
    """One answer of /motion_plan or /actions."""
    fields: dict[str, Any] = {"subtask": SUBTASK, "seed": seed, "temperature": heat, "max_attempts": 1}
    if stage == "actions":
        fields["motion_plan"] = plan
    return server.post(f"/{stage}", fields, {"image": jpeg}, DEADLINE_S)


def compared(plain: ServerConnection, speculating: ServerConnection, frames: int, heat: float) -> dict[str, Any]:
    """Both servers on the same questions."""
    found: dict[str, dict[str, list[float]]] = {
        stage: {"plain": [], "speculating": [], "ratio": [], "tokens": [], "equal": []} for stage in STAGES
    }
    for number in range(-WARM_UP, frames):
        jpeg, plan = frame(FIRST_SEED + abs(number)), ""
        for stage in STAGES:
            answers: dict[str, dict[str, Any]] = {}
            for name in ("plain", "speculating") if number % 2 else ("speculating", "plain"):
                server = plain if name == "plain" else speculating
                with contextlib.suppress(AnswerUnusableError):  # a small model's greedy text may go round in circles
                    answers[name] = asked(server, stage, plan, jpeg, abs(number), heat)
            if len(answers) < 2:
                break
            plan = answers["plain"].get("motion_plan", plan)
            if number < 0:
                continue
            took = {name: answer["timing_ms"]["generate"] for name, answer in answers.items()}
            equal = answers["plain"]["raw_text"] == answers["speculating"]["raw_text"]
            kept = found[stage]
            kept["equal"].append(float(equal))
            kept["tokens"].append(float(answers["plain"]["usage"]["completion_tokens"]))
            for name, value in took.items():
                kept[name].append(value)
            if equal:
                kept["ratio"].append(took["speculating"] / took["plain"])
        print(f"\r{heat:g}: {number + 1} of {frames} frames ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {stage: medians(values) for stage, values in found.items()}


def medians(values: dict[str, list[float]]) -> dict[str, Any]:
    """What is committed of one stage."""
    return {
        "answers": len(values["equal"]),
        "equal_texts": int(sum(values["equal"])),
        "tokens_p50": statistics.median(values["tokens"]),
        "plain_ms_p50": round(statistics.median(values["plain"]), 1),
        "speculating_ms_p50": round(statistics.median(values["speculating"]), 1),
        "ratio_of_equal_texts_p50": round(statistics.median(values["ratio"]), 3) if values["ratio"] else None,
    }


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-program", type=Path, required=True, help="vlm2vla-server beside the real vLLM")
    parser.add_argument("--frames", type=int, default=50, metavar="N")
    parser.add_argument("--tokens", type=int, default=4, metavar="N", help="guessed at once (4)")
    parser.add_argument("--lookup", type=int, default=4, metavar="N", help="longest run of tokens looked up (4)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    how = {"method": "ngram", "num_speculative_tokens": options.tokens, "prompt_lookup_max": options.lookup}
    load_before = os.getloadavg()[0]
    speculation = ["--engine-option", f"speculative_config={json.dumps(how)}"]
    with served(options.server_program, []) as plain, served(options.server_program, speculation) as speculating:
        figures = {name: compared(plain, speculating, options.frames, heat) for name, heat in TEMPERATURES.items()}
    result = {
        "command": " ".join(["python bench/speculation.py", *sys.argv[1:]]),
        **machine(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "speculative_config": how,
        **figures,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
