"""How many failed trials does one edit in words save?

    vlm2vla-server serve --twin --port 8000 &
    python bench/edit_recovery.py --server http://localhost:8000 --suite pick_carrot --seed 1000000 --failures 50 \
        --out bench/results/edit_recovery.json

Each seed is first run by the policy alone. One that fails (no full score by physics) is run again with an operator
who, once a trial, gives other words: when a subtask is tried for the third time, the motion plan becomes what the
scripted expert says of the moment. Only these words come from the expert: the rows are the model's, by /actions.
Beside it, as a control, the same seed once more with nobody's help.
Must: at least half of the failed trials reach full score.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm2vla_client.confirm import Edit, Proposal
from vlm2vla_client.evaluation.statistics import wilson
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.scenes import SceneChoice
from vlm2vla_client.sim import SimBench, SimRequest, make_policy, make_verifier, run_parts
from vlm2vla_twin.expert import Expert, UnknownTaskError
from vlm2vla_twin.tasks import SUITES

CHECKOUT = Path(__file__).resolve().parents[1]
TRIES_BEFORE_EDIT = 2
MAX_CYCLES = 12


@dataclass
class Editor:
    """Lets every chunk pass but one: the first of the third try of a subtask gets the expert's words."""

    expert: Expert
    tries: dict[str, int] = field(default_factory=dict)
    edit: dict[str, str | None] | None = None

    def __call__(self, proposal: Proposal) -> bool | Edit:
        subtask = proposal.subtask
        self.tries[subtask] = self.tries.get(subtask, 0) + 1
        if self.edit is not None or self.tries[subtask] <= TRIES_BEFORE_EDIT:
            return True
        try:
            words = self.expert.motion_plan(subtask)
        except UnknownTaskError:
            return True
        self.edit = {"subtask": subtask, "from": proposal.motion_plan, "to": words}
        return Edit(subtask, words)


def trial(request: SimRequest, edited: bool) -> tuple[bool, Editor | None]:
    """One episode; whether physics gave it the full score."""
    bench = SimBench.open(request.choice, request.limits, realtime=False)
    editor = Editor(Expert(bench.world)) if edited else None
    try:
        asked = replace(request, confirm=editor)
        with tempfile.TemporaryDirectory() as folder:
            parts = make_policy(asked, bench.world), make_verifier(asked, bench)
            result = run_parts(asked, bench, *parts, Path(folder) / "episode", SilentProgress())
    finally:
        bench.close()
    return result.success, editor


def request_for(suite_name: str, seed: int, connection: ServerConnection, verifier: str) -> SimRequest:
    """The evaluation's trial of one seed."""
    suite = SUITES[suite_name]
    choice = SceneChoice(suite_name, suite.scene(seed, "varied"), suite.scenario, suite, seed)
    return SimRequest(
        suite.instruction(seed), choice, verifiers=(verifier,), connection=connection, max_cycles=MAX_CYCLES,
        max_cycles_per_subtask=0, animate=False,
    )  # fmt: skip


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
    lines: list[dict[str, Any]] = []
    seed, alone = options.seed, 0
    while len(lines) < options.failures:
        request = request_for(options.suite, seed, connection, options.verifier)
        if trial(request, edited=False)[0]:
            alone += 1
        else:
            again, _ = trial(request, edited=False)
            success, editor = trial(request, edited=True)
            edit = editor.edit if editor is not None else None
            lines.append({"seed": seed, "success": success, "again_alone": again, "edit": edit})
            print(json.dumps(lines[-1], ensure_ascii=False), file=sys.stderr, flush=True)
        seed += 1
    connection.close()
    saved = sum(line["success"] for line in lines)
    interval = wilson(saved, len(lines))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    figures = {
        "commit": commit.stdout.strip(), "suite": options.suite, "verifier": options.verifier,
        "seeds": [options.seed, seed - 1], "alone": {"trials": seed - options.seed, "success": alone},
        "failed_with_one_edit": {"trials": len(lines), "success": saved, "wilson_95": [interval.low, interval.high]},
        "failed_again_alone": {"trials": len(lines), "success": sum(line["again_alone"] for line in lines)},
        "held": 2 * saved >= len(lines), "trials": lines,
    }  # fmt: skip
    options.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in figures.items() if key != "trials"}, ensure_ascii=False))
    return 0 if figures["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
