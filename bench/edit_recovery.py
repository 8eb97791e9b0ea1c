"""How many failed trials does one edit in words save?

    vlm2vla-server serve --twin --port 8000 &
    python bench/edit_recovery.py --server http://localhost:8000 --suite pick_carrot --seed 1001000 --failures 50 \
        --parallel 4 --out bench/results/edit_recovery.json

Each seed is first run by the policy alone. One that fails (no full score by physics) is run again with an operator
who, once a trial, gives other words, as `--confirm` takes them. A gripper that should hold the thing and is empty, or
that the policy would close once more instead of opening it, goes back to the approach ("Move to Carrot") with the
motion plan that the scripted expert has from there; from the fourth try of an approach on, its plan becomes the
expert's, unless that is to hold still. Only these words come from the expert: the rows are the model's.
Beside it, as a control, the same seed once more with nobody's help.
Must: at least half of the failed trials reach full score. Every seed is a line beside the result (`.jsonl`): an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from vlm2vla_client.confirm import Edit, Proposal
from vlm2vla_client.episode import EpisodeResult
from vlm2vla_client.evaluation.run import server_facts
from vlm2vla_client.evaluation.statistics import wilson
from vlm2vla_client.evaluation.trial import ANSWER_LIMIT_S
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.machine import about_machine, current_commit
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.scenes import SceneChoice
from vlm2vla_client.sim import SimBench, SimRequest, make_policy, make_verifier, run_parts
from vlm2vla_twin.expert import Expert
from vlm2vla_twin.skills import Skill, parse_subtask
from vlm2vla_twin.tasks import SUITES

MOVES_BEFORE_EDIT = 3
CLOSED = 0.1
OPENS, STILL = "open the gripper", "Hold still"
MAX_CYCLES = 12
STARVED_AGAIN = 3


@dataclass
class Editor:
    """Lets every chunk pass but one: the first whose words are plainly wrong."""

    expert: Expert
    tries: dict[str, int] = field(default_factory=dict)
    edit: dict[str, Any] | None = None

    def __call__(self, proposal: Proposal) -> bool | Edit:
        subtask = proposal.subtask
        self.tries[subtask] = self.tries.get(subtask, 0) + 1
        words = None if self.edit is not None else self._words(proposal)
        if words is None or (words.subtask, words.motion_plan) == (subtask, proposal.motion_plan):
            return True
        said = {"subtask": subtask, "motion_plan": proposal.motion_plan}
        self.edit = {"from": said, "to": {"subtask": words.subtask, "motion_plan": words.motion_plan}}
        return words

    def _words(self, proposal: Proposal) -> Edit | None:
        """What the expert would say now; None while the policy's words may still come right."""
        skill = parse_subtask(proposal.subtask)
        if skill is None or skill.object not in self.expert.world.object_names():
            return None
        plan = self.expert.motion_plan(proposal.subtask)
        if skill.kind == "move":
            lost = self.tries[proposal.subtask] > MOVES_BEFORE_EDIT and not plan.startswith(STILL)
            return Edit(proposal.subtask, plan) if lost else None
        if skill.kind == "grasp":
            empty = OPENS in plan.lower() and OPENS not in (proposal.motion_plan or "").lower()
        else:
            empty = not self._holds(skill.object)
        return self._anew(skill.object) if empty else None

    def _anew(self, thing: str) -> Edit | None:
        """Back to the approach, in the words that the policy knows it by, with the expert's plan from here."""
        move = Skill("move", thing)
        subtask = next((known for known in self.tries if parse_subtask(known) == move), None)
        return None if subtask is None else Edit(subtask, self.expert.motion_plan(subtask))

    def _holds(self, thing: str) -> bool:
        """Whether the thing is between the fingers: fingers that closed wholly have its edge at most."""
        world = self.expert.world
        return world.grasped(thing) and world.gripper_fraction() > CLOSED


def trial(request: SimRequest, edited: bool) -> dict[str, Any]:
    """One episode: whether physics gave it the full score, what it had reached, and the edit, if there was one."""
    for _ in range(STARVED_AGAIN):
        result, editor = episode(request, edited)
        if result.outcome not in ("robot", "camera", "server"):
            break  # the twin's do not fail: a starved computer makes them look silent
    if result.exit_code not in (0, 3, 5):
        raise SystemExit(f"seed {request.choice.seed} ended as {result.outcome}: {result.message}")
    found = {"success": result.success, "outcome": result.outcome, "cycles": result.cycles}
    found |= {"subtasks": len(result.subtasks), "subtasks_done": result.subtasks_done}
    return {**found, "edit": editor.edit} if editor is not None else found


def episode(request: SimRequest, edited: bool) -> tuple[EpisodeResult, Editor | None]:
    bench = SimBench.open(request.choice, request.limits, realtime=False, simulated=True)
    editor = Editor(Expert(bench.world)) if edited else None
    try:
        asked = replace(request, confirm=editor)
        with tempfile.TemporaryDirectory() as folder:
            parts = make_policy(asked, bench.world), make_verifier(asked, bench)
            return run_parts(asked, bench, *parts, Path(folder) / "episode", SilentProgress()), editor
    finally:
        bench.close()


