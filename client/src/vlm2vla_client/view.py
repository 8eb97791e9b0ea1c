"""An episode as one self-contained HTML page: pictures, words, rows, safety decisions, verdicts and the arm's path.

Everything that came from a model, a task or a file name is escaped; the page has no script and loads nothing.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from vlm2vla_client.errors import RecordingError
from vlm2vla_client.path_plot import path_svg
from vlm2vla_client.recorder import RecordedEpisode, read_episode

TEMPLATE = "view.html"
TURNS = ("roll rad", "pitch rad", "yaw rad")


def esc(value: object) -> str:
    """HTML-escaped text, quotes included."""
    return html.escape(str(value), quote=True)


def _image(path: Path, kind: str, caption: str) -> str:
    if not path.is_file():
        return f'<p class="soft">{esc(caption)}: the picture is missing.</p>'
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img alt="{esc(caption)}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{esc(caption)}</figcaption></figure>"
    )


def _badge(text: object, style: str) -> str:
    return f'<span class="badge {style}">{esc(text)}</span>'


def _facts(pairs: Sequence[tuple[str, object]]) -> str:
    cells = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in pairs if v not in (None, ""))
    return f'<dl class="facts">{cells}</dl>'


def _outcome(episode: RecordedEpisode) -> str:
    summary = episode.summary
    if summary is None:
        return _badge("not ended: the run was cut off", "bad")
    good = summary.get("exit_code") == 0
    return _badge(summary.get("outcome", "unknown"), "good" if good else "warn")


def _header(episode: RecordedEpisode) -> str:
    summary, config = episode.summary or {}, episode.header.get("config") or {}
    policy = episode.header.get("policy") or {}
    physics = summary.get("physics") or {}
    judged = ""
    if physics:
        word = "success" if physics.get("success") else "no success"
        judged = f"{word}, {physics.get('score')} of {physics.get('max_score')}"
    facts = _facts(
        [
            ("started", episode.header.get("started_utc")),
            ("policy", policy.get("name")),
            ("verifier", config.get("verifier")),
            ("robot, camera", f"{config.get('robot', '?')}, {config.get('camera', '?')}"),
            ("scene, seed", f"{config.get('scene', '-')}, {config.get('seed', '-')}"),
            ("scenario", config.get("scenario")),
            ("cycles", summary.get("cycles")),
            ("rows moved", summary.get("rows_executed")),
            ("seconds", summary.get("seconds")),
            ("judged by physics", judged),
            ("version", episode.header.get("version")),
        ]
    )
    message = f'<p class="soft">{esc(summary.get("message", ""))}</p>' if summary.get("message") else ""
    return f"<h1>{esc(episode.task or episode.folder.name)}</h1><p>{_outcome(episode)}</p>{message}{facts}"


def _subtasks(episode: RecordedEpisode) -> str:
    events = episode.of("subtasks")
    if not events:
        return ""
    done = int((episode.summary or {}).get("subtasks_done", 0))
    names = [str(name) for name in events[0].get("subtasks", [])]
    items = "".join(
        f'<li>{esc(name)} {_badge("done", "good") if number < done else ""}</li>' for number, name in enumerate(names)
    )
    return f'<div><h2>Subtasks</h2><div class="card"><ol>{items}</ol></div></div>'


def _decision(event: Mapping[str, Any]) -> str:
    verdict = str(event.get("verdict"))
    style = {"pass": "good", "clip": "warn"}.get(verdict, "bad")
    reasons = ", ".join(str(reason) for reason in event.get("reasons") or [])
    return f'<span class="{style}">{esc(verdict)}</span> <span class="soft">{esc(reasons)}</span>'


def _rows(events: Sequence[Mapping[str, Any]]) -> str:
    decided: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["event"] == "decision":
            decided.setdefault(int(event.get("index", -1)), []).append(event)
    lines, width = [], 0
    for event in events:
        if event["event"] != "row":
            continue
        index, row = int(event.get("index", -1)), event.get("row") or []
        width = max(width, len(row))
        cells = "".join(f"<td>{esc(value)}</td>" for value in row)
        mine = decided.get(index, [])
        worst = next((d for d in mine if d.get("verdict") != "pass"), mine[0] if mine else None)
        word = _decision(worst) if worst is not None else '<span class="soft">not executed</span>'
        lines.append(f"<tr><td>{index}</td>{cells}<td>{word}</td></tr>")
    if not lines:
        return ""
    names = ["row", "dx m", "dy m", "dz m", *(TURNS if width == 7 else ()), "gripper", "safety filter"]
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _verdict(event: Mapping[str, Any]) -> str:
    good = event.get("success") is True
    words = _badge("done" if good else "not yet", "good" if good else "warn")
    seconds = event.get("cycle_seconds")
    took = f' <span class="soft">{float(seconds):.1f} s</span>' if isinstance(seconds, int | float) else ""
    return f"<p>{words} {esc(event.get('confidence'))}: {esc(event.get('reasoning'))}{took}</p>"


def _notes(events: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for event in events:
        if event["event"] == "error":
            parts.append(f'<p class="bad">{esc(event.get("where"))}: {esc(event.get("message"))}</p>')
        elif event["event"] in ("hold", "dropped"):
            parts.append(f'<p class="warn">{esc(event["event"])}: {esc(event.get("reason"))}</p>')
        elif event["event"] == "forecast" and event.get("forbidden"):
            met = "; ".join(f"{t.get('link')} and {t.get('thing')}" for t in event.get("touches") or [])
            parts.append(f'<p class="bad">the twin foresaw: {esc(met or event.get("reason"))}</p>')
        elif event["event"] == "correction":
            words = event["motion_plan"]["to"] or event["subtask"]["to"]
            parts.append(f'<p class="warn">the operator, instead: {esc(words)}</p>')
    return "".join(parts)


def _raw(events: Sequence[Mapping[str, Any]]) -> str:
    texts = [str((event.get("answer") or {}).get("raw_text", "")) for event in events if event["event"] == "answer"]
    body = "".join(f"<pre>{esc(text)}</pre>" for text in texts if text)
    return f"<details><summary>the model's own text</summary>{body}</details>" if body else ""


def _cycle(episode: RecordedEpisode, number: int, events: Sequence[Mapping[str, Any]]) -> str:
    request = next((e for e in events if e["event"] == "request"), {})
    verdicts = [e for e in events if e["event"] == "verdict"]
    plan = next((e.get("motion_plan") for e in events if e["event"] == "plan"), None)
    picture = ""
    if isinstance(request.get("frame"), int):
        picture = _image(episode.frame_path(request["frame"]), "jpeg", "what the policy saw")
    if verdicts and isinstance(verdicts[-1].get("after"), int):
        picture += _image(episode.frame_path(verdicts[-1]["after"]), "jpeg", "what the verifier saw after")
    head = (
        f'<div class="head"><h3>Cycle {number}</h3><span>{esc(request.get("subtask", ""))}</span>'
        f'<span class="soft">subtask {esc(int(request.get("subtask_index", 0)) + 1)}</span></div>'
    )
    words = f'<p class="plan">{esc(plan)}</p>' if plan else ""
    right = words + _rows(events) + "".join(_verdict(event) for event in verdicts) + _notes(events) + _raw(events)
    left = f'<div class="pictures">{picture}</div>'
    return f'<section class="card">{head}<div class="two">{left}<div>{right}</div></div></section>'


def _cycles(episode: RecordedEpisode) -> str:
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for event in episode.events:
        if isinstance(event.get("cycle"), int):
            groups.setdefault(int(event["cycle"]), []).append(event)
    return "<h2>Cycles</h2>" + "".join(_cycle(episode, number, events) for number, events in sorted(groups.items()))


def render(episode: RecordedEpisode) -> str:
    """The page for one episode."""
    animation = episode.folder / "episode.gif"
    top = _image(animation, "gif", "the episode") if animation.is_file() else ""
    plot = f"<figure>{path_svg(episode)}<figcaption>the end effector's path from above, cm</figcaption></figure>"
    body = (
        _header(episode)
        + f'<div class="card two">{top}{plot}</div>'
        + _subtasks(episode)
        + _cycles(episode)
        + _loose_notes(episode)
    )
    page = Template(files("vlm2vla_client").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return page.substitute(title=esc(f"{episode.task or episode.folder.name} - VLM2VLA episode"), body=body)


def _loose_notes(episode: RecordedEpisode) -> str:
    notes = _notes([event for event in episode.events if not isinstance(event.get("cycle"), int)])
    torn = '<p class="warn">The last line of the recording was torn and left out.</p>' if episode.truncated else ""
    return f"<h2>Other events</h2>{notes}{torn}" if notes or torn else ""


def write_view(folder: Path, target: Path | None = None) -> Path:
    """Writes ``view.html`` into the episode's folder (or ``target``) and returns its path.

    Raises:
        RecordingError: the folder is not an episode, or the page cannot be written.
    """
    page = render(read_episode(folder))
    path = target or folder / "view.html"
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecordingError(f"{path} cannot be written: {error.strerror}; give --out FILE") from None
    return path
