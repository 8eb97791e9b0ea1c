"""Every fault once, while the arm moves: when is it observed, when does the arm hold, how does the episode end?

    python bench/fault_matrix.py --out bench/results/fault_matrix.json --table fault_matrix.md

Faults of the server, the camera, the verifiers, the disk and the operator are met in the twin in real time; faults of
the arm's process and motors by the WidowX driver with its real child process and the vendor's double of the tests. Each
strikes at a chosen moment. Must: the arm holds within what contracts.md says (`limit_s`; how late this computer woke a
thread that slept in the same moments is added, and given), no row starts after the fault was observed, the episode ends
as it should, and its recording can be read. Exit code 1 when something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from capture_to_wire import about_run
from soak_twin_episode import Played, Script, TwinDesk, problems_in
from soak_twin_faults import HOLD_S, KINDS, Lateness
from soak_twin_monitor import Seen

from vlm2vla_client.loop import OUTCOMES
from vlm2vla_client.machine import about_machine, current_commit
from vlm2vla_client.recorder import read_episode

ROOT = Path(__file__).resolve().parents[1]
SEED = 710_000
TASK = "pick up the carrot"
MOVING_COMMANDS = 4
Case = Callable[[TwinDesk, Lateness, Path], "Row"]
OBSERVING = ("fault", "error", "dropped", "not_started", "hold")
VERIFY_DEADLINE_S = 3.0


@dataclass
class Row:
    """One fault. Seconds are counted from the fault, or from when the client was given it (`counted_from`).

    observed_s: until the recording first says so. hold_s: until the arm was told to hold; None when it stood already,
        or rightly goes on. rows_after: rows that started after the fault was observed and before anything was planned
        anew. limit_s: for `hold_s`, by contracts.md.
    """

    fault: str
    while_: str
    counted_from: str = "the fault"
    observed_s: float | None = None
    hold_s: float | None = None
    limit_s: float | None = None
    rows_after: int = 0
    exit_code: int | None = None
    outcome: str = ""
    lateness_s: float = 0.0
    readable: bool = True
    problems: list[str] = field(default_factory=list)

    def judge(self, exits: Sequence[int]) -> None:
        """Adds to the problems what did not hold."""
        if self.limit_s is not None and (self.hold_s is None or self.hold_s > self.limit_s + self.lateness_s):
            self.problems.append(f"held after {self.hold_s} s (limit {self.limit_s} s)")
        if self.rows_after:
            self.problems.append(f"{self.rows_after} rows started after it was observed")
        if self.exit_code not in exits:
            self.problems.append(f"exit code {self.exit_code}, expected {tuple(exits)}")


def rows_after(events: Sequence[dict[str, Any]], observed: int) -> int:
    """Rows that started after event number `observed`, until something was planned anew."""
    count = 0
    for event in events[observed + 1 :]:
        if event["event"] == "request":
            break
        count += event["event"] in ("decision", "step")
    return count


def observe(row: Row, folder: Path, from_s: float) -> None:
    """What the recording says about the fault, from a moment on."""
    episode = read_episode(folder)
    for number, event in enumerate(episode.events):
        failed_call = event["event"] == "verifier_call" and event.get("outcome") != "verdict"
        if event["t_s"] >= from_s and (event["event"] in OBSERVING or failed_call):
            row.observed_s = round(event["t_s"] - from_s, 3)
            if event["event"] != "dropped":  # else the other rows of the answer go on; problems_in looks for repeats
                row.rows_after = rows_after(episode.events, number)
            break
    if row.observed_s is None:  # the disk took no more
        row.observed_s = row.hold_s
    row.outcome = row.outcome or OUTCOMES.get(row.exit_code or 0, "verified")


# --- in the twin ------------------------------------------------------------------------------------------------------


def moving(seen: Seen) -> bool:
    """Some way into a row."""
    return seen.commands >= MOVING_COMMANDS


def planning(folder: Path) -> Callable[[Seen], bool]:
    """A picture has gone to the policy, and no row of its answer has moved the arm."""
    return lambda _: b'"stage": "cycle"' in (folder / "events.jsonl").read_bytes()


def verifying(seen: Seen) -> bool:
    """The first chunk is done: the arm has stood for a while."""
    return seen.commands > 0 and time.monotonic() - seen.times[-1][1] > 0.25


IN_STREAM = ("rows reordered", "rows twice", "corrupt JSON", "answer late", "server stalled 5 s", "server half-open")
MOMENTS = {"arm moved since capture": "planning", "verifier fails": "verifying", "verifier crashes": "verifying"}
LIMITS_S = {"operator's key": HOLD_S}
SEEN_LATER = ("server killed", "server half-open", "server stalled 5 s", "camera frozen", "camera gone")
SLOWLY = 0.1  # so that the arm is still on its way then
MAX_CYCLES = 6


def in_twin(kind: str, moment: str, desk: TwinDesk, lateness: Lateness, folder: Path) -> Row:
    """A fault of one of the soak's kinds."""
    about = KINDS[kind]
    row = Row(kind, moment, limit_s=LIMITS_S.get(kind, about.still_after_s) if moment == "moving" else None)
    when = {"moving": moving, "planning": planning(folder), "verifying": verifying}[moment]
    execute: Literal["whole", "streamed"] = "streamed" if kind in IN_STREAM else "whole"
    speed = SLOWLY if kind in SEEN_LATER else 1.0
    played = desk.play(Script(TASK, SEED, execute, speed, kind, when, max_cycles=MAX_CYCLES), folder)
    faults = desk.faults
    row.exit_code = played.exit_code
    if faults.injected_s is None:
        row.problems.append(f"the episode ended before the fault: {played.exit_code}, {played.message}")
    else:
        handed = about.observed and faults.observed_s is not None
        row.counted_from = "what the client was given" if handed else "the fault"
        from_s = (faults.observed_s if handed and faults.observed_s is not None else faults.injected_s)[0]
        finish(row, played, from_s, lateness, folder)
        row.problems += problems_in(folder, not about.ends)
        row.judge(about.exits)
    desk.tidy()
    return row


