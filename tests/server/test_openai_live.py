"""/v1 and the openai engine between real processes: OpenAI's own client, the README's curl lines, a server in front of
a server, and two replicas behind a proxy of which one is killed."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_proxy import live_proxy
from live_server import Live, hang_up, live_server, metric
from server_fakes import GOOD, IMAGE, image_bytes

from vlm2vla_schema.images import encode_jpeg
from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks import SUITES

ROOT = Path(__file__).resolve().parents[2]
TWIN = ["--model", str(ROOT / "models/twin/base"), "--adapter", f"twin={ROOT / 'models/twin/adapter'}"]
URL = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{IMAGE}"}}
OTHER = base64.b64encode(image_bytes("PNG", (40, 40))).decode()
OTHER_URL = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{OTHER}"}}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The small embedded model, served."""
    log = tmp_path_factory.mktemp("upstream") / "server.log"
    with live_server(["--engine", "transformers", *TWIN], log) as server:
        yield server


@pytest.fixture(scope="module")
def front(upstream: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A second server whose engine is the first one's /v1."""
    log = tmp_path_factory.mktemp("front") / "server.log"
    option = ["--engine-option", f"url={upstream.url}/v1"]
    with live_server(["--engine", "openai", *TWIN, *option], log) as server:
        yield server


@pytest.fixture
def client(upstream: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="unused", timeout=60, max_retries=0) as made:
        yield made


def test_openais_client_lists_models_and_asks_about_pictures(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["twin", "base"]
    content: Any = [URL, OTHER_URL, {"type": "text", "text": "What is orange?"}]
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8
    )
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.usage is not None
    images = 2 * json.loads((ROOT / "models/twin/base/config.json").read_text())["mm_tokens_per_image"]
    assert answer.usage.prompt_tokens > images and 0 < answer.usage.completion_tokens <= 8
    swapped: Any = [OTHER_URL, URL, content[2]]
    again = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": swapped}], temperature=0, max_tokens=8
    )
    assert again.usage is not None and again.usage.prompt_tokens == answer.usage.prompt_tokens


def test_openais_client_streams_the_same_text(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [URL, {"type": "text", "text": "What is orange?"}]},
        {"role": "assistant", "content": "The carrot."},
        {"role": "user", "content": "And what is yellow?"},
    ]
    asked: Any = {"model": "twin", "messages": messages, "temperature": 1.0, "seed": 7, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    other = client.chat.completions.create(**{**asked, "messages": messages[1:]})
    assert other.usage is not None and other.usage.prompt_tokens < whole.usage.prompt_tokens


def test_openais_client_understands_the_errors(client: openai.OpenAI) -> None:
    hello: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=hello)
    assert unknown.value.code == "model_not_found"
    remote: Any = [{"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="twin", messages=[{"role": "user", "content": remote}])
    assert refused.value.code == "invalid_image"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="twin", messages=[{"role": "user", "content": "carrot " * 14_000}])
    assert long.value.code == "context_length_exceeded"
    for text in ("root ::= (((", "root ::= root", 'start ::= "a"'):
        with pytest.raises(openai.BadRequestError) as grammar:
            client.chat.completions.create(model="twin", messages=hello, extra_body={"guided_grammar": text})
        assert grammar.value.code == "invalid_request"


def test_a_grammar_over_v1_constrains_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "Say it."}],
        temperature=2.0,
        seed=1,
        extra_body={"structured_outputs": {"grammar": 'root ::= "carrot" | "plate"'}},
    )
    assert answer.choices[0].message.content in ("carrot", "plate")


