"""RLDS files for tests: an encoder of tf.train.Example written for the tests alone, and Bridge-like episodes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from training_fakes import flat_image

from vlm2vla_training.episodes.tfrecord import frame_record

Value = list[bytes] | list[int] | NDArray[np.float32]
SHARD = "bridge_dataset-train.tfrecord-00000-of-00001"


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def feature(value: Value, packed: bool = True) -> bytes:
    if isinstance(value, np.ndarray):
        if not packed:
            return message(2, b"".join(b"\x0d" + struct.pack("<f", number) for number in value))
        return message(2, message(1, value.astype("<f4").tobytes()))
    if value and isinstance(value[0], bytes):
        return message(1, b"".join(message(1, one) for one in value if isinstance(one, bytes)))
    numbers = [varint(int(one)) for one in value]
    return message(3, message(1, b"".join(numbers)) if packed else b"".join(b"\x08" + one for one in numbers))


def example(features: dict[str, Value], packed: bool = True) -> bytes:
    entries = [
        message(1, message(1, name.encode()) + message(2, feature(value, packed))) for name, value in features.items()
    ]
    return message(1, b"".join(entries))


def bridge_features(
    rows: int = 4, instruction: str = "put carrot on plate", path: str = "/x/numpy_256/a/out.npy", number: int = 0
) -> dict[str, Value]:
    """An ordinary episode: moves forward, gripper open; every trap is a change to this."""
    actions = np.tile(np.array([0.01, 0.0, -0.01, 0.0, 0.0, 0.0, 1.0], np.float32), (rows, 1))
    states = np.zeros((rows, 7), np.float32)
    states[:, 0] = 0.3 + 0.01 * np.arange(rows)
    return {
        "steps/action": actions.ravel(),
        "steps/observation/state": states.ravel(),
        "steps/observation/image_0": [flat_image(60 + index) for index in range(rows)],
        "steps/observation/image_1": [flat_image(0)] * rows,
        "steps/language_instruction": [instruction.encode()] * rows,
        "steps/is_first": [1] + [0] * (rows - 1),
        "episode_metadata/file_path": [path.encode()],
        "episode_metadata/episode_id": [number],
        "episode_metadata/has_image_0": [1],
        "episode_metadata/has_image_1": [0],
        "episode_metadata/has_language": [1],
    }


def actions_of(features: dict[str, Value]) -> NDArray[np.float32]:
    """A view of an episode's actions, [T, 7], to be changed in place."""
    value = features["steps/action"]
    assert isinstance(value, np.ndarray)
    return value.reshape(-1, 7)


def write_shard(folder: Path, episodes: list[dict[str, Value]], name: str = SHARD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"".join(frame_record(example(features)) for features in episodes))
    return path


def write_info(folder: Path, lengths: list[int], **changes: Any) -> None:
    split = {"name": "train", "shardLengths": [str(length) for length in lengths]}
    info = {"name": "bridge_dataset", "version": "1.0.0", "splits": [split], **changes}
    (folder / "dataset_info.json").write_text(json.dumps(info))
