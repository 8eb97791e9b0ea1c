"""The training examples on disk: Parquet parts (columns of contracts "Files"), a dataset card and summary.json."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm2vla_schema.images import decode_image, to_model_square
from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.curation.examples import EpisodeExamples, Example, ExampleOptions, examples_of
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import read_json, write_json

SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.binary())),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("kind", pa.string()),
        ("episode_key", pa.string()),
        ("first", pa.int64()),
        ("last", pa.int64()),
        ("prompt_version", pa.string()),
        ("variant", pa.string()),
    ]
)
EPISODES_A_PART = 64
_DONE_KEY = b"vlm2vla_episodes"
_OPTIONS_FILE = "options.json"
# The same frame serves up to a dozen examples: one dictionary page a part keeps it once.
_DICTIONARY_PAGE_BYTES = 1 << 30


@dataclass
class CurateCounts:
    """What `summary.json` tells."""

    episodes: int = 0
    examples: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    drops: list[dict[str, Any]] = field(default_factory=list)
    not_imitated: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    left_out_episodes: list[dict[str, str]] = field(default_factory=list)

    def leave_out(self, key: str, kind: str, detail: str) -> None:
        """Count and name a whole episode that is not trained on."""
        self.left_out[kind] += 1
        self.left_out_episodes.append({"episode_key": key, "reason": kind, "detail": detail})

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "episodes": self.episodes,
            "examples": dict(self.examples),
            "examples_total": self.examples.total(),
            "dropped": dict(self.dropped),
            "dropped_total": self.dropped.total(),
            "drops": self.drops,
            "steps_not_imitated": self.not_imitated,
            "left_out": dict(self.left_out),
            "left_out_episodes": self.left_out_episodes,
        }


class ExampleWriter:
    """Append the examples of whole episodes; a part appears whole or not at all, so a stopped run resumes."""

    def __init__(
        self,
        folder: Path,
        options: ExampleOptions,
        image_size_px: int,
        episodes_per_part: int = EPISODES_A_PART,
        decisions: dict[str, tuple[str, str]] | None = None,
    ) -> None:
        """Open or create the folder; `decisions` are remembered as part of the options.

        Raises:
            UsageError: it was written with other options.
        """
        self._folder = folder
        self._per_part = episodes_per_part
        self._size_px = image_size_px
        self._options = options
        self._rows: list[dict[str, Any]] = []
        self._keys: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {**dataclasses.asdict(options), "kinds": list(options.kinds), "image_size_px": image_size_px}
        if decisions:
            chosen["decisions"] = {key: list(one) for key, one in sorted(decisions.items())}
        existing = folder / _OPTIONS_FILE
        if existing.exists() and read_json(existing) != chosen:
            raise UsageError(f"{folder} was curated with other options ({existing}); choose another --out")
        write_json(existing, chosen)
        self.done = {key for part in _parts(folder) for key in keys_of_part(part)}

    def write(self, episode: Episode, found: EpisodeExamples) -> None:
        """Queue the examples of one episode."""
        self._rows += example_rows(episode, found, self._size_px)
        self._keys.append(episode.key)
        self.done.add(episode.key)
        if len(self._keys) >= self._per_part:
            self.flush()

    def flush(self) -> None:
        """Write what is queued as one part."""
        if not self._keys:
            return
        # Behind the last one: parts that many write may have gaps between them.
        number = max((int(path.stem.removeprefix("part-")) for path in _parts(self._folder)), default=-1) + 1
        write_part(part_path(self._folder, number), self._rows, self._keys)
        self._rows, self._keys = [], []


def example_rows(episode: Episode, found: EpisodeExamples, size_px: int) -> list[dict[str, Any]]:
    """The rows of one episode's examples; their frames are resized by the schema's one function."""
    frames = {step: b"" for example in found.examples for step in example.images}
    for step in frames:
        frames[step] = prepared_image(episode.images[step - episode.first_step], size_px)
    return [{**_columns(example), "images": [frames[step] for step in example.images]} for example in found.examples]


def part_path(folder: Path, number: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{number:05d}.parquet"


def write_part(path: Path, rows: list[dict[str, Any]], keys: list[str]) -> None:
    """Write the examples of the episodes `keys`, whole or not at all."""
    schema = SCHEMA.with_metadata({_DONE_KEY: json.dumps(keys).encode()})
    partial = path.with_name(path.name + ".partial")
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema),
        partial,
        use_dictionary=True,
        dictionary_pagesize_limit=_DICTIONARY_PAGE_BYTES,
        compression="zstd",
    )
    os.replace(partial, path)


def prepared_image(data: bytes, size_px: int) -> bytes:
    """Bring an encoded frame to the model's square as lossless PNG; `size_px` 0 keeps the logged bytes."""
    if size_px == 0:
        return data
    return encode_png(to_model_square(decode_image(data), size_px))


def encode_png(rgb: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Encode uint8 [H, W, 3] without loss."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def curate(
    episodes: Iterable[Episode],
    annotated: dict[str, AnnotatedEpisode],
    writer: ExampleWriter,
    options: ExampleOptions,
    counts: CurateCounts,
    left_out: frozenset[str] = frozenset(),
) -> Iterator[str]:
    """Turn annotated episodes into examples; yields each key when it is queued. Episodes without annotation are counted
    as dropped, those in `left_out` were counted by the caller.

    Raises:
        DataError: an annotation does not fit its episode.
    """
    for episode in episodes:
        annotation = annotated.get(episode.key)
        if episode.key in left_out:
            continue
        if annotation is None:
            counts.dropped["episode without annotation"] += 1
            continue
        found = examples_in(episode, annotation, options)
        writer.write(episode, found)
        count(counts, episode.key, found)
        yield episode.key
    writer.flush()


