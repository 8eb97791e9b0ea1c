"""Reading RLDS episodes: ours against `tensorflow-datasets` and the `tfrecord` package, side by side in one run.

    python3 -m venv ENV && ENV/bin/pip install tensorflow-cpu tensorflow-datasets tfrecord
    VLM2VLA_COMPILE=1 .venv/bin/pip install --no-deps --target COMPILED ./training
    .venv/bin/python bench/read_speed.py --sample FOLDER --others ENV/bin/python --compiled COMPILED \
        --out bench/results/read_speed.json

FOLDER is an RLDS dataset with dataset_info.json and features.json; its episodes are written again under new keys until
they fill --gigabytes ("sample"), and once more as long and large as those of the full set are ("full_size": four
episodes one after another, pictures of 256x256). All hand over actions and states as [T, 7], the instruction as text
and the undecoded JPEG bytes of every step as a list; ours checks every checksum and every trap of the data, `tfrecord`
no checksum. Ours reads as it is installed and as compiled code of the same source (training/setup.py), each in one
process and, as `ingest` does with that much, in a process for each core;
`tensorflow-datasets` has threads of its own; `tfrecord` reads in one process, as its documentation shows, and for
comparison by a pool of as many processes as ours, which its documentation does not show. Imports come before the clock
for everyone, the start of the processes that do the work does not. Rounds alternate, tensorflow-datasets takes part in
the first only; the shortest time of each counts, so the run needs cores of its own (`chrt --fifo 1`). Must: on the
sample, compiled, on all cores, at least twice as fast as the faster of the others as documented, and at most 500 MB of
memory in all processes together.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.rlds import RldsSource
from vlm2vla_training.episodes.tfexample import Example
from vlm2vla_training.episodes.tfrecord import frame_record, read_records, shards_of
from vlm2vla_training.jsonio import read_json, write_json

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "tests" / "training"))
from rlds_files import Value, example

SHARDS = 8
PROCESSES = len(os.sched_getaffinity(0))
# Part of the sample's file_path; eight digits in its place make every copy's key new.
PATH_PART = b"berkeley"
TEXTS = ("steps/language_instruction", "episode_metadata/file_path")
JOINED = 4
BRIDGE_EPISODES = 60_000

# Each reader: what comes before the clock, then what is timed.
OURS = """
from pathlib import Path
from vlm2vla_training.episodes.intake import IntakeOptions
from vlm2vla_training.episodes.rlds import RldsSource
# clock
source = RldsSource(Path(sys.argv[1]), IntakeOptions())
for episode in source.episodes():
    episodes += 1
    steps += len(episode)
    size += sum(map(len, episode.images))
assert not source.report.damage and not source.report.left_out, source.report
"""
COMPILED = """
from vlm2vla_training.episodes import tfexample
assert tfexample.__file__.endswith(".so"), tfexample.__file__
"""
OURS_ALL_CORES = """
import glob
from read_speed import PROCESSES, nothing, read_shard
from vlm2vla_training.spread import over_processes
spread = over_processes(PROCESSES)
list(spread(nothing, [""]))  # the process that the others are copied from imports
# clock
told = list(map(json.loads, spread(read_shard, sorted(glob.glob(sys.argv[1] + "/*.tfrecord-*")))))
episodes, steps, size, cpu_elsewhere = (sum(one[place] for one in told) for place in range(4))
peak_elsewhere = sum({one[4]: one[5] for one in told}.values())
"""
TFDS = """
import tensorflow_datasets as tfds
# clock
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
TFRECORD_PARTS = """
import glob, os
from multiprocessing import get_context
from tfrecord.reader import tfrecord_loader
names = {
    "steps/action": "float", "steps/observation/state": "float", "steps/observation/image_0": "byte",
    "steps/language_instruction": "byte", "episode_metadata/file_path": "byte", "episode_metadata/episode_id": "int",
}
def read_shard(shard):
    episodes = steps = size = 0
    worked = time.process_time()
    for found in tfrecord_loader(shard, None, names):
        actions, states = found["steps/action"].reshape(-1, 7), found["steps/observation/state"].reshape(-1, 7)
        instruction = found["steps/language_instruction"][0].decode()
        images = found["steps/observation/image_0"].tolist()
        episodes += 1
        steps += len(actions)
        size += sum(map(len, images))
    return episodes, steps, size, time.process_time() - worked, os.getpid(), peak_mb()
# clock
shards = sorted(glob.glob(sys.argv[1] + "/*.tfrecord-*"))
"""
TFRECORD = (
    f"{TFRECORD_PARTS}told = list(map(read_shard, shards))\nepisodes, steps, size = map(sum, list(zip(*told))[:3])\n"
)
TFRECORD_ALL_CORES = f"""{TFRECORD_PARTS}
with get_context("fork").Pool({PROCESSES}) as pool:
    told = pool.map(read_shard, shards, 1)
episodes, steps, size, cpu_elsewhere = (sum(one[place] for one in told) for place in range(4))
peak_elsewhere = sum({{one[4]: one[5] for one in told}}.values())
"""
FRAME = """
import json, re, sys, time
import numpy as np
def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
episodes = steps = size = cpu_elsewhere = peak_elsewhere = 0
{setup}
begun, worked = time.perf_counter(), time.process_time()
{body}
seconds, cpu = time.perf_counter() - begun, time.process_time() - worked + cpu_elsewhere
counts = {{"episodes": episodes, "steps": steps, "image_bytes": size}}
print(json.dumps({{"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak_mb() + peak_elsewhere, **counts}}))
"""


