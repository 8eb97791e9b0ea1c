"""`pretrain`: stills of the twin -> its base model, trained from nothing. torch is imported only where it is needed.

Folder layout: ``STILLS/train`` and ``STILLS/dev`` hold the pictures, ``OUT/state.pt`` and ``OUT/settings.json`` what a
run needs to go on, ``OUT/log.jsonl`` the losses, ``OUT/base`` the model, ``OUT/summary.json`` the result.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm2vla_training.errors import UsageError
from vlm2vla_training.jsonio import read_json, write_json
from vlm2vla_training.pretrain_settings import Settings
from vlm2vla_training.progress import finish, track

HELD_OUT_SEED = 500_000
"""Seeds from here on are never trained on; scenes of evaluation lie there too."""
SHARD, HELD_OUT_SHARD = 1000, 300


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `pretrain`; numbers that shape the run default to :class:`Settings`."""
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="vlm2vla-train pretrain",
        description="Train the twin's base model from nothing, on pictures of the twin and questions about them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; an unfinished run in it is resumed")
    add("--stills", type=Path, default=None, help="folder of the pictures, train/ and dev/ in it; None: OUT/stills")
    add(
        "--render",
        type=int,
        default=0,
        metavar="N",
        help="render that many stills first, of seeds 0..N-1; kept ones stay",
    )
    add("--held-out", type=int, default=600, help=f"with --render: held-out stills, of seeds from {HELD_OUT_SEED}")
    add("--workers", type=int, default=1, help="processes that render")
    add("--tower-steps", type=int, default=usual.tower_steps, help="steps of the vision tower alone")
    add("--steps", type=int, default=usual.steps, help="steps of the whole model, after those")
    add("--batch", type=int, default=usual.batch, help="conversations a step")
    add("--tower-batch", type=int, default=usual.tower_batch, help="pictures a step of the tower alone")
    add("--turns", type=int, default=usual.turns, help="questions a conversation")
    add("--seed", type=int, default=usual.seed, help="of weights and batches")
    add("--threads", type=int, default=usual.threads, help="CPU threads of training")
    add("--compile", action="store_true", help="fuse the layers: a third less time a step; needs a C++ compiler")
    add("--random", action="store_true", help="write the base with random weights and train nothing")
    add("--dry-run", action="store_true", help="say what would be done and write nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pretrain`.

    Returns:
        0 when done.

    Raises:
        UsageError: the arguments are out of range or differ from those of the run to be resumed.
        DataError: there are no stills.
    """
    args = build_parser().parse_args(argv)
    settings = settings_from(args)
    stills = args.stills or args.out / "stills"
    if args.dry_run:
        print(_intention(args, settings, stills))
        return 0
    started = time.monotonic()
    return _write_random(args, started) if args.random else _train(args, settings, stills, started)


def settings_from(args: argparse.Namespace) -> Settings:
    """The run's settings.

    Raises:
        UsageError: a count is out of range.
    """
    for name, least in (
        ("render", 0), ("held_out", 1), ("workers", 1), ("tower_steps", 0), ("steps", 1), ("batch", 1),
        ("tower_batch", 1), ("turns", 1), ("threads", 1), ("seed", 0),
    ):  # fmt: skip
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.render > HELD_OUT_SEED:
        raise UsageError(f"--render {args.render} would reach the held-out seeds, which begin at {HELD_OUT_SEED}")
    return Settings(
        tower_steps=args.tower_steps,
        tower_batch=args.tower_batch,
        steps=args.steps,
        batch=args.batch,
        turns=args.turns,
        seed=args.seed,
        threads=args.threads,
        compile=args.compile,
    )


def render_stills(folder: Path, count: int, held_out: int, workers: int) -> None:
    """Render training and held-out stills into ``folder/train`` and ``folder/dev``; whole shards there are kept."""
    from vlm2vla_training import pretrain_data

    for name, first, number, shard in (
        ("train", 0, count, SHARD),
        ("dev", HELD_OUT_SEED, held_out, HELD_OUT_SHARD),
    ):
        shards = pretrain_data.render(folder / name, first, number, workers, shard)
        for _ in track(shards, -(-number // shard), f"stills, {name}"):
            pass


def _intention(args: argparse.Namespace, settings: Settings, stills: Path) -> str:
    if args.random:
        return f"pretrain: would write a base with random weights, seed {settings.seed}, to {args.out / 'base'}"
    parts = [f"would render {args.render} stills and {args.held_out} held-out ones into {stills}"] * (args.render > 0)
    parts.append(
        f"would train {settings.tower_steps} + {settings.steps} steps on {stills} into {args.out}"
        + (", going on from its state.pt" if (args.out / "state.pt").exists() else "")
    )
    return "pretrain: " + ", then ".join(parts)


def _write_random(args: argparse.Namespace, started_s: float) -> int:
    from vlm2vla_training.twin_model import write_random_base

    write_random_base(args.out / "base", args.seed)
    finish("pretrain", args.out, {"random": True, "seed": args.seed}, started_s, "a base with random weights")
    return 0


def _train(args: argparse.Namespace, settings: Settings, stills: Path, started_s: float) -> int:
    _same_run(args.out, settings)
    if args.render:
        render_stills(stills, args.render, args.held_out, args.workers)
    from vlm2vla_training.pretrain import train
    from vlm2vla_training.pretrain_batches import Stills

    pictures, held_out = Stills.load(stills / "train"), Stills.load(stills / "dev")
    write_json(args.out / "settings.json", asdict(settings))
    metrics = train(pictures, held_out, args.out, settings)
    summary: dict[str, Any] = {
        "random": False,
        "settings": asdict(settings),
        "stills": len(pictures.truths),
        "held_out": len(held_out.truths),
        "metrics": metrics,
    }
    steps = settings.tower_steps + settings.steps
    finish("pretrain", args.out, summary, started_s, f"{steps} steps on {len(pictures.truths)} stills")
    return 0


def _same_run(out: Path, settings: Settings) -> None:
    """Refuse to go on with a state that other settings made; threads and compilation may change."""
    path = out / "settings.json"
    if not path.exists() or not (out / "state.pt").exists():
        return
    before, now = read_json(path), asdict(settings)
    other = [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
    if problem := [text for text in other if not text.startswith(("threads ", "compile "))]:
        raise UsageError(f"{out} holds a run with other settings ({'; '.join(problem)}); give another --out")
