"""`audit`: one self-contained HTML page of sampled episodes on which a person accepts or rejects annotations.

Frames, words, path and findings of each episode; decisions are kept in the browser and saved as a JSON file, which
`curate --decisions` uses. The page loads nothing from anywhere.
"""

from __future__ import annotations

import argparse
import html
import json
import time
from importlib import resources
from typing import Any

import numpy as np

from vlm2vla_schema.images import decode_image, encode_jpeg, to_base64
from vlm2vla_training.annotation.base import AnnotatedEpisode, AnnotatedStep
from vlm2vla_training.annotation.files import read_annotated
from vlm2vla_training.curation.decisions import FORMAT, content_hash
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.path_plot import path_svg, step_colour
from vlm2vla_training.progress import finish, track

PAGE_FILE = "audit.html"
_FRAME_WIDTH, _FRAME_HEIGHT = 200, 150


def run_audit(args: argparse.Namespace) -> int:
    """`audit`: write the page."""
    started = time.monotonic()
    dataset = EpisodeDataset(args.episodes)
    annotated = read_annotated(args.annotated)
    chosen = sample(annotated, args.sample, args.seed, args.key)
    if args.dry_run:
        print(f"audit: would show {len(chosen)} of {len(annotated)} annotated episodes in {args.out / PAGE_FILE}")
        return 0
    wanted = set(chosen)
    skip = frozenset(dataset.keys()) - wanted
    articles: dict[str, str] = {}
    for episode in track(dataset.episodes(skip), len(chosen), "audit"):
        articles[episode.key] = article(episode, annotated[episode.key])
    missing = sorted(wanted - set(articles))
    if missing:
        raise DataError(f"{args.episodes} lacks {len(missing)} annotated episodes, for example {missing[0]}")
    args.out.mkdir(parents=True, exist_ok=True)
    text = page([articles[key] for key in chosen], len(annotated), _quarantined(annotated.values()))
    (args.out / PAGE_FILE).write_text(text, encoding="utf-8")
    summary = {"shown": chosen, "annotated": len(annotated), "quarantined": _quarantined(annotated.values())}
    finish("audit", args.out, summary, started, f"{len(chosen)} of {len(annotated)} episodes on {PAGE_FILE}")
    return 0


def sample(annotated: dict[str, AnnotatedEpisode], size: int, seed: int, wanted: list[str]) -> list[str]:
    """Choose what to show: the keys asked for, then up to half of the page quarantined and flagged episodes, then
    others at random; the same seed chooses the same.

    Raises:
        UsageError: a key asked for is not annotated, or `size` is below 1.
    """
    unknown = [key for key in wanted if key not in annotated]
    if unknown or size < 1:
        raise UsageError(f"--sample {size}, --key {unknown}: expected at least 1 and keys that are annotated")
    random = np.random.default_rng(seed)
    order = [str(key) for key in random.permutation(sorted(annotated))] if annotated else []
    order.sort(key=lambda key: _rank(annotated[key]))
    flagged = [key for key in order if _rank(annotated[key]) < 2]
    half = flagged[: max(size // 2, size - (len(order) - len(flagged)))]
    rest = [key for key in order if key not in set(flagged)]
    return list(dict.fromkeys([*wanted, *half, *rest]))[: max(size, len(wanted))]


def _rank(episode: AnnotatedEpisode) -> int:
    return 0 if episode.audit.get("quarantine") else 1 if episode.audit.get("findings") else 2


def _quarantined(episodes: Any) -> int:
    return sum(bool(episode.audit.get("quarantine")) for episode in episodes)


def page(articles: list[str], annotated: int, quarantined: int) -> str:
    """Put the episodes into the template."""
    template = resources.files("vlm2vla_training").joinpath("audit_page.html").read_text(encoding="utf-8")
    intro = f"{len(articles)} of {annotated} annotated episodes are shown; {quarantined} of all are quarantined."
    return (
        template.replace("<!--INTRO-->", html.escape(intro))
        .replace("/*FORMAT*/", json.dumps(FORMAT))
        .replace("<!--EPISODES-->", "\n".join(articles))
    )


def article(episode: Episode, annotated: AnnotatedEpisode) -> str:
    """One episode as HTML: frames and words of each step, path, findings, and the two choices."""
    key, text = html.escape(annotated.episode_key, quote=True), html.escape(annotated.instruction)
    reason = annotated.audit.get("quarantine")
    steps = "".join(_step(episode, annotated, index) for index in range(len(annotated.steps)))
    whole = "".join(_finding(one) for one in annotated.audit.get("findings", []) if one["step"] is None)
    notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in annotated.audit.get("notes", []))
    chip = '<span class="chip bad">quarantined</span>' if reason else ""
    facts = f"{len(episode)} rows, {html.escape(episode.source)}, {html.escape(annotated.annotator)}"
    return f"""<article data-key="{key}" data-content="{content_hash(annotated)}">
<header><h2>{text or "<i>no instruction</i>"}</h2>{chip}<p class="facts">{key} &middot; {facts}</p></header>
<div class="body"><div class="path">{path_svg(episode, annotated.steps)}</div><ol class="steps">{steps}</ol></div>
<ul class="findings">{whole}{notes}</ul>
<footer><label><input type="radio" value="accept"> accept</label>
<label><input type="radio" value="reject"> reject</label>
<label><input type="radio" value=""> undecided</label><input class="note" placeholder="note" maxlength="500"></footer>
</article>"""


def _step(episode: Episode, annotated: AnnotatedEpisode, index: int) -> str:
    step = annotated.steps[index]
    findings = "".join(_finding(one) for one in annotated.audit.get("findings", []) if one["step"] == index)
    return (
        f'<li style="border-color:{step_colour(index)}"><div class="frames">{_frames(episode, step)}</div><div>'
        f"<h3>{html.escape(step.step_description)}</h3><p class='range'>rows {step.first} to {step.last}</p>"
        f"<p>{html.escape(step.main_movements)}</p><p class='why'>{html.escape(step.reasoning)}</p>"
        f"<p class='range'>{_sums(step)}</p><ul class='findings'>{findings}</ul></div></li>"
    )


def _sums(step: AnnotatedStep) -> str:
    sums = np.asarray(step.actions, dtype=np.float64).reshape(-1, 4)[:, :3].sum(axis=0) * 100
    return "log: " + ", ".join(f"{axis} {value:+.1f} cm" for axis, value in zip("xyz", sums, strict=True))


def _finding(finding: dict[str, Any]) -> str:
    kind = "bad" if finding["grave"] else "mild"
    return f'<li class="{kind}">{html.escape(finding["check"])}: {html.escape(finding["detail"])}</li>'


def _frames(episode: Episode, step: AnnotatedStep) -> str:
    """First and last frame of a step as data URLs; broken ranges may name rows that are not there."""
    places = [number - episode.first_step for number in dict.fromkeys((step.first, step.last))]
    shown = [place for place in places if 0 <= place < len(episode.images)]
    return "".join(
        f'<img src="{thumbnail(episode.images[place])}" alt="row {place + episode.first_step}">' for place in shown
    )


def thumbnail(data: bytes) -> str:
    """An encoded frame as a JPEG data URL of at most 200x150 pixels."""
    return "data:image/jpeg;base64," + to_base64(encode_jpeg(decode_image(data), _FRAME_WIDTH, _FRAME_HEIGHT))
