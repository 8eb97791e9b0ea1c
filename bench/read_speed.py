"""Reading RLDS episodes: ours against `tensorflow-datasets` and the `tfrecord` package, side by side in one run.

    python3 -m venv ENV && ENV/bin/pip install tensorflow-cpu tensorflow-datasets tfrecord
    .venv/bin/python bench/read_speed.py --sample FOLDER --others ENV/bin/python --out bench/results/read_speed.json

FOLDER is an RLDS dataset with dataset_info.json and features.json; its episodes are written again under new keys until
they fill --gigabytes. Each reader runs in a process of its own and hands over actions, states, instruction and the
undecoded JPEG bytes of every episode; ours checks every checksum and every trap of the data. Rounds alternate, the best
of each counts, by processor time, which other work on the machine disturbs least. Must: at least twice as fast as the
faster of the others, at most 500 MB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vla_training.episodes.tfrecord import frame_record, read_records, shards_of
from vlm2vla_training.jsonio import read_json, write_json

CHECKOUT = Path(__file__).resolve().parents[1]
SHARDS = 8
# Part of the sample's file_path; eight digits in its place make every copy's key new.
PATH_PART = b"berkeley"

OURS = """
from pathlib import Path
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.rlds import RldsSource
source = RldsSource(Path(sys.argv[1]), IntakeOptions())
for episode in source.episodes():
    episodes += 1
    steps += len(episode)
    size += sum(map(len, episode.images))
assert not source.report.damage and not source.report.left_out, source.report
"""
TFDS = """
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(sys.argv[1])
skip = {"steps": {"observation": {f"image_{k}": tfds.decode.SkipDecoding() for k in range(4)}}}
for episode in builder.as_dataset(split="train", decoders=skip):
    batch = next(iter(episode["steps"].batch(100000).as_numpy_iterator()))
    episodes += 1
    steps += len(batch["action"])
    size += sum(map(len, batch["observation"]["image_0"]))
"""
TFRECORD = """
import glob
from tfrecord.reader import tfrecord_loader
names = {
    "steps/action": "float", "steps/observation/state": "float", "steps/observation/image_0": "byte",
    "steps/language_instruction": "byte", "episode_metadata/file_path": "byte", "episode_metadata/episode_id": "int",
}
for shard in sorted(glob.glob(sys.argv[1] + "/*.tfrecord-*")):
    for found in tfrecord_loader(shard, None, names):
        images = found["steps/observation/image_0"]
        episodes += 1
        steps += len(found["steps/action"].reshape(-1, 7))
        size += sum(map(len, images))
"""
FRAME = """
import json, resource, sys, time
import numpy as np
episodes = steps = size = 0
begun, worked = time.perf_counter(), time.process_time()
{body}
seconds, cpu = time.perf_counter() - begun, time.process_time() - worked
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
counts = {{"episodes": episodes, "steps": steps, "image_bytes": size}}
print(json.dumps({{"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak, **counts}}))
"""


def replicate(sample: Path, folder: Path, total_bytes: int) -> int:
    """Write the sample's episodes again and again, each copy under keys of its own; the number of episodes."""
    records = [record.data for shard in shards_of(sample) for record in read_records(shard, print)]
    copies = max(SHARDS, total_bytes // sum(map(len, records)))
    lengths = [0] * SHARDS
    for shard in range(SHARDS):
        with (folder / f"bridge_dataset-train.tfrecord-{shard:05d}-of-{SHARDS:05d}").open("wb") as file:
            for copy in range(shard, copies, SHARDS):
                for data in records:
                    file.write(frame_record(data.replace(PATH_PART, b"%08d" % copy, 1)))
                lengths[shard] += len(records)
    info = read_json(sample / "dataset_info.json")
    info["splits"] = [{**info["splits"][0], "name": "train", "shardLengths": [str(length) for length in lengths]}]
    write_json(folder / "dataset_info.json", info)
    shutil.copyfile(sample / "features.json", folder / "features.json")
    return sum(lengths)


def timed(python: str, body: str, folder: Path) -> dict[str, Any]:
    """One reader in a process of its own; imports count for nobody: they come before the clock."""
    imports = "\n".join(line for line in body.splitlines() if line.startswith(("import", "from")))
    rest = "\n".join(line for line in body.splitlines() if not line.startswith(("import", "from")))
    code = imports + FRAME.format(body=rest)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", code, str(folder)], capture_output=True, text=True, check=False, env=environment, timeout=900
    )
    if done.returncode:
        raise SystemExit(f"{python} failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Replicate, read with each, write; 0 when the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=Path, required=True)
    parser.add_argument("--others", required=True, help="python with tensorflow-datasets and tfrecord")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    readers = {"ours": (sys.executable, OURS), "tfds": (options.others, TFDS), "tfrecord": (options.others, TFRECORD)}
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "1.0.0"
        folder.mkdir()
        episodes = replicate(options.sample, folder, int(options.gigabytes * 1e9))
        size = sum(path.stat().st_size for path in shards_of(folder))
        for _ in range(options.rounds):
            for name, (python, body) in readers.items():
                one = timed(python, body, folder)
                print(name, one, file=sys.stderr, flush=True)
                if name not in best or one["cpu_seconds"] < best[name]["cpu_seconds"]:
                    best[name] = one
    same = len({(one["episodes"], one["steps"], one["image_bytes"]) for one in best.values()}) == 1
    times = {name: one["cpu_seconds"] for name, one in best.items()}
    factor = min(times["tfds"], times["tfrecord"]) / times["ours"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    result = {
        "commit": commit.stdout.strip(), "bytes": size, "episodes": episodes, "load_average": os.getloadavg()[0],
        "readers": best, "all_read_the_same": same, "times_faster_than_the_faster": round(factor, 2),
        "held": same and factor >= 2.0 and best["ours"]["peak_mb"] <= 500,
    }  # fmt: skip
    write_json(options.out, result)
    print(json.dumps(result, indent=1))
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