def request_for(suite_name: str, seed: int, connection: ServerConnection, verifier: str) -> SimRequest:
    """The evaluation's trial of one seed."""
    suite = SUITES[suite_name]
    choice = SceneChoice(suite_name, suite.scene(seed, "varied"), suite.scenario, suite, seed)
    return SimRequest(
        suite.instruction(seed), choice, verifiers=(verifier,), connection=connection, max_cycles=MAX_CYCLES,
        max_cycles_per_subtask=0, animate=False, limits={"max_answer_age_s": ANSWER_LIMIT_S},
    )  # fmt: skip


class Log:
    """Trials by seed and kind ("alone", "again", "edited"), one synced line each, from any thread; an interrupted
    run's are there."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self.trials = path, dict[tuple[int, str], dict[str, Any]]()
        self._writing = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        first, *lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()] or [None]
        if first is None:
            path.write_bytes(b"")
            self._append(about)
        elif first != about:
            raise SystemExit(f"{path} is of {first}, not of {about}: give another --out")
        else:
            os.truncate(path, data.rfind(b"\n") + 1)
        self.trials.update({(line["seed"], line["kind"]): line for line in lines})

    def trial(self, kind: str, request: SimRequest) -> dict[str, Any]:
        """That trial, run unless it is known."""
        seed = request.choice.seed
        if (seed, kind) not in self.trials:
            line = {"seed": seed, "kind": kind, **trial(request, kind == "edited"), "commit": current_commit()}
            self._append(line)
            self.trials[seed, kind] = line
        return self.trials[seed, kind]

    def _append(self, value: dict[str, Any]) -> None:
        with self._writing, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def judged(log: Log, request: SimRequest) -> dict[str, Any]:
    """One seed's trials by kind: alone, and when that failed again and edited."""
    found = {"alone": log.trial("alone", request)}
    if not found["alone"]["success"]:
        found |= {kind: log.trial(kind, request) for kind in ("again", "edited")}
    return found


def in_order(log: Log, requests: Iterator[SimRequest], workers: int) -> Iterator[dict[str, Any]]:
    """The seeds' trials, one seed after another, while ``workers`` run at once."""
    with ThreadPoolExecutor(workers, "trial") as pool:
        ahead = deque(pool.submit(judged, log, next(requests)) for _ in range(workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.append(pool.submit(judged, log, next(requests)))
        finally:
            for future in ahead:
                future.cancel()


def summary(about: dict[str, Any], seeds: int, failed: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures, with everything that they need beside them."""
    saved, again = (sum(line[kind]["success"] for line in failed) for kind in ("edited", "again"))
    return {
        **about, "seeds": [about["first_seed"], about["first_seed"] + seeds - 1],
        "alone": share(seeds - len(failed), seeds),
        "failed_with_one_edit": share(saved, len(failed)),
        "edits_made": sum(line["edited"]["edit"] is not None for line in failed),
        "failed_again_alone": share(again, len(failed)),
        "held": 2 * saved >= len(failed),
        "commits": sorted({str(line[kind]["commit"]) for line in failed for kind in ("alone", "again", "edited")}),
        "load_average": [round(value, 2) for value in os.getloadavg()], "machine": about_machine(), "failed": failed,
    }  # fmt: skip


def share(success: int, trials: int) -> dict[str, Any]:
    interval = wilson(success, trials)
    return {"trials": trials, "success": success, "wilson_95": [round(interval.low, 4), round(interval.high, 4)]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run until there are enough failures; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--suite", default="pick_carrot", choices=sorted(SUITES))
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--failures", type=int, default=50)
    parser.add_argument("--parallel", type=int, default=1, help="seeds at once; changes no trial")
    parser.add_argument("--verifier", default="twin", choices=("twin", "server"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    connection = ServerConnection(options.server)
    connection.wait_ready(60.0)
    facts = server_facts(connection, None)
    about = {"suite": options.suite, "verifier": options.verifier, "first_seed": options.seed, "max_cycles": MAX_CYCLES}
    about |= {name: facts[name] for name in ("model", "hash", "base_hash")}
    log = Log(options.out.with_suffix(".jsonl"), about)
    failed: list[dict[str, Any]] = []
    seeds = saved = 0
    requests = (request_for(options.suite, seed, connection, options.verifier) for seed in count(options.seed))
    for found in in_order(log, requests, options.parallel):
        seeds += 1
        if not found["alone"]["success"]:
            failed.append(found)
            saved += found["edited"]["success"]
        print(f"{seeds} seeds: {len(failed)} failed, {saved} of them saved", file=sys.stderr, flush=True)
        if len(failed) == options.failures:
            break
    connection.close()
    figures = summary(about, seeds, failed)
    options.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in figures.items() if key != "failed"}, ensure_ascii=False))
    return 0 if figures["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
