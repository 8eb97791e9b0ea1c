"""Reading RLDS episodes: ours against `tensorflow-datasets` and the `tfrecord` package, side by side in one run.

    python3 -m venv ENV && ENV/bin/pip install tensorflow-cpu tensorflow-datasets tfrecord
    .venv/bin/python bench/read_speed.py --sample FOLDER --others ENV/bin/python --out bench/results/read_speed.json

FOLDER is an RLDS dataset with dataset_info.json and features.json; its episodes are written again under new keys until
they fill --gigabytes ("sample"), and once more as long and large as those of the full set are ("full_size": four
episodes one after another, pictures of 256x256). Each reader runs in one process of its own and hands over actions and
states as [T, 7], the instruction as text and the undecoded JPEG bytes of every step as a list; ours checks every
checksum and every trap of the data, `tfrecord` no checksum. Rounds alternate, tensorflow-datasets takes part in the
first only; the best of each counts, by processor time, which other work on the machine disturbs least. Must: on the
sample at least twice as fast as the faster of the others, at most 500 MB of memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm2vla_training.episodes.tfexample import Example
from vlm2vla_training.episodes.tfrecord import frame_record, read_records, shards_of
from vlm2vla_training.jsonio import read_json, write_json

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests" / "training"))
from rlds_files import Value, example

SHARDS = 8
# Part of the sample's file_path; eight digits in its place make every copy's key new.
PATH_PART = b"berkeley"
TEXTS = ("steps/language_instruction", "episode_metadata/file_path")
JOINED = 4
BRIDGE_EPISODES = 60_000

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
    actions, states = batch["action"], batch["observation"]["state"]
    instruction, images = batch["language_instruction"][0].decode(), list(batch["observation"]["image_0"])
    episodes += 1
    steps += len(actions)
    size += sum(map(len, images))
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
        actions, states = found["steps/action"].reshape(-1, 7), found["steps/observation/state"].reshape(-1, 7)
        instruction = found["steps/language_instruction"][0].decode()
        images = found["steps/observation/image_0"].tolist()
        episodes += 1
        steps += len(actions)
        size += sum(map(len, images))
"""
FRAME = """
import json, re, sys, time
import numpy as np
episodes = steps = size = 0
begun, worked = time.perf_counter(), time.process_time()
{body}
seconds, cpu = time.perf_counter() - begun, time.process_time() - worked
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
counts = {{"episodes": episodes, "steps": steps, "image_bytes": size}}
print(json.dumps({{"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak, **counts}}))
"""


def replicate(records: list[bytes], sample: Path, folder: Path, total_bytes: int) -> int:
    """Write the records again and again, each copy under keys of its own; the number of episodes."""
    folder.mkdir(parents=True)
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


def full_size(records: list[bytes]) -> list[bytes]:
    """Records of `JOINED` episodes each, one after another, with pictures of 256x256."""
    groups = zip(*(iter(map(Example, records)),) * JOINED, strict=False)
    return [joined(list(group)) for group in groups]


def joined(examples: list[Example]) -> bytes:
    """One record with the steps of all and the metadata of the first."""
    features: dict[str, Value] = {}
    for name in examples[0].names():
        parts = examples if name.startswith("steps/") else examples[:1]
        if name in TEXTS or "/image_" in name:
            texts = [text for part in parts for text in part.bytes_list(name)]
            features[name] = [enlarged(text) for text in texts] if "/image_" in name else texts
        elif name.startswith(("steps/is_", "episode_metadata/")):
            features[name] = [number for part in parts for number in part.integers(name)]
        else:
            features[name] = np.concatenate([part.floats(name) for part in parts])
    return example(features)


def enlarged(image: bytes) -> bytes:
    """The picture as JPEG of 256x256."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).resize((256, 256), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


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


def compare(readers: dict[str, tuple[str, str]], folder: Path, rounds: int) -> dict[str, Any]:
    """Let each reader read `folder`, in turns; the best of each and whether the bounds hold."""
    best: dict[str, dict[str, Any]] = {}
    for turn in range(rounds):
        for name, (python, body) in readers.items():
            if turn and name == "tfds":
                continue
            one = timed(python, body, folder)
            print(name, one, file=sys.stderr, flush=True)
            if name not in best or one["cpu_seconds"] < best[name]["cpu_seconds"]:
                best[name] = one
    same = len({(one["episodes"], one["steps"], one["image_bytes"]) for one in best.values()}) == 1
    times = {name: one["cpu_seconds"] for name, one in best.items()}
    factor = min(times["tfds"], times["tfrecord"]) / times["ours"]
    return {
        "bytes": sum(path.stat().st_size for path in shards_of(folder)), "load_average": os.getloadavg()[0],
        "readers": best, "all_read_the_same": same, "times_faster_than_the_faster": round(factor, 2),
        "held": same and factor >= 2.0 and best["ours"]["peak_mb"] <= 500,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Replicate, read with each, write; 0 when the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=Path, required=True)
    parser.add_argument("--others", required=True, help="python with tensorflow-datasets and tfrecord")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    readers = {"ours": (sys.executable, OURS), "tfds": (options.others, TFDS), "tfrecord": (options.others, TFRECORD)}
    records = [record.data for shard in shards_of(options.sample) for record in read_records(shard, print)]
    found: dict[str, dict[str, Any]] = {}
    for name, one in (("sample", records), ("full_size", full_size(records))):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "1.0.0"
            episodes = replicate(one, options.sample, folder, int(options.gigabytes * 1e9))
            found[name] = compare(readers, folder, options.rounds)
            assert found[name]["readers"]["ours"]["episodes"] == episodes
    an_episode_s = (
        found["full_size"]["readers"]["ours"]["cpu_seconds"] / found["full_size"]["readers"]["ours"]["episodes"]
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    result = {
        "commit": commit.stdout.strip(), **found,
        "projected_minutes_of_60000_full_size_episodes": {
            f"{cores} cores": round(BRIDGE_EPISODES * an_episode_s / cores / 60, 2) for cores in (1, 2, 32)
        },
        "held": found["sample"]["held"],
    }  # fmt: skip
    write_json(options.out, result)
    print(json.dumps(result, indent=1))
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
