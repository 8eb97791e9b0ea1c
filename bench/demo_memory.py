"""How much memory the demo needs at most: server, client and whatever they start, together.

    python bench/demo_memory.py --out bench/results/demo_memory.json            arguments after -- go on to scripts/demo

Reads the proportional set size (shared pages counted once) of every process of the demo a few times a second. Must:
below 4 GB. Exit code 1 when that did not hold; the demo's own exit code stands in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from soak import ROOT, machine

LIMIT_MB = 4000.0
EVERY_S = 0.2


def parents() -> dict[int, int]:
    """Every process and its parent."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:  # it has just ended
            continue
        found[int(folder.name)] = int(text.rpartition(")")[2].split()[1])
    return found


def descendants(root: int) -> set[int]:
    """A process and all below it."""
    of, found = parents(), {root}
    while more := {pid for pid, parent in of.items() if parent in found and pid not in found}:
        found |= more
    return found


def proportional_mb(pid: int) -> float:
    """The proportional set size of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000 * 1.024


def watch(command: list[str]) -> tuple[int, dict[str, float], float]:
    """Run a command. Returns its exit code, what each program held when all together held most, and the sum, in MB."""
    process = subprocess.Popen(command, cwd=ROOT)
    peak_mb, parts = 0.0, {}
    while process.poll() is None:
        held: dict[str, float] = {}
        for pid in descendants(process.pid):
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            held[name] = held.get(name, 0.0) + proportional_mb(pid)
        if sum(held.values()) > peak_mb:
            peak_mb, parts = sum(held.values()), held
        time.sleep(EVERY_S)
    return process.returncode, {name: round(value, 1) for name, value in sorted(parts.items())}, round(peak_mb, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("demo", nargs="*", help="arguments of scripts/demo")
    options = parser.parse_args()
    began_s = time.monotonic()
    code, parts, peak_mb = watch([str(ROOT / "scripts/demo"), *options.demo])
    result = {
        "command": " ".join(["python bench/demo_memory.py", *sys.argv[1:]]), **machine(),
        "date": time.strftime("%Y-%m-%d"), "load_average": round(os.getloadavg()[0], 2), "demo_exit_code": code,
        "seconds": round(time.monotonic() - began_s, 1), "peak_mb": peak_mb, "parts_mb": parts, "limit_mb": LIMIT_MB,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 0 if 0.0 < peak_mb < LIMIT_MB else 1


if __name__ == "__main__":
    sys.exit(main())
