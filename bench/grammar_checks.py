"""The grammars against the real xgrammar and the server's transformers engine, in this process.

    python bench/grammar_checks.py --model models/twin/base --adapter twin=models/twin/adapter \
        --examples EXAMPLES --frames 300 --random 1000 --out bench/results/grammar_checks.json

--examples: a folder written by `vlm2vla-train curate`. Every completion with a grammar (actions, subtasks, verify) must
    be accepted byte for byte and parse.
--frames N: N actions prompts of these examples, evenly spread, with their pictures. Greedy rows with the grammar must
    be greedy rows without it, on 99 % of the frames where the latter parse.
--random N: N generations a grammar by a model with random weights, at temperature 1 and top_p 1. All actions must
    parse, and every other text that ended by itself.

Prints one JSON object, writes it to --out, and exits 1 when a must is missed (`missed` says which), 2 on arguments
that cannot work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests" / "server"))

from grammar_probe import Acceptor, Frame, acceptance, agreement, probe_stages, random_generations

from vlm2vla_schema.images import decode_image, to_model_square
from vlm2vla_schema.types import ModelCard, ModelCardError
from vlm2vla_server.engines.hf_model import ModelOptions
from vlm2vla_server.engines.transformers_engine import TransformersEngine
from vlm2vla_server.errors import ConfigurationError

MIN_EQUAL_SHARE = 0.99
GRAMMAR_OF_KIND = {"actions": "actions", "subtasks": "subtasks", "verify": "verdict"}
PREFIX_CACHE_ENTRIES = 16
WRITE_DEADLINE_S = 300.0
PROGRESS_EVERY_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit code."""
    options = parse_arguments(argv)
    started_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            figures = asyncio.run(measure(options, Path(scratch)))
    except (ConfigurationError, ModelCardError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    missed = missed_musts(figures)
    report = {**about(), **figures, "seconds": round(time.monotonic() - started_s, 1), "missed": missed}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 1 if missed else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked against one another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="base for --frames; its tokenizer and card also serve --examples")
    add("--adapter", help="NAME=PATH on that base")
    add("--examples", type=Path, help="folder written by `vlm2vla-train curate`")
    add("--frames", type=int, default=0, metavar="N")
    add("--random", type=int, default=0, metavar="N")
    add("--random-model", type=Path, help="base with random weights; made in a temporary folder when left out")
    add("--seed", type=int, default=0, help="of the first random generation, and of the random weights made here")
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="file for the figures")
    options = parser.parse_args(argv)
    if options.examples is None and not options.random:
        parser.error("nothing to do: give --examples, --random or both")
    if options.frames and (options.examples is None or options.model is None):
        parser.error("--frames needs --examples and --model")
    if options.adapter is not None and (options.model is None or "=" not in options.adapter):
        parser.error("--adapter needs --model, and NAME=PATH")
    if min(options.frames, options.random, options.seed) < 0 or options.threads < 1:
        parser.error("--frames, --random and --seed must be at least 0, --threads at least 1")
    return options


async def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every figure asked for."""
    figures: dict[str, Any] = {}
    if options.examples is not None:
        model = options.model or random_model(options, scratch)
        figures["examples"] = check_examples(options.examples, model, served_card(options, model))
    if options.frames:
        figures["greedy"] = await check_greedy(options)
    if options.random:
        figures["random"] = await check_random(options, random_model(options, scratch))
    return figures


def random_model(options: argparse.Namespace, scratch: Path) -> Path:
    """--random-model, or a new base with random weights: written by another process, as training and serving never
    meet in one."""
    if options.random_model is not None:
        return Path(options.random_model)
    base = scratch / "base"
    if not base.exists():
        wanted = ["pretrain", "--random", "--seed", str(options.seed), "--out", str(scratch)]
        command = [sys.executable, "-m", "vlm2vla_training.cli", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WRITE_DEADLINE_S)
        if done.returncode != 0:
            raise ConfigurationError(f"no base with random weights could be written: {done.stderr.strip()}")
    return base


def adapter_of(options: argparse.Namespace) -> tuple[str, Path] | None:
    """--adapter as (name, folder)."""
    if options.adapter is None:
        return None
    name, _, path = str(options.adapter).partition("=")
    return name, Path(path)


def served_card(options: argparse.Namespace, model: Path) -> ModelCard:
    """The card whose grammar counts: the adapter's, else the base's."""
    adapter = adapter_of(options)
    return ModelCard.read(adapter[1] if adapter else model)


def check_examples(folder: Path, model: Path, card: ModelCard) -> dict[str, Any]:
    """The completions of every kind with a grammar."""
    texts: dict[str, list[str]] = {kind: [] for kind in GRAMMAR_OF_KIND}
    for part in parts_of(folder):
        for row in pq.read_table(part, columns=["kind", "completion"]).to_pylist():
            if row["kind"] in texts:
                texts[row["kind"]].append(row["completion"])
    acceptor, stages = Acceptor(model), probe_stages(card)
    return {kind: acceptance(acceptor, stages[GRAMMAR_OF_KIND[kind]], found) for kind, found in texts.items() if found}


def parts_of(folder: Path) -> list[Path]:
    """The Parquet files of a folder of examples. Raises FileNotFoundError when there is none."""
    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"{folder} holds no part-*.parquet; expected the output of vlm2vla-train curate")
    return parts


def actions_frames(folder: Path, count: int, size_px: int) -> list[Frame]:
    """`count` actions examples, evenly spread over the folder (all, when there are fewer)."""
    parts = parts_of(folder)
    actions = [("kind", "==", "actions")]
    rows = [pq.read_table(part, columns=["kind"], filters=actions).num_rows for part in parts]
    total = sum(rows)
    count = min(count, total)
    wanted = [number * total // count for number in range(count)]
    frames, before = [], 0
    for part, here in zip(parts, rows, strict=True):
        places = [number - before for number in wanted if before <= number < before + here]
        before += here
        if places:
            table = pq.read_table(part, columns=["images", "prompt", "episode_key", "first"], filters=actions)
            frames += [_frame(row, size_px) for row in table.take(places).to_pylist()]
    return frames


def _frame(row: dict[str, Any], size_px: int) -> Frame:
    rgb = decode_image(row["images"][0])
    square = rgb if rgb.shape[:2] == (size_px, size_px) else to_model_square(rgb, size_px)
    return Frame(f"{row['episode_key']}#{row['first']}", square, row["prompt"])


async def check_greedy(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy rows with and without the grammar."""
    adapter, card = adapter_of(options), served_card(options, options.model)
    frames = actions_frames(options.examples, options.frames, card.image_size)
    async with started(options.model, adapter, options.threads) as (engine, facts):
        name = adapter[0] if adapter else None
        found = await agreement(engine, frames, card, name, progress("frames", len(frames)))
    return {"asked": options.frames, "card": card.name, **facts, **found}