def nothing(text: str) -> str:
    """A piece of work that takes no time."""
    return text


def read_shard(shard: str) -> str:
    """Read one shard as each process of `ingest` does; episodes, steps, bytes, processor time, process, peak MB."""
    worked = time.process_time()
    damage: list[dict[str, Any]] = []
    episodes = [0, 0, 0]
    for met in RldsSource(Path(shard), IntakeOptions()).meet(Path(shard), damage):
        episode = met.taken.episode
        assert episode is not None
        episodes[0] += 1
        episodes[1] += len(episode)
        episodes[2] += sum(map(len, episode.images))
    assert not [one for one in damage if "promises" not in one["what"]], damage
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return json.dumps([*episodes, time.process_time() - worked, os.getpid(), int(found[1]) / 1024])


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


def timed(python: str, text: str, folder: Path, first: Path | None = None) -> dict[str, Any]:
    """One reader in a process of its own, with the packages in `first`; what stands before "# clock" is not timed."""
    setup, body = text.split("# clock")
    code = FRAME.format(setup=setup, body=body)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    else:
        ours = [str(path) for path in (first, CHECKOUT / "bench") if path is not None]
        environment["PYTHONPATH"] = os.pathsep.join([*ours, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [python, "-c", code, str(folder)], capture_output=True, text=True, check=False, env=environment, timeout=900
    )
    if done.returncode:
        raise SystemExit(f"{python} failed: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(readers: dict[str, tuple[str, str, Path | None]], folder: Path, rounds: int) -> dict[str, Any]:
    """Let each reader read `folder`, in turns; the best of each and whether the bounds hold."""
    best: dict[str, dict[str, Any]] = {}
    for turn in range(rounds):
        for name, (python, body, first) in readers.items():
            if turn and name == "tfds":
                continue
            one = timed(python, body, folder, first)
            print(name, one, file=sys.stderr, flush=True)
            if name not in best or one["seconds"] < best[name]["seconds"]:
                best[name] = one
    same = len({(one["episodes"], one["steps"], one["image_bytes"]) for one in best.values()}) == 1
    times = {name: one["seconds"] for name, one in best.items()}
    faster = min(times["tfds"], times["tfrecord"])
    factors = {
        f"{kind}_{where}": round(against / times[reader], 2)
        for kind in ("ours", "compiled")
        for where, reader, against in (
            ("one_process", kind, faster),
            ("all_cores", f"{kind}_all_cores", faster),
            ("all_cores_for_both", f"{kind}_all_cores", times["tfrecord_all_cores"]),
        )
    }
    return {
        "bytes": sum(path.stat().st_size for path in shards_of(folder)), "load_average": os.getloadavg()[0],
        "readers": best, "all_read_the_same": same, "times_faster_than_the_faster": factors,
        "held": same and faster >= 2.0 * times["compiled_all_cores"] and best["compiled_all_cores"]["peak_mb"] <= 500,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Replicate, read with each, write; 0 when the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=Path, required=True)
    parser.add_argument("--others", required=True, help="python with tensorflow-datasets and tfrecord")
    parser.add_argument("--compiled", type=Path, required=True, help="where the compiled package was installed")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    readers = {
        "ours": (sys.executable, OURS, None), "ours_all_cores": (sys.executable, OURS_ALL_CORES, None),
        "compiled": (sys.executable, COMPILED + OURS, options.compiled.resolve()),
        "compiled_all_cores": (sys.executable, COMPILED + OURS_ALL_CORES, options.compiled.resolve()),
        "tfds": (options.others, TFDS, None),
        "tfrecord": (options.others, TFRECORD, None), "tfrecord_all_cores": (options.others, TFRECORD_ALL_CORES, None),
    }  # fmt: skip
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
        "commit": commit.stdout.strip(), "processes_of_all_cores": PROCESSES, **found,
        # One reading of undecoded episodes by division over the cores; a disk of 1 GB/s needs 2.4 minutes for them.
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
