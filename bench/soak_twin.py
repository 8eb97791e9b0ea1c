"""Episodes in the twin for minutes or hours, with a fault about every minute: does the client ever do harm?

Run by hand (`scripts/soak twin --minutes 60`). The client is assembled as for a physical arm, with the twin's arm and
camera in their place, in real time; the policy is the scripted expert behind a real HTTP server. Each fault strikes at
a random moment of its episode. Times to hold are judged against contracts.md, plus what a thread that only sleeps was
woken late by in the same moments: both are in the result. A monitor between client and arm checks every command by
itself (soak_twin_monitor.py); after each episode threads, file descriptors, memory and the recording are looked at.
Prints a table by kind of fault, writes one JSON file. Exit code 1, and `problems`, when something did not hold.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from soak import BIN, ROOT, machine, open_files, resident_mb
from soak_twin_episode import Script, TwinDesk, after, chunks_done_s, problems_in
from soak_twin_faults import KINDS, Lateness
from soak_twin_monitor import Seen

FIRST_SEED = 700_000
TASKS = ("pick up the carrot", "put the carrot on the yellow plate")
LATEST_STRIKE_S = 15.0
CLIENT_START_S = 60.0
KILLED_WITHIN_S = 3.0  # of the moment its recording begins; the shortest episode lasts longer
WARM_UP_EPISODES = 5
MAX_GROWTH_MB = 40.0
MAX_MORE_FILES = 3
THREADS_END_S = 10.0
LASTING_THREADS = ("server",)
STARVED_S = 0.2
STARVED_LOAD = 2.0
STARVED_EXITS = (4, 6, 7)
"""A computer that is so late may itself be the fault: a camera, an arm or a server then looks silent, rightly."""
JUST_ENDED_S = 4.0
"""A fault so near to the end of its episode may come too late for anyone to meet it."""
MOVING_S = 0.15
"""The arm is moving at a moment that a command precedes by no more than this."""


@dataclass
class Line:
    """One episode, and what was wrong with it."""

    seed: int
    task: str
    execute: str
    fault: str | None = None
    exit_code: int | None = None
    message: str = ""
    seconds: float = 0.0
    commands: int = 0
    moving: bool = False
    last_command_s: float | None = None
    hold_s: float | None = None
    lateness_s: float = 0.0
    hold_lateness_s: float = 0.0
    memory_mb: float = 0.0
    malloc_mb: float = 0.0
    python_blocks: int = 0
    files: int = 0
    load: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def starved(self) -> bool:
        """Whether others wanted this computer so much that a part may have looked silent."""
        return self.lateness_s > STARVED_S or self.load > STARVED_LOAD * (os.cpu_count() or 1)


class Soak:
    """The parts that outlive an episode."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.desk = TwinDesk()
        self.faults = self.desk.faults
        self.lateness = Lateness()
        self.lateness.start()
        self.deck: list[str] = []

    def next_kind(self) -> str:
        """Every kind before any comes again."""
        if not self.deck:
            self.deck = self.chance.sample(sorted(KINDS), len(KINDS))
        return self.deck.pop()

    def episode(self, seed: int, kind: str | None) -> Line:
        """One episode to its end, with its fault, and everything that can be checked afterwards."""
        line = Line(seed, self.chance.choice(TASKS), self.chance.choice(("whole", "streamed")))
        folder, threads = self.folder / f"{seed}", set(threading.enumerate())
        began_s = time.monotonic()
        if kind == "client killed":
            line.fault = kind
            self._killed(line, folder)
        else:
            self._run(line, kind, folder)
        line.seconds = round(time.monotonic() - began_s, 1)
        self._look_for_threads(line, threads)
        line.memory_mb, line.files = round(resident_mb(os.getpid()), 1), open_files(os.getpid())
        gc.collect()
        line.malloc_mb, line.python_blocks = round(malloc_mb(), 1), sys.getallocatedblocks()
        if not line.problems:
            shutil.rmtree(folder, ignore_errors=True)
        return line

    def _run(self, line: Line, kind: str | None, folder: Path) -> None:
        chance, speed = self.chance, self.chance.choice((1.0, 0.5))
        script = Script(
            line.task, line.seed, "streamed" if line.execute == "streamed" else "whole", speed, kind,
            after(chance.uniform(0.0, LATEST_STRIKE_S)),
        )  # fmt: skip
        played = self.desk.play(script, folder)
        line.exit_code, line.message = played.exit_code, played.message.replace(str(folder), "the recording's folder")
        line.fault = kind if self.faults.injected_s is not None else None
        line.load = round(os.getloadavg()[0], 1)
        line.lateness_s = round(self.lateness.worst_s(played.began_s, played.ended[0]), 3)
        self._judge(line, played.seen, played.ended, chunks_done_s(folder))
        line.problems += problems_in(folder, line.fault is not None and not KINDS[line.fault].ends)
        self.desk.tidy()

    def _judge(self, line: Line, seen: Seen, ended: tuple[float, float], done_s: list[float]) -> None:
        """What the monitor saw, the exit code, and how long the arm took to stand."""
        line.commands = seen.commands
        line.problems += seen.complaints
        if not seen.held:
            line.problems.append("the arm was not held at the end")
        if line.fault is None:
            starved = line.starved and line.exit_code in STARVED_EXITS
            if line.exit_code not in (0, 3) and not starved:
                line.problems.append(f"exit code {line.exit_code} without a fault")
            return
        about, from_s = KINDS[line.fault], self.faults.from_s or self.faults.injected_s
        assert from_s is not None
        which = 0 if about.wall else 1
        times = [(what, (wall, clock)[which] - from_s[which]) for what, wall, clock in seen.times]
        line.moving = any(what == "command" and -MOVING_S <= at_s <= 0.0 for what, at_s in times)
        met = self.faults.observed_s is not None or not about.observed
        went_on = any(what == "command" and at_s > 0.0 for what, at_s in times)  # else it stands
        if line.moving and met and went_on and about.still_after_s is not None:
            line.last_command_s = round(max(at_s for what, at_s in times if what == "command"), 3)
            holds = [at_s for what, at_s in times if what == "hold" and at_s >= 0.0]
            line.hold_s = round(holds[0], 3) if holds else None
            late_s = self.lateness.worst_s(from_s[0], from_s[0] + (line.hold_s or 0.0))
            line.hold_lateness_s = round(late_s, 3)
            until_s = about.still_after_s + late_s
            if any(0.0 <= at_s - from_s[0] <= until_s for at_s in done_s):
                line.hold_s = None  # its chunk was done in time, and it stood
            elif line.hold_s is None or line.hold_s > until_s:
                line.problems.append(f"held {line.hold_s} s after {line.fault} (limit {about.still_after_s} s)")
        for wall_s, after_s in seen.late:
            if after_s > (about.still_after_s or 0.0) + self.lateness.worst_s(from_s[0], wall_s):
                line.problems.append(f"a command {after_s:.2f} s after {line.fault} (limit {about.still_after_s} s)")
        unmet = ended[0] - self._injected_wall_s() < JUST_ENDED_S
        starved = line.starved and line.exit_code in STARVED_EXITS
        if line.exit_code not in about.exits and not (unmet and line.exit_code == 0) and not starved:
            line.problems.append(f"exit code {line.exit_code} after {line.fault}, expected {about.exits}")

    def _injected_wall_s(self) -> float:
        assert self.faults.injected_s is not None
        return self.faults.injected_s[0]

    def _killed(self, line: Line, folder: Path) -> None:
        """A client of its own, ended as by `kill -9`."""
        command = [str(BIN / "vlm2vla-client"), "run", "--sim", "--policy", "expert", "--verifier", "twin",
                   "--realtime", "--json", "--task", line.task, "--seed", str(line.seed), "--record", str(folder)]
        client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.folder)
        try:
            begin_s = time.monotonic()
            while not any(folder.glob("*/events.jsonl")) and client.poll() is None:
                if time.monotonic() - begin_s > CLIENT_START_S:
                    break
                time.sleep(0.05)
            line.exit_code = client.wait(self.chance.uniform(0.0, KILLED_WITHIN_S))
            line.problems.append("the client ended before it could be killed")
        except subprocess.TimeoutExpired:
            client.send_signal(signal.SIGKILL)
            line.exit_code = client.wait(10.0)
        for recorded in folder.glob("*/events.jsonl"):
            line.problems += problems_in(recorded.parent, True)

    @staticmethod
    def _look_for_threads(line: Line, before: set[threading.Thread]) -> None:
        ends_s = time.monotonic() + THREADS_END_S
        while left := [one.name for one in set(threading.enumerate()) - before if one.name not in LASTING_THREADS]:
            if time.monotonic() > ends_s:
                line.problems.append(f"threads left: {', '.join(sorted(left))}")
                return
            time.sleep(0.05)


