"""How many failed trials does one edit in words save?

    vlm2vla-server serve --twin --port 8000 &
    python bench/edit_recovery.py --server http://localhost:8000 --suite pick_carrot --seed 1000000 --failures 50 \
        --out bench/results/edit_recovery.json

Each seed is first run by the policy alone. One that fails (no full score by physics) is run again with an operator
who, once a trial, gives other words, one of the two that `--confirm` takes: from the third try of a subtask on, the
motion plan becomes what the scripted expert says of the moment, where that differs from what the policy said; or, when
a subtask needs the thing in the gripper and it is not there, the subtask becomes the earlier one that goes to it. Only
these words come from the expert: the rows are the model's.
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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm2vla_client.confirm import Edit, Proposal
from vlm2vla_client.episode import EpisodeResult
from vlm2vla_client.evaluation.run import server_facts
from vlm2vla_client.evaluation.statistics import wilson
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.machine import about_machine, current_commit
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.scenes import SceneChoice
from vlm2vla_client.sim import SimBench, SimRequest, make_policy, make_verifier, run_parts
from vlm2vla_twin.expert import Expert, UnknownTaskError
from vlm2vla_twin.skills import parse_subtask
from vlm2vla_twin.tasks import SUITES
from vlm2vla_twin.truth import is_held

TRIES_BEFORE_EDIT = 2
MAX_CYCLES = 12
STARVED_AGAIN = 3


@dataclass
class Editor:
    """Lets every chunk pass but one."""

    expert: Expert
    tries: dict[str, int] = field(default_factory=dict)
    edit: dict[str, Any] | None = None

    def __call__(self, proposal: Proposal) -> bool | Edit:
        subtask = proposal.subtask
        self.tries[subtask] = self.tries.get(subtask, 0) + 1
        if self.edit is not None or self.tries[subtask] <= TRIES_BEFORE_EDIT:
            return True
        words = self._words(subtask)
        if words is None or (words.subtask, words.motion_plan) == (subtask, proposal.motion_plan):
            return True
        said = {"subtask": subtask, "motion_plan": proposal.motion_plan}
        self.edit = {"from": said, "to": {"subtask": words.subtask, "motion_plan": words.motion_plan}}
        return words

    def _words(self, subtask: str) -> Edit | None:
        """What the expert would say now; None when it does not understand the subtask."""
        skill = parse_subtask(subtask)
        if skill is not None and skill.kind not in ("move", "grasp") and not self._holds(skill.object):
            for earlier in reversed(self.tries):
                before = parse_subtask(earlier)
                if before is not None and (before.kind, before.object) == ("move", skill.object):
                    return Edit(earlier)
        try:
            return Edit(subtask, self.expert.motion_plan(subtask))
        except UnknownTaskError:
            return None

    def _holds(self, name: str) -> bool:
        return name in self.expert.world.object_names() and is_held(self.expert.world, name)


def trial(request: SimRequest, edited: bool) -> dict[str, Any]:
    """One episode: whether physics gave it the full score, what it had reached, and the edit, if there was one."""
    for _ in range(STARVED_AGAIN):
        result, editor = episode(request, edited)
        if result.outcome not in ("robot", "camera"):
            break  # the twin's do not fail; a starved computer makes their states too old to move on
    if result.exit_code not in (0, 3, 5):
        raise SystemExit(f"seed {request.choice.seed} ended as {result.outcome}: {result.message}")
    found = {"success": result.success, "outcome": result.outcome, "cycles": result.cycles}
    found |= {"subtasks": len(result.subtasks), "subtasks_done": result.subtasks_done}
    return {**found, "edit": editor.edit} if editor is not None else found


def episode(request: SimRequest, edited: bool) -> tuple[EpisodeResult, Editor | None]:
    bench = SimBench.open(request.choice, request.limits, realtime=False)
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
        max_cycles_per_subtask=0, animate=False,
    )  # fmt: skip


def one_seed(suite_name: str, seed: int, connection: ServerConnection, verifier: str) -> dict[str, Any]:
    """The seed alone, and when that failed again alone and with an operator."""
    request = request_for(suite_name, seed, connection, verifier)
    line: dict[str, Any] = {"seed": seed, "alone": trial(request, edited=False)}
    if not line["alone"]["success"]:
        line |= {"again": trial(request, edited=False), "edited": trial(request, edited=True)}
    return line


def read_lines(log: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """What an interrupted run has done already; its first line says of what."""
    if not log.is_file():
        append(log, about)
        return []
    data = log.read_bytes()
    os.truncate(log, data.rfind(b"\n") + 1)
    first, *lines = [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
    if first != about:
        raise SystemExit(f"{log} is of {first}, not of {about}: give another --out or delete it")
    return lines


def append(log: Path, value: dict[str, Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def summary(about: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures, with everything that they need beside them."""
    failed = [line for line in lines if "edited" in line]
    saved, again = (sum(line[name]["success"] for line in failed) for name in ("edited", "again"))
    edits = sum(line["edited"]["edit"] is not None for line in failed)
    return {
        "commit": current_commit(), **about, "seeds": [lines[0]["seed"], lines[-1]["seed"]],
        "alone": share(len(lines) - len(failed), len(lines)),
        "failed_with_one_edit": share(saved, len(failed)), "edits_made": edits,
        "failed_again_alone": share(again, len(failed)),
        "held": 2 * saved >= len(failed), "load_average": [round(value, 2) for value in os.getloadavg()],
        "machine": about_machine(), "trials": failed,
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
    parser.add_argument("--verifier", default="twin", choices=("twin", "server"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    connection = ServerConnection(options.server)
    connection.wait_ready(60.0)
    facts = server_facts(connection, None)
    about = {"suite": options.suite, "verifier": options.verifier, "first_seed": options.seed, "max_cycles": MAX_CYCLES}
    about |= {name: facts[name] for name in ("model", "hash", "base_hash")}
    log = options.out.with_suffix(".jsonl")
    lines = read_lines(log, about)
    while sum("edited" in line for line in lines) < options.failures:
        lines.append(one_seed(options.suite, options.seed + len(lines), connection, options.verifier))
        append(log, lines[-1])
        failed = [line for line in lines if "edited" in line]
        print(f"seed {lines[-1]['seed']}: {len(failed)} of {len(lines)} failed, "
              f"{sum(line['edited']['success'] for line in failed)} of them saved", file=sys.stderr, flush=True)
    connection.close()
    figures = summary(about, lines)
    options.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in figures.items() if key != "trials"}, ensure_ascii=False))
    return 0 if figures["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
