"""The sheet on paper: one box a trial, with the picture of its start and room for a pen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from vlm2vla_client.evaluation import page
from vlm2vla_client.evaluation.sheet import FAULTS, PAGE, Planned, stages_of
from vlm2vla_client.evaluation.starts import as_url
from vlm2vla_twin.tasks import SUITES

_PRINT = (
    "<style>.start{display:grid;grid-template-columns:220px 1fr;gap:14px;break-inside:avoid;margin:10px 0}"
    ".start td{height:30px;border:1px solid var(--line);text-align:left}.start th{text-align:left}"
    "@media print{body{background:#fff;color:#000}main{max-width:none;padding:0}h2{break-after:avoid}}</style>"
)


def write_sheet_page(folder: Path, lines: Sequence[Planned], picture: Callable[[str, int], bytes]) -> Path:
    """Writes ``sheet.html``.

    Args:
        picture: gives the JPEG of a start, by suite and seed.
    """
    suites = list(dict.fromkeys(line.suite for line in lines))
    parts = [
        _PRINT,
        "<h1>Trial sheet</h1>",
        page.note(f"{len(lines)} trials in {lines[-1].block} blocks. Run them in order. The letter is the policy's."),
        _legend(suites),
    ]
    for block, some in groupby(lines, key=lambda line: line.block):
        parts.append(f"<h2>Block {block}</h2>")
        parts += _starts(list(some), picture)
    return page.page(folder / PAGE, "Trial sheet", parts)


def _legend(suites: Sequence[str]) -> str:
    rows = [[SUITES[name].label, f"0 to {SUITES[name].max_score}", _keys(stages_of(name)),
             "yes / no" if SUITES[name].plan_counts else "leave empty"] for name in suites]  # fmt: skip
    return (
        "<h2>Scoring keys</h2>"
        + page.table(["task", "score", "reached: every letter that was seen, or -", "plan"], rows, words=True)
        + page.note(
            "Lifted: 5 cm, held for a second. Placed: at rest on or in the target and released, for a second. Plan: "
            "did the policy's words name the things that the task is about (D.3)? Fault, where something else ended "
            f"the trial: {', '.join(FAULTS)}. At most 12 cycles a trial."
        )
    )


def _keys(stages: Mapping[str, str]) -> str:
    return ", ".join(f"{letter} = {stage.replace('_', ' ')}" for letter, stage in stages.items())


def _starts(lines: Sequence[Planned], picture: Callable[[str, int], bytes]) -> Iterator[str]:
    for (suite, start, task), some in groupby(lines, key=lambda line: (line.suite, line.start, line.task)):
        letters = "  ".join(f"{letter} ☐" for letter in stages_of(suite))
        plan = "yes ☐  no ☐" if SUITES[suite].plan_counts else ""
        rows = [[str(line.trial), line.policy, letters, plan, "", "", ""] for line in some]
        caption = page.text(f"start {start}")
        table = page.table(["trial", "policy", "reached", "plan", "cycles", "fault", "notes"], rows)
        yield (
            f'<div class="start"><figure><img alt="{caption}" src="{as_url(picture(suite, start))}">'
            f"<figcaption>{caption}</figcaption></figure><div><h3>{page.text(task)}</h3>{table}</div></div>"
        )