def table(lines: list[Line]) -> list[dict[str, Any]]:
    """By kind of fault: how many, how many of them while the arm moved, how long until it held, how episodes ended."""
    rows = []
    for kind in [None, *KINDS]:
        some = [line for line in lines if line.fault == kind]
        holds = [line.hold_s for line in some if line.hold_s is not None]
        limit_s = None if kind is None else KINDS[kind].still_after_s
        rows.append({
            "fault": kind or "none", "episodes": len(some), "moving": sum(line.moving for line in some),
            "limit_s": limit_s, "hold_max_s": max(holds, default=None),
            "hold_lateness_max_s": max((line.hold_lateness_s for line in some), default=0.0),
            "exit_codes": dict(sorted(Counter(str(line.exit_code) for line in some).items())),
            "problems": sum(len(line.problems) for line in some),
        })  # fmt: skip
    return rows


class Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of the C library."""

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
        "keepcost")]  # fmt: skip


def malloc_mb() -> float:
    """What is handed out by the C library's allocator just now, without what it keeps for later."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo
    info = ask()
    return float(info.uordblks + info.hblkhd) / 2**20


def growth(values: list[float]) -> float:
    """Median of the last third of what follows the warm-up, less the median of its first third."""
    steady = values[WARM_UP_EPISODES:]
    third = len(steady) // 3
    return statistics.median(steady[-third:]) - statistics.median(steady[:third]) if third else 0.0


