"""`curate` by many processes, on this machine or on a Ray cluster; the same bytes as by one.

Which episodes are trained on is known from the annotations, so that every part's episodes are, and the parts are
written wherever there is time. A part that is there already with the episodes that belong into it stays.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path

from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.curation.dataset import (
    EPISODES_A_PART,
    CurateCounts,
    count,
    example_rows,
    examples_in,
    keys_of_part,
    part_path,
    write_part,
)
from vlm2vla_training.curation.examples import ExampleOptions, examples_of
from vlm2vla_training.episodes.parquet import EpisodeDataset, episodes_of_parts
from vlm2vla_training.errors import DataError
from vlm2vla_training.progress import track
from vlm2vla_training.spread import Spread


def curate_parts(
    episodes: Path,
    annotated: dict[str, AnnotatedEpisode],
    out: Path,
    options: ExampleOptions,
    image_size_px: int,
    counts: CurateCounts,
    left_out: Collection[str],
    spread: Spread,
) -> None:
    """Write every part that is not there; arguments as for `curate`, folders at the same path on every machine.

    Raises:
        DataError: an annotation does not fit its episode, or `out` has parts that these episodes do not give.
    """
    keys = []
    places = EpisodeDataset(episodes).places()
    for key in places:
        if key in annotated:
            count(counts, key, examples_of(annotated[key], options))
            keys.append(key)
        elif key not in left_out:
            counts.dropped["episode without annotation"] += 1
    parts = [keys[begin : begin + EPISODES_A_PART] for begin in range(0, len(keys), EPISODES_A_PART)]
    wanted = {part_path(out, number) for number in range(len(parts))}
    surplus = set(out.glob("part-*.parquet")) - wanted
    if surplus:
        raise DataError(f"{out} has {len(surplus)} parts that {episodes} does not give; choose another --out")
    left = [
        json.dumps(
            {
                "part": number,
                "files": list(dict.fromkeys(places[key] for key in part)),
                "annotated": [annotated[key].to_json() for key in part],
            }
        )
        for number, part in enumerate(parts)
        if not _is_there(part_path(out, number), part)
    ]
    work = partial(_write, str(episodes), options, image_size_px, str(out))
    for _ in track(spread(work, left), len(left), "curate: parts written"):
        pass


def _write(episodes: str, options: ExampleOptions, image_size_px: int, out: str, text: str) -> str:
    """Write one part; runs anywhere."""
    todo = json.loads(text)
    annotated = {one.episode_key: one for one in map(AnnotatedEpisode.from_json, todo["annotated"])}
    rows = [
        row
        for episode in episodes_of_parts(Path(episodes), todo["files"], annotated.keys())
        for row in example_rows(episode, examples_in(episode, annotated[episode.key], options), image_size_px)
    ]
    write_part(part_path(Path(out), todo["part"]), rows, list(annotated))
    return str(todo["part"])


def _is_there(path: Path, keys: list[str]) -> bool:
    return path.exists() and keys_of_part(path) == keys
