"""Many episodes in a row against one server: does anything grow, leak, hang or fail to stop?

Run by hand (`scripts/soak episodes`): it takes about a minute an episode. Prints one line an episode and writes one
JSON file. Seeds are development seeds; success is not judged here, only that every run ends by itself with an honest
exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
FIRST_SEED = 600_000
READY_DEADLINE_S = 600.0
EPISODE_DEADLINE_S = 600.0
# The first episodes fill caches; growth is counted from the third on.
WARM_UP_EPISODES = 2
MAX_GROWTH_MB = 100.0
HONEST_EXIT_CODES = (0, 3)
TASKS = ("pick up the carrot", "put the carrot on the yellow plate", "拿起胡萝卜")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmRSS")


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(url + "/readyz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.5)
    raise SystemExit("the server did not become ready")


def episode(url: str, index: int, folder: Path, pid: int) -> dict[str, Any]:
    task = TASKS[index % len(TASKS)]
    command = [str(BIN / "vlm2vla-client"), "run", "--sim", "--json", "--task", task, "--seed", str(FIRST_SEED + index),
               "--server", url, "--record", str(folder)]
    begun_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, timeout=EPISODE_DEADLINE_S, cwd=ROOT)
    return {"task": task, "seed": FIRST_SEED + index, "exit_code": done.returncode,
            "seconds": round(time.monotonic() - begun_s, 1), "server_mb": round(resident_mb(pid), 1),
            "server_files": open_files(pid)}


def machine() -> dict[str, str]:
    """What a committed figure must name."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return {"commit": commit.stdout.strip(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    steady = rows[WARM_UP_EPISODES:] or rows
    growth = steady[-1]["server_mb"] - steady[0]["server_mb"]
    problems = [f"seed {row['seed']} ended with {row['exit_code']}" for row in rows
                if row["exit_code"] not in HONEST_EXIT_CODES]
    if growth > MAX_GROWTH_MB:
        problems.append(f"the server grew by {growth:.0f} MB")
    return {"episodes": len(rows), "median_seconds": statistics.median(row["seconds"] for row in rows),
            "server_growth_mb": round(growth, 1), "server_files": [rows[0]["server_files"], rows[-1]["server_files"]],
            "problems": problems, **machine(), "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak episodes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/soak.json")
    arguments = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([str(BIN / "vlm2vla-server"), "serve", "--twin", "--port", str(port)], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = []
    try:
        wait_until_ready(url, server)
        for index in range(arguments.episodes):
            rows.append(episode(url, index, ROOT / "runs", server.pid))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    finally:
        server.terminate()
        server.wait(timeout=20)
    result = report(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"{result['episodes']} episodes, median {result['median_seconds']} s, "
          f"server grew by {result['server_growth_mb']} MB; "
          f"problems: {result['problems'] or 'none'}; written to {arguments.out}")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