def finish(row: Row, played: Played, from_s: float, lateness: Lateness, folder: Path) -> None:
    """Times of the hold and of the observation."""
    holds = [wall - from_s for what, wall, _ in played.seen.times if what == "hold" and wall >= from_s]
    if row.limit_s is not None:
        row.hold_s = round(holds[0], 3) if holds else None
    row.lateness_s = round(lateness.worst_s(from_s, from_s + (row.hold_s or 0.0)), 3)
    row.problems += played.seen.complaints
    observe(row, folder, from_s)


def with_gemini(name: str, desk: TwinDesk, lateness: Lateness, folder: Path) -> Row:
    """Gemini answers badly, over a socket, for as long as it is asked."""
    import gemini_server as google

    from vlm2vla_client.verifiers.gemini import GeminiVerifier
    from vlm2vla_client.verifiers.gemini_settings import GeminiSettings

    reply = {
        "429": google.error(429, "RESOURCE_EXHAUSTED"), "500": google.error(500, "INTERNAL"),
        "invalid JSON": google.content("Yes, it holds it."), "timeout": google.silence,
        "blocked answer": google.content(google.GOOD_TEXT, finish="SAFETY"),
    }[name]  # fmt: skip
    asked_s: list[float] = []

    def choose(_: Any) -> Any:
        asked_s.append(time.monotonic())
        return reply

    row = Row(f"Gemini: {name}", "verifying", "the first request")
    with google.gemini_server(reply) as server:
        server.chooser = choose
        os.environ |= {"GOOGLE_GEMINI_BASE_URL": server.url, "GEMINI_API_KEY": "AIza-of-the-double"}
        verifier = GeminiVerifier(GeminiSettings(), first_wait_s=0.05)
        script = Script(TASK, SEED, verifier=verifier, verify_deadline_s=VERIFY_DEADLINE_S)
        played = desk.play(script, folder)
        verifier.close()
    row.exit_code = played.exit_code
    finish(row, played, asked_s[0], lateness, folder)
    row.problems += problems_in(folder, False)
    row.judge((3,))
    desk.tidy()
    return row


# --- everything -------------------------------------------------------------------------------------------------------

GEMINI = ("429", "500", "invalid JSON", "timeout", "blocked answer")
KEY_MOMENTS = ("moving", "planning", "verifying")
BELOW = ("client killed", "operator's key", "arm silent")  # at three moments, and down to the motors


def cases() -> dict[str, Case]:
    """All faults by name, in the order of the table."""
    from fault_matrix_arm import ARM

    twin = {kind: (kind, MOMENTS.get(kind, "moving")) for kind in KINDS if kind not in BELOW}
    twin |= {f"operator's key, {moment}": ("operator's key", moment) for moment in KEY_MOMENTS}
    found: dict[str, Case] = {name: partial(in_twin, *about) for name, about in twin.items()}
    found |= {f"Gemini: {name}": partial(with_gemini, name) for name in GEMINI}
    return found | ARM


COLUMNS = ("fault", "strikes while", "observed s", "hold s", "limit s", "rows after", "ends", "readable")


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/safety.md."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        times = [seconds(value) for value in (row.observed_s, row.hold_s, row.limit_s)]
        ends = f"{row.exit_code} {row.outcome}".strip().replace("_", " ")
        cells = (row.fault, row.while_, *times, str(row.rows_after), ends, "yes" if row.readable else "no")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", action="append", help="a fault by name; may be given several times")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="the same as Markdown")
    arguments = parser.parse_args(argv)
    sys.path[:0] = [str(ROOT / "tests" / "client"), str(ROOT / "tests")]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background inherits an ignored one
    random.seed(SEED)
    known = cases()
    if unknown := set(arguments.only or ()) - set(known):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; see --list")
    if arguments.list:
        print("\n".join(known))
        return 0
    lateness, about = Lateness(), about_run()
    lateness.start()
    rows = run(known, arguments.only or list(known), lateness)
    figures = {"rows": [asdict(row) for row in rows], "held": not any(row.problems for row in rows), "seed": SEED,
               **about, "commit": current_commit(), "machine": about_machine()}  # fmt: skip
    for path, text in ((arguments.out, json.dumps(figures, indent=1) + "\n"), (arguments.table, markdown(rows))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(markdown(rows), end="")
    print("\n".join(f"{row.fault}: {problem}" for row in rows for problem in row.problems) or "problems: none")
    return 0 if figures["held"] else 1


def run(known: dict[str, Case], names: Sequence[str], lateness: Lateness) -> list[Row]:
    desk, rows = TwinDesk(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            row = known[name](desk, lateness, Path(folder) / f"{number:02d}")
            row.readable = not any("recording" in problem for problem in row.problems)
            rows.append(row)
            said = "; ".join(row.problems) or "held"
            print(f"{number + 1} of {len(names)}: {name}: {said}", file=sys.stderr, flush=True)
    desk.server.kill()
    return rows


if __name__ == "__main__":
    sys.exit(main())
