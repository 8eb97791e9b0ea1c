"""`ingest --ray` on a local cluster of two workers: the same bytes as by one process.

    python3 -m venv ENV && ENV/bin/pip install -e shared_schema -e twin -e "training[ray]"
    ENV/bin/python bench/ray_ingest.py --sample FOLDER --out bench/results/ray_ingest.json

FOLDER is an RLDS dataset; its episodes are written again under new keys until they fill --gigabytes in eight shards, of
which one is then damaged. The cluster is Ray's own for tests: a head that takes no work and two worker nodes with a CPU
each, in processes of their own on this machine. Must: every part, episodes.parquet and summary.json but for its seconds
are the same, and both nodes worked at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "bench"))
from read_speed import replicate

from vlm2vla_training.cli import main as train
from vlm2vla_training.episodes.tfrecord import read_records, shards_of

# With less Ray lets one piece of work run at a time.
STORE_BYTES = 700_000_000


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file, of summary.json without its seconds."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.name == "summary.json":
            data = json.dumps({name: value for name, value in json.loads(data).items() if name != "seconds"}).encode()
        found[path.name] = hashlib.sha256(data).hexdigest()
    return found


def ingest(source: Path, out: Path, *more: str) -> float:
    """The command that users call; its seconds."""
    begun = time.perf_counter()
    if train(["ingest", "--format", "rlds", "--input", str(source), "--out", str(out), *more]):
        raise SystemExit(1)
    return round(time.perf_counter() - begun, 1)


def on_cluster(work: Callable[[str], float]) -> tuple[float, int, bool]:
    """Run a command on two worker nodes; its seconds, the pieces of work, and whether both nodes worked at once."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        cluster.wait_for_nodes()
        seconds = work(cluster.address)
        spans = sorted(
            (one["ts"], one["ts"] + one["dur"]) for one in ray.timeline() if one["cat"].startswith("task::Map")
        )
        # Each node has one CPU: two pieces of work at once are on two nodes.
        return seconds, len(spans), any(later[0] < earlier[1] for earlier, later in pairwise(spans))
    finally:
        ray.shutdown()
        cluster.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    """Replicate, ingest twice, compare, write; 0 when the bytes are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=0.1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    records = [record.data for shard in shards_of(options.sample) for record in read_records(shard, print)]
    with tempfile.TemporaryDirectory() as temporary:
        source, one, two = (Path(temporary) / name for name in ("source", "one", "two"))
        replicate(records, options.sample, source, int(options.gigabytes * 1e9))
        damaged = bytearray(shards_of(source)[3].read_bytes())
        damaged[len(damaged) // 2] ^= 1
        shards_of(source)[3].write_bytes(damaged)
        seconds = {"one process": ingest(source, one)}
        seconds["two nodes"], pieces, at_once = on_cluster(lambda address: ingest(source, two, "--ray", address))
        same = contents(one) == contents(two)
        summary = json.loads((one / "summary.json").read_text())
        parts = len(list(one.glob("part-*.parquet")))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    result: dict[str, Any] = {
        "commit": commit.stdout.strip(), "ray": ray.__version__, "bytes": int(options.gigabytes * 1e9), "parts": parts,
        "episodes": summary["episodes"], "damaged": len(summary["damage"]), "seconds": seconds,
        "pieces_of_work": pieces, "both_nodes_at_once": at_once, "load_average": os.getloadavg()[0],
        "same_bytes": same, "held": same and at_once,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