def report(lines: list[Line], minutes: float) -> dict[str, Any]:
    problems = [f"seed {line.seed} ({line.fault}): {problem}" for line in lines for problem in line.problems]
    memory_mb, files = growth([line.memory_mb for line in lines]), growth([float(line.files) for line in lines])
    if memory_mb > MAX_GROWTH_MB:
        problems.append(f"memory grew by {memory_mb:.0f} MB")
    if files > MAX_MORE_FILES:
        problems.append(f"{files:.0f} more open files than at first")
    return {
        "minutes": round(minutes, 1), "episodes": len(lines), "faults": sum(line.fault is not None for line in lines),
        "commands_checked": sum(line.commands for line in lines), "problems": problems, "table": table(lines),
        "memory_growth_mb": round(memory_mb, 1), "file_growth": files, "load_average": os.getloadavg(),
        "starved": sum(line.fault is None and line.exit_code in STARVED_EXITS for line in lines),
        "lateness_s": {"median": statistics.median(line.lateness_s for line in lines),
                       "max": max(line.lateness_s for line in lines)},
        "priority": os.nice(0), **machine(), "lines": [vars(line) for line in lines],
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    print(f"{'fault':22} {'count':>5} {'moving':>6} {'limit s':>8} {'hold max s':>10} {'lateness':>8}  exit codes")
    for row in result["table"]:
        numbers = [f"{row[name]:.2f}" if row[name] is not None else "-" for name in ("limit_s", "hold_max_s")]
        codes = ", ".join(f"{code}: {count}" for code, count in row["exit_codes"].items())
        print(f"{row['fault']:22} {row['episodes']:5} {row['moving']:6} {numbers[0]:>8} {numbers[1]:>10} "
              f"{row['hold_lateness_max_s']:8.2f}  {codes}")
    print(f"{result['episodes']} episodes in {result['minutes']} minutes, {result['faults']} faults, "
          f"{result['commands_checked']} commands checked, memory {result['memory_growth_mb']:+} MB; "
          f"{result['starved']} without a fault ended by a late computer")  # fmt: skip
    print("\n".join(["problems:", *result["problems"]]) if result["problems"] else "problems: none")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak twin", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--fault-every-s", type=float, default=60.0, help="0: in every episode")
    parser.add_argument("--kind", choices=sorted(KINDS), help="only this kind of fault")
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/soak_twin.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background inherits an ignored one
    began_s, lines, due_s = time.monotonic(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), random.Random(arguments.seed))
        while (now_s := time.monotonic()) - began_s < 60.0 * arguments.minutes:
            kind = (arguments.kind or soak.next_kind()) if now_s >= due_s else None
            line = soak.episode(arguments.seed + len(lines), kind)
            lines.append(line)
            if line.fault is not None:
                due_s = now_s + soak.chance.uniform(0.7, 1.3) * arguments.fault_every_s
            elif kind is not None:
                soak.deck.append(kind)
            print(json.dumps(vars(line)), flush=True)
        soak.desk.server.kill()
    result = report(lines, (time.monotonic() - began_s) / 60.0)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    show(result)
    print(f"written to {arguments.out}")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
