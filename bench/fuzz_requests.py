"""Ten thousand broken requests against a running server: bad pictures, huge bodies, wrong types, NaN, deep nesting, ...

    python bench/fuzz_requests.py --model models/twin/base --adapter twin=models/twin/adapter      starts its own server
        (with --out bench/results/fuzz_requests.json the committed result is written)
    python bench/fuzz_requests.py --url http://127.0.0.1:8000                                       uses yours

Prints one JSON object with the count of every status; exits 1 on a 500, on an answer that docs/protocol.md does not
describe, on a connection that broke without an answer, or when the server is not healthy afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests" / "server"))

from live_server import live_server
from request_mutations import mutate, problem
from server_fakes import image_bytes
from soak import machine


@dataclass
class Findings:
    """Counts and whatever went wrong."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


async def fuzz(url: str, first_seed: int, count: int, callers: int, huge_bytes: int, limit_s: float) -> Findings:
    """Send the requests of seeds first_seed .. first_seed + count - 1, `callers` at a time, for at most limit_s."""
    found = Findings()
    seeds = iter(range(first_seed, first_seed + count))
    image = image_bytes()
    end_s = time.monotonic() + limit_s

    async def caller(client: httpx.AsyncClient) -> None:
        for seed in seeds:
            if time.monotonic() > end_s:
                return
            request = mutate(seed, image, huge_bytes)
            headers = [(k.encode(), v.encode("latin-1")) for k, v in request.headers.items()]
            began_s = time.monotonic()
            try:
                answer = await client.request(request.method, url + request.path, content=request.body, headers=headers)
            except (httpx.HTTPError, httpx.InvalidURL) as failure:
                found.wrong.append(f"seed {seed} {request.kinds}: no answer, {failure!r}")
                continue
            found.slowest_s = max(found.slowest_s, time.monotonic() - began_s)
            found.statuses[answer.status_code] += 1
            found.kinds[request.kinds[0]] += 1
            complaint = problem(answer.status_code, answer.headers.get("content-type", ""), answer.content)
            if complaint is not None:
                found.wrong.append(f"seed {seed} {request.kinds}: {complaint}")

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(caller(client) for _ in range(callers)))
        health = await client.get(url + "/readyz")
        if health.status_code != 200:
            found.wrong.append(f"afterwards /readyz says {health.status_code}")
    return found


def main() -> int:
    """Fuzz and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--model")
    parser.add_argument("--adapter", help="NAME=PATH")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--limit-s", type=float, default=3600.0, help="stop after this time and report what was sent")
    parser.add_argument("--huge-mb", type=int, default=17, help="size of the oversized bodies; the server takes 16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if bool(options.url) == bool(options.model):
        parser.error("give --url of a running server, or --model to start one")
    began_s, load_before = time.monotonic(), os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        url = options.url
        if url is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            arguments = ["--engine", "transformers", "--model", options.model]
            arguments += ["--adapter", options.adapter] if options.adapter else []
            url = stack.enter_context(live_server(arguments, Path(folder) / "server.log")).url
        found = asyncio.run(
            fuzz(url, options.first_seed, options.requests, options.callers, options.huge_mb * 2**20, options.limit_s)
        )
    result = {
        "command": " ".join(["python bench/fuzz_requests.py", *sys.argv[1:]]),
        **machine(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "requests_asked": options.requests,
        "requests_sent": sum(found.kinds.values()),
        "statuses": {str(k): v for k, v in sorted(found.statuses.items())},
        "kinds": dict(found.kinds.most_common()),
        "slowest_s": round(found.slowest_s, 2),
        "seconds": round(time.monotonic() - began_s, 1),
        "wrong": found.wrong[:20],
        "wrong_count": len(found.wrong),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 1 if found.wrong or found.statuses[500] else 0


if __name__ == "__main__":
    sys.exit(main())