def examples_in(episode: Episode, annotation: AnnotatedEpisode, options: ExampleOptions) -> EpisodeExamples:
    """Return the examples of an annotated episode.

    Raises:
        DataError: the annotation does not fit the episode.
    """
    if annotation.steps and annotation.steps[-1].last >= episode.first_step + len(episode):
        raise DataError(f"the annotation of {episode.key} goes beyond the log's last step")
    return examples_of(annotation, options)


def count(counts: CurateCounts, key: str, found: EpisodeExamples) -> None:
    """Add one episode to the counts."""
    counts.episodes += 1
    for example in found.examples:
        counts.examples[example.kind] += 1
    counts.not_imitated += found.not_imitated
    for kind, first, reason in found.drops:
        counts.dropped[kind] += 1
        counts.drops.append({"episode_key": key, "kind": kind, "first": first, "reason": reason})


def read_examples(folder: Path, columns: list[str] | None = None) -> pa.Table:
    """Read every example of a folder, or only some columns.

    Raises:
        DataError: the folder holds no examples.
    """
    parts = _parts(folder)
    if not parts:
        raise DataError(f"{folder} holds no part-*.parquet; expected the output of curate")
    return pa.concat_tables([pq.read_table(part, columns=columns).replace_schema_metadata() for part in parts])


@dataclass
class ExampleSet:
    """Training examples in memory. Each distinct image is kept once.

    Attributes:
        pixels: uint8 [M, S, S, 3].
        images: for each example the rows of `pixels` it shows, in order.
    """

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    images: list[list[int]]
    prompts: list[str]
    completions: list[str]
    kinds: list[str]
    episode_keys: list[str]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.prompts)


def load_examples(folder: Path, image_size_px: int, kinds: tuple[str, ...] | None = None) -> ExampleSet:
    """Load examples for training; images of another size pass through the schema's resize.

    Raises:
        DataError: no examples, or none of the kinds asked for.
    """
    numbers: dict[bytes, int] = {}
    pixels: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    result = ExampleSet(np.zeros((0, 0, 0, 3), np.uint8), [], [], [], [], [])
    for part in _parts(folder):
        # part by part: the encoded bytes of a whole dataset do not fit beside the decoded ones
        for row in pq.read_table(part).to_pylist():
            if kinds is not None and row["kind"] not in kinds:
                continue
            places = []
            for data in row["images"]:
                if data not in numbers:
                    numbers[data] = len(pixels)
                    pixels.append(_square(data, image_size_px))
                places.append(numbers[data])
            result.images.append(places)
            result.prompts.append(row["prompt"])
            result.completions.append(row["completion"])
            result.kinds.append(row["kind"])
            result.episode_keys.append(row["episode_key"])
    if not len(result):
        raise DataError(f"{folder} holds no examples of kinds {kinds or 'any'}; expected the output of curate")
    result.pixels = np.stack(pixels)
    return result


def write_card(folder: Path, summary: dict[str, Any], sources: dict[str, int]) -> None:
    """Write README.md, the dataset card, with the attribution that Bridge data asks for."""
    left_out = ", ".join(f"{n} {why}" for why, n in sorted(summary["left_out"].items()))
    lines = [
        "# Training examples for a text-action policy",
        "",
        f"{summary['examples_total']} examples from {summary['episodes']} episodes.",
        f"Data hash `{summary['data_hash']}`.",
        "",
        "| kind | examples | dropped |",
        "|---|---|---|",
        *(f"| {kind} | {n} | {summary['dropped'].get(kind, 0)} |" for kind, n in sorted(summary["examples"].items())),
        "",
        f"Episodes left out: {left_out or 'none'}.",
        "",
        "Sources: " + ", ".join(f"{name} ({n} episodes)" for name, n in sorted(sources.items())) + ".",
        "",
        "Options:",
        "",
        "```json",
        json.dumps(summary["options"], indent=1, sort_keys=True),
        "```",
        "",
        "Motion plans are directional words without digits, taken from the annotation field named by `plan_source`.",
        "Action rows are merged as in the paper's appendix B.2; metres, base frame, gripper 1 open and 0 closed.",
        "`completion` is B.2's tuple; `verify` adds the next subtask and is ours.",
    ]
    if any(name.startswith("bridge") for name in sources):
        lines += [
            "",
            "Derived from BridgeData V2 (Walke et al., CC BY 4.0, https://rail-berkeley.github.io/bridgedata/):",
            "relabelled with subtasks and motion plans, actions merged, images rescaled.",
        ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _square(data: bytes, size_px: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rgb = decode_image(data)
    return rgb if rgb.shape[:2] == (size_px, size_px) else to_model_square(rgb, size_px)


def _columns(example: Example) -> dict[str, Any]:
    return {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def keys_of_part(part: Path) -> list[str]:
    """Return the keys of the episodes in a part, in its order."""
    raw = (pq.read_schema(part).metadata or {}).get(_DONE_KEY)
    if raw is None:
        raise DataError(f"{part} was not written by curate: it lacks the metadata '{_DONE_KEY.decode()}'")
    keys: list[str] = json.loads(raw)
    return keys