def curl_lines() -> list[str]:
    """The curl lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.split(" # ")[0].strip() for line in joined.splitlines() if line.startswith("curl ")]


def test_the_curl_lines_cover_the_endpoints() -> None:
    lines = " ".join(curl_lines())
    for path in ("/info", "/vqa", "/subtasks", "/cycle", "x-ndjson", "/v1/chat/completions"):
        assert path in lines


@pytest.mark.parametrize("line", curl_lines())
def test_a_curl_line_of_the_readme_works_as_printed(upstream: Live, tmp_path: Path, line: str) -> None:
    # A view of the twin: on any other picture a model this small may talk on until it is cut.
    spec = SUITES["pick_carrot"].scene(500_000, "varied")
    (tmp_path / "frame.jpg").write_bytes(encode_jpeg(Camera(World(spec)).rgb()))
    command = line.replace("localhost:8000", f"127.0.0.1:{upstream.port}").replace(
        "curl ", "curl --fail-with-body -m 90 ", 1
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(row) for row in done.stdout.splitlines()]
    assert events and "error" not in events[-1]
    if "ndjson" in line:
        assert events[0]["event"] == "plan" and events[-1]["event"] == "done" and len(events) > 2
    if "model=base" in shlex.split(line):
        assert events[-1]["model"] == "base"


def actions(live: Live, **change: Any) -> dict[str, Any]:
    body = {**GOOD["/actions"], "deadline_ms": 170_000, **change}
    answer = httpx.post(f"{live.url}/actions", json=body, timeout=175)
    assert answer.status_code == 200, answer.text
    got: dict[str, Any] = answer.json()
    return got


def test_a_server_in_front_says_what_the_one_behind_it_says(upstream: Live, front: Live) -> None:
    for change in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"model": "base", "seed": 6}):
        one, two = actions(upstream, **change), actions(front, **change)
        assert one["raw_text"] == two["raw_text"] and one["actions"] == two["actions"] and one["model"] == two["model"]
        for name in ("prompt_tokens", "completion_tokens"):
            assert one["usage"][name] == two["usage"][name] > 0
    assert actions(front, temperature=0.0)["usage"]["cached_tokens"] > 0
    verdict = httpx.post(f"{front.url}/verify", json=GOOD["/verify"], timeout=120)
    assert verdict.status_code == 200 and verdict.json()["confidence"] in ("High", "Medium", "Low")


def test_a_server_in_front_proves_the_adapter_through_the_endpoint(upstream: Live, front: Live) -> None:
    behind, before = (httpx.get(f"{live.url}/info", timeout=10).json() for live in (upstream, front))
    assert before["policy"] is True and before["adapters"][0]["proven"] is True and before["engine"] == "openai"
    assert before["adapters"][0]["mean_difference_nat"] == pytest.approx(
        behind["adapters"][0]["mean_difference_nat"], rel=1e-3
    )
    assert before["context_tokens"] == behind["context_tokens"]


def test_leaving_the_server_in_front_frees_the_engine_behind_it(upstream: Live, front: Live) -> None:
    body = {**GOOD["/actions"], "temperature": 2.0, "top_p": 1.0, "seed": 1, "max_attempts": 1, "max_tokens": 3000}
    start = metric(upstream.url, "vlm2vla_engine_decoded_tokens")
    hang_up(front, "/actions", body, stream=True, after_tokens=5)
    deadline_s = time.monotonic() + 30
    while metric(upstream.url, "vlm2vla_engine_running") > 0:
        assert time.monotonic() < deadline_s, "the engine behind was not freed"
    assert metric(upstream.url, "vlm2vla_engine_decoded_tokens") - start < 3000


def test_a_replica_is_killed_and_the_run_goes_on(upstream: Live, tmp_path: Path) -> None:
    with (
        live_server(["--engine", "transformers", *TWIN], tmp_path / "second.log") as second,
        live_proxy([upstream, second], tmp_path) as proxy,
        live_server(
            ["--engine", "openai", *TWIN, "--engine-option", f"url={proxy}/v1"], tmp_path / "front.log"
        ) as front,
        ThreadPoolExecutor(4) as callers,
    ):
        served = [metric(live.url, "vlm2vla_engine_decoded_tokens") for live in (upstream, second)]
        runs = [callers.submit(actions, front, seed=seed, temperature=1.0) for seed in range(16)]
        deadline_s = time.monotonic() + 60
        while sum(run.done() for run in runs) < 3 or metric(second.url, "vlm2vla_engine_running") == 0:
            assert time.monotonic() < deadline_s, "the second replica got nothing to do"
        assert metric(upstream.url, "vlm2vla_engine_decoded_tokens") > served[0]
        os.kill(second.pid, signal.SIGKILL)
        left = [run for run in runs if not run.done()]
        assert len(left) >= 2, "the run was over before the replica was killed"
        answers = [run.result(timeout=180) for run in runs]
        assert all(1 <= len(answer["actions"]) <= 32 for answer in answers)
        expected = actions(upstream, seed=0, temperature=1.0)
        assert answers[0]["raw_text"] == expected["raw_text"] or answers[0]["attempts"] > 1
        cycle = httpx.post(f"{front.url}/cycle", json=GOOD["/cycle"], timeout=150)
        assert cycle.status_code == 200, cycle.text
