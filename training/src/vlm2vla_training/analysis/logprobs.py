"""`logprobs`: Fig. 3, how likely actions are to an untouched model in each of four representations.

The model gets the prompt of stage three (D.4) with its picture, and the logged rows as the answer. For each action the
mean ln p of its tokens is what Fig. 3's comparison needs; because representations differ in how many tokens they spend,
ln p of a whole row stands beside it. Tokens count as least likely by the model's own mean probability, taken at the
answer's first position and after every token of the text answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.parsing import parse_actions
from vlm2vla_training.analysis.figures import log_probability_figure, save
from vlm2vla_training.analysis.model import LoadedModel
from vlm2vla_training.analysis.representations import LABELS, NAMES, Bins, Representations, Rows, least_likely
from vlm2vla_training.bases import curated_size, read_base
from vlm2vla_training.curation.dataset import ExampleSet, load_examples
from vlm2vla_training.errors import UsageError
from vlm2vla_training.jsonio import JsonlAppender, read_json, read_jsonl, same_run, write_json
from vlm2vla_training.progress import finish, track
from vlm2vla_training.sft import merged
from vlm2vla_training.sft_data import Collator, Tokens

SCORES_FILE = "scores.jsonl"
CODEBOOK_FILE = "least_likely.json"


def run_logprobs(args: argparse.Namespace) -> int:
    """`logprobs`: score, write scores.jsonl, the figure and summary.json; a stopped run goes on where it was."""
    started = time.monotonic()
    card = read_base(args.base, curated_size(args.examples[0]))
    if card.policy:
        raise UsageError(f"{args.base} was trained to act; Fig. 3 is about a model before fine-tuning")
    sources = [read_json(folder / "summary.json") for folder in args.examples]
    if any(source["options"]["variant"] == "at" for source in sources):
        raise UsageError(
            "examples of variant 'at' hold tokens already; give text actions, tokens are made from them here"
        )
    examples = merged([load_examples(folder, card.image_size, ("actions",)) for folder in args.examples])
    chosen = spread(len(examples), args.limit)
    actions = {place: parse_actions(examples.completions[place]).rows for place in chosen}
    path = args.out / SCORES_FILE
    done = {int(line["example"]) for line in read_jsonl(path)} if path.exists() else set()
    left = [place for place in chosen if place not in done]
    if args.dry_run:
        print(f"logprobs: would score {len(left)} actions in {len(NAMES)} representations ({len(done)} are done)")
        return 0
    hashes = [source["data_hash"] for source in sources]
    settings = {"base_hash": card.base_hash, "data_hashes": hashes, "actions": len(chosen), "bins": args.bins}
    settings["dtype"] = args.dtype
    same_run(args.out, settings)
    model = LoadedModel(args.base, None, card.image_size, args.device, args.dtype)
    bins = Bins.of(np.concatenate([np.asarray(rows) for rows in actions.values()]), args.bins)
    codebook = _codebook(args, model, examples, chosen, card.image_size)
    writer = Representations(model.encoder.tokenizer, bins, codebook)
    batches = [left[start : start + args.batch_size] for start in range(0, len(left), args.batch_size)]
    with JsonlAppender(path) as file:
        for batch in track(batches, len(batches), "logprobs"):
            for line in _scores(model, writer, examples, {place: actions[place] for place in batch}):
                file.append(line)
    lines = [line for line in read_jsonl(path) if int(line["example"]) in actions]
    summary = {**settings, "base": card.name, "least_likely_tokens": _shown(model, codebook), **described(lines)}
    figure = log_probability_figure(
        {LABELS[name]: [line[name]["sum"] / line[name]["tokens"] for line in lines] for name in NAMES},
        {LABELS[name]: [line[name]["sum"] / line["rows"] for line in lines] for name in NAMES},
    )
    save(figure, args.out, "logprobs")
    means = ", ".join(f"{name} {summary['representations'][name]['per_token']['mean']:.2f}" for name in NAMES)
    finish("logprobs", args.out, summary, started, f"{len(lines)} actions, mean ln p a token: {means}")
    return 0


def spread(count: int, limit: int) -> list[int]:
    """`limit` of `count` places, evenly spread; all for a limit of 0."""
    wanted = min(limit, count) or count
    return sorted({place * count // wanted for place in range(wanted)})


def _codebook(
    args: argparse.Namespace, model: LoadedModel, examples: ExampleSet, chosen: list[int], image_size: int
) -> list[int]:
    """Ids of the least likely tokens; kept in a file, because a resumed run must go on with the same."""
    path: Path = args.out / CODEBOOK_FILE
    if path.exists():
        return [int(token) for token in read_json(path)["ids"]]
    total: NDArray[np.float64] | None = None
    positions = 0
    measured = [chosen[place] for place in spread(len(chosen), args.measure_on)]
    batches = [measured[start : start + args.batch_size] for start in range(0, len(measured), args.batch_size)]
    for batch in track(batches, len(batches), "logprobs: least likely tokens"):
        tokens = {
            place: model.encoder.encode(
                examples.prompts[place], examples.completions[place], len(examples.images[place])
            )
            for place in batch
        }
        for found in _answers(model, examples, tokens):
            probability = found.exp().sum(dim=0).double().cpu().numpy()
            total = probability if total is None else total + probability
            positions += len(found)
    assert total is not None
    # A model's last rows may belong to no token at all: padding of the vocabulary.
    named = total[: len(model.encoder.tokenizer)] / positions
    ids = least_likely(named, model.control_ids, args.bins)
    write_json(path, {"ids": ids, "positions": positions, "mean_probability": [float(named[token]) for token in ids]})
    return ids


def _answers(model: LoadedModel, examples: ExampleSet, tokens: dict[int, Tokens]) -> Iterator[Any]:
    """ln p [T, V] at each answer position of the examples in `tokens`, in its order."""
    collator = Collator(examples, tokens, model.encoder.processor)
    return iter(model.log_probabilities(collator([{"example": place} for place in tokens])))


def _scores(
    model: LoadedModel, writer: Representations, examples: ExampleSet, actions: dict[int, Rows]
) -> Iterator[dict[str, Any]]:
    """One line an action: for each representation its number of tokens and the sum of their ln p."""
    written = {place: writer.of(rows) for place, rows in actions.items()}
    lines: dict[int, dict[str, Any]] = {
        place: {"example": place, "episode_key": examples.episode_keys[place], "rows": len(rows)}
        for place, rows in actions.items()
    }
    for name in NAMES:
        tokens = {
            place: Tokens(
                model.encoder.encode(examples.prompts[place], "", len(examples.images[place])).prompt,
                written[place][name],
            )
            for place in actions
        }
        for place, found in zip(actions, _answers(model, examples, tokens), strict=True):
            ids = written[place][name]
            values = found.cpu().numpy()[np.arange(len(ids)), ids]
            lines[place][name] = {"tokens": len(ids), "sum": round(float(values.sum(dtype=np.float64)), 5)}
    yield from lines.values()


def described(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and quantiles an action, for each representation, and how often text is the likeliest a token."""
    result: dict[str, Any] = {}
    per_token = {name: np.array([line[name]["sum"] / line[name]["tokens"] for line in lines]) for name in NAMES}
    for name in NAMES:
        per_row = np.array([line[name]["sum"] / line["rows"] for line in lines])
        result[name] = {
            "per_token": _quantiles(per_token[name]),
            "per_row": _quantiles(per_row),
            "tokens_per_row": round(float(np.mean([line[name]["tokens"] / line["rows"] for line in lines])), 2),
        }
    best = np.all([per_token["text"] >= per_token[name] for name in NAMES], axis=0)
    return {"scored": len(lines), "representations": result, "text_likeliest": round(float(best.mean()), 4)}


def _quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    found = {"mean": values.mean(), "p5": low, "median": middle, "p95": high}
    return {name: round(float(value), 4) for name, value in found.items()}


def _shown(model: LoadedModel, codebook: list[int]) -> list[str]:
    """The ten least likely tokens, for people."""
    return [str(token) for token in model.encoder.tokenizer.convert_ids_to_tokens(codebook[:10])]
