"""`curate --ray` on a local cluster of two workers: the same bytes as by one process.

    ENV/bin/python bench/ray_curate.py --sample FOLDER --out bench/results/ray_curate.json      # ENV: as ray_ingest.py

FOLDER is an RLDS dataset; its episodes are ingested under new keys --times over and annotated by rules. The cluster is
that of `ray_ingest`. Must: every part, the card, options.json and summary.json but for its seconds are the same, and
both nodes worked at once. Then a part is taken away, and the same command on the cluster must write it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "bench"))
from ray_ingest import contents, on_cluster

from vlm2vla_training.cli import main as train
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.episodes.rlds import RldsSource


def prepare(sample: Path, folder: Path, times: int) -> None:
    """Write the sample's episodes so many times and annotate them."""
    with EpisodeWriter(folder / "episodes") as writer:
        for copy in range(times):
            for episode in RldsSource(sample, IntakeOptions()).episodes():
                writer.write(dataclasses.replace(episode, key=f"{episode.key}/{copy}"))
    command = ["annotate", "--annotator", "rules", "--episodes", str(folder / "episodes")]
    if train([*command, "--out", str(folder / "annotated")]):
        raise SystemExit(1)


def curate(folder: Path, out: Path, *more: str) -> float:
    """The command that users call; its seconds."""
    begun = time.perf_counter()
    command = ["curate", "--episodes", str(folder / "episodes"), "--annotated", str(folder / "annotated")]
    if train([*command, "--image-size", "112", "--out", str(out), *more]):
        raise SystemExit(1)
    return round(time.perf_counter() - begun, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, curate by one and by two, compare, write; 0 when the bytes are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=Path, required=True)
    parser.add_argument("--times", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        one, two = folder / "one", folder / "two"
        prepare(options.sample, folder, options.times)
        seconds = {"one process": curate(folder, one)}
        seconds["two nodes"], pieces, at_once = on_cluster(lambda address: curate(folder, two, "--ray", address))
        same = contents(one) == contents(two)
        (two / "part-00003.parquet").unlink()
        seconds["one part again"], again, _ = on_cluster(lambda address: curate(folder, two, "--ray", address))
        mended = contents(one) == contents(two) and again == 1
        summary = json.loads((one / "summary.json").read_text())
        parts = len(list(one.glob("part-*.parquet")))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    result: dict[str, Any] = {
        "commit": commit.stdout.strip(), "ray": ray.__version__, "parts": parts, "episodes": summary["episodes"],
        "examples": summary["examples_total"], "seconds": seconds, "pieces_of_work": pieces,
        "both_nodes_at_once": at_once, "load_average": os.getloadavg()[0], "same_bytes": same,
        "missing_part_written_again": mended, "held": same and at_once and mended,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