async def check_random(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Constrained generations by random weights, a grammar after the other."""
    card = ModelCard.read(model)
    figures: dict[str, Any] = {}
    async with started(model, None, options.threads) as (engine, facts):
        figures |= {"first_seed": options.seed, "temperature": 1.0, "top_p": 1.0, **facts}
        for name in GRAMMAR_OF_KIND.values():
            tell = progress(f"random {name}", options.random)
            figures[name] = await random_generations(engine, name, card, options.random, options.seed, tell)
    return figures


@asynccontextmanager
async def started(
    model: Path, adapter: tuple[str, Path] | None, threads: int
) -> AsyncIterator[tuple[TransformersEngine, dict[str, Any]]]:
    """The engine as the server starts it, and what it is. Raises EngineStartError, also for an adapter that does not
    fit its base."""
    adapters = (adapter,) if adapter else ()
    engine = TransformersEngine(
        ModelOptions(model, adapters, threads=threads, prefix_cache_entries=PREFIX_CACHE_ENTRIES)
    )
    try:
        await engine.start()
        info = engine.info()
        for load in info.adapters:
            if load.problem is not None:
                raise ConfigurationError(f"adapter {load.name}: {load.problem}")
        yield (
            engine,
            {
                "model_hash": info.model_hash,
                "adapter_hash": info.adapters[0].hash if info.adapters else None,
                "device": f"{info.device} {info.dtype}",
                "versions": info.versions,
            },
        )
    finally:
        await engine.close()


def missed_musts(figures: dict[str, Any]) -> list[str]:
    """The musts that the figures miss, in words."""
    missed = []
    examples, greedy, random = (figures.get(part) for part in ("examples", "greedy", "random"))
    if examples is not None and "actions" not in examples:
        missed.append("examples: there is no actions completion")
    for kind, found in (examples or {}).items():
        for what in ("accepted", "parsed"):
            if found[what] != found["completions"]:
                missed.append(f"examples: {found[what]} of {found['completions']} {kind} completions are {what}")
    if greedy is not None and greedy["share"] is None:
        missed.append("greedy: no text without the grammar parses, so there is nothing to compare")
    elif greedy is not None and greedy["share"] < MIN_EQUAL_SHARE:
        missed.append(f"greedy: {greedy['equal']} of {greedy['parseable']} texts are equal, below {MIN_EQUAL_SHARE}")
    if random is not None:
        actions = random["actions"]
        if actions["parsed"] != actions["generations"]:
            missed.append(f"random: {actions['parsed']} of {actions['generations']} actions parse")
        for name in ("subtasks", "verdict"):
            if random[name]["refused"]:
                missed.append(f"random: {random[name]['refused']} whole texts of {name} do not parse")
    return missed


def about() -> dict[str, Any]:
    """Commit, date and machine of a run; `+` marks tracked files that differ from the commit."""
    command = ["git", "describe", "--always", "--abbrev=8", "--exclude=*", "--dirty=+"]
    try:
        commit = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=30).stdout.strip()
    except OSError:
        commit = ""
    return {"commit": commit or None, "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": platform.machine()}


def progress(what: str, total: int) -> Callable[[int], None]:
    """A line on standard error every few seconds."""
    last_s = time.monotonic()

    def tell(number: int) -> None:
        nonlocal last_s
        if number == total or time.monotonic() - last_s >= PROGRESS_EVERY_S:
            last_s = time.monotonic()
            print(f"{what}: {number} of {total}", file=sys.stderr, flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main())
