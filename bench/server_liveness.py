"""How alive the server stays while it generates: /healthz under load, and closed connections.

    python bench/server_liveness.py --model models/twin/base --adapter twin=models/twin/adapter \
        --out bench/results/server_liveness.json

Starts a server of its own, prints one JSON object, exits 1 when a limit is missed (p99 of /healthz above 50 ms, or more
than one token decoded after a closed connection was noticed, of which /metrics cannot see less than two more).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests" / "server"))

from live_server import hang_up, live_server, percentile, probe_health
from server_fakes import image_bytes
from soak import machine

HEALTH_LIMIT_MS = 50.0
LATE_TOKENS = 3
LONG: dict[str, Any] = {
    "question": "Describe it.",
    "temperature": 2.0,
    "top_p": 1.0,
    "max_tokens": 3000,
    "max_attempts": 1,
}


def main() -> int:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", help="NAME=PATH")
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--hang-ups", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arguments = ["--engine", "transformers", "--model", options.model]
    arguments += ["--adapter", options.adapter] if options.adapter else []
    image = base64.b64encode(image_bytes(size=(640, 480))).decode()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, live_server(arguments, Path(folder) / "server.log") as live:
        probes = asyncio.run(probe_health(live, {**LONG, "image": image, "max_tokens": 200}, options.probes))
        ends = [
            hang_up(live, "/vqa", {**LONG, "image": image, "seed": seed}, stream=False, after_tokens=5)
            for seed in range(options.hang_ups)
        ]
    times = probes.times_ms
    p99 = percentile(times, 0.99)
    late = max(end.late_tokens for end in ends)
    held = p99 <= HEALTH_LIMIT_MS and late <= LATE_TOKENS
    result = {
        "command": " ".join(["python bench/server_liveness.py", *sys.argv[1:]]),
        **machine(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "healthz_probes": len(times),
        "probes_while_generating": probes.generating,
        "healthz_ms": {
            "p50": round(percentile(times, 0.5), 2),
            "p99": round(p99, 2),
            "max": round(max(times), 2),
            "limit": HEALTH_LIMIT_MS,
        },
        "hang_ups": len(ends),
        "tokens_after_close": [end.late_tokens for end in ends],
        "free_after_close_ms": [round(end.free_ms, 1) for end in ends],
        "held": held,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
