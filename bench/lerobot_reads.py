"""Does LeRobot's own reader find in an exported dataset what the episodes hold?

    python3.12 -m venv work/lerobot && work/lerobot/bin/pip install 'lerobot[dataset]==0.6.1' pydantic pybase64
    vlm2vla-train export-lerobot --episodes work/episodes --out work/lerobot_dataset
    PYTHONPATH=shared_schema/src:training/src work/lerobot/bin/python bench/lerobot_reads.py \
        --episodes work/episodes --dataset work/lerobot_dataset --out bench/results/lerobot_reads.json

Runs in an environment with lerobot, which the project's own does not have, and without a network. Every frame is read
by index, decoded and compared: pixels with Pillow's of the logged bytes, actions and states as single precision, task,
frame numbers and times; then the windows of `delta_timestamps` at both ends of every episode, a batch of torch's
DataLoader, and the statistics against the data. The first difference ends it with an error. `--recordings` compares
with recordings; a result is added to those in --out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.lerobot_writer import CAMERA
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.episodes.recordings import RecordingsSource

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> int:
    """Compares, prints and writes what was compared; 0 when all of it is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--episodes", type=Path)
    source.add_argument("--recordings", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    reader = RecordingsSource(args.recordings) if args.recordings else EpisodeDataset(args.episodes)
    episodes = list(reader.episodes())
    version = importlib.metadata.version("lerobot")
    result = {"lerobot": version, "data": episodes[0].source, **compare(episodes, args.dataset)}
    known = json.loads(args.out.read_text()) if args.out.exists() else []
    args.out.write_text(json.dumps([*known, result], indent=1) + "\n")
    print(json.dumps(result))
    return 0


def compare(episodes: list[Episode], root: Path) -> dict[str, int | str]:
    """Reads the dataset with LeRobot and compares it with `episodes`, in the order in which they were written."""
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/exported", root=root)
    meta = dataset.meta
    lengths = [len(episode) for episode in episodes]
    equal(meta.total_episodes, len(episodes), "episodes")
    equal(len(dataset), sum(lengths), "frames")
    equal([int(row["length"]) for row in meta.episodes], lengths, "lengths")
    equal(sorted(meta.tasks.index), sorted({episode.instruction for episode in episodes}), "tasks")
    step = 0
    for number, episode in enumerate(episodes):
        row = meta.episodes[number]
        equal((row["dataset_from_index"], row["dataset_to_index"]), (step, step + len(episode)), "range")
        for frame in range(len(episode)):
            item = dataset[step]
            equal(item["task"], episode.instruction, "task")
            place = [int(item[name]) for name in ("episode_index", "frame_index", "index")]
            equal(place, [number, frame, step], "place")
            equal(item["action"].tolist(), episode.actions[frame].astype(np.float32).tolist(), "action")
            equal(item["observation.state"].tolist(), episode.states[frame].astype(np.float32).tolist(), "state")
            equal(round(float(item["timestamp"]) * meta.fps), frame, "timestamp")
            pixels = np.asarray(Image.open(io.BytesIO(episode.images[frame])).convert("RGB"))
            shown = (item[CAMERA].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
            equal(bool((shown == pixels).all()), True, "pixels")
            step += 1
    actions = np.concatenate([episode.actions for episode in episodes]).astype(np.float32)
    for name, value in (("mean", actions.mean(0)), ("std", actions.std(0)), ("min", actions.min(0))):
        equal(bool(np.allclose(meta.stats["action"][name], value, atol=1e-6)), True, f"stats {name}")
    equal(meta.stats[CAMERA]["mean"].shape, (3, 1, 1), "picture stats")
    windows(episodes, root, meta.fps)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=min(4, len(dataset)))))
    equal(tuple(batch["action"].shape[1:]), (7,), "batch")
    last = LeRobotDataset("local/exported", root=root, episodes=[len(episodes) - 1])
    equal(len(last), lengths[-1], "one episode alone")
    equal(last[0]["task"], episodes[-1].instruction, "its task")
    files = len(list(root.glob("data/*/*.parquet")))
    return {"episodes": len(episodes), "frames": step, "tasks": len(meta.tasks), "files": files}


def windows(episodes: list[Episode], root: Path, fps: int) -> None:
    """Asks for the action before and after each first and last frame: LeRobot pads at an episode's ends."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/exported", root=root, delta_timestamps={"action": [-1 / fps, 0.0, 1 / fps]})
    begin = 0
    for episode in episodes:
        end = begin + len(episode) - 1
        equal(dataset[begin]["action_is_pad"].tolist()[0], True, "padding before")
        equal(dataset[end]["action_is_pad"].tolist()[2], True, "padding behind")
        equal(dataset[end]["action"][1].tolist(), episode.actions[-1].astype(np.float32).tolist(), "window")
        begin = end + 1


def equal(found: object, expected: object, what: str) -> None:
    """Raises ValueError when LeRobot found something else."""
    if found != expected:
        raise ValueError(f"{what}: LeRobot reads {found}; expected {expected}")


if __name__ == "__main__":
    raise SystemExit(main())
