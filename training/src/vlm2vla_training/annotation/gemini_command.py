"""`annotate --annotator gemini`: many episodes at a time, within a limit in dollars, and nothing asked twice."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Collection, Container, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm2vla_schema.gemini import KEY_VARIABLES, Price, api_key
from vlm2vla_training.annotation.base import AnnotatedEpisode, Annotator
from vlm2vla_training.annotation.files import ANNOTATED_FILE, describe, read_annotated
from vlm2vla_training.annotation.gemini import GeminiAnnotator, annotator_name
from vlm2vla_training.annotation.gemini_batches import BatchCalls, BatchSettings, WaitingError
from vlm2vla_training.annotation.gemini_budget import Budget, BudgetError, read_price
from vlm2vla_training.annotation.gemini_calls import CallError, GeminiCalls, LineSettings, RefusedError, StoppedError
from vlm2vla_training.annotation.gemini_estimate import estimate_annotation
from vlm2vla_training.annotation.gemini_jobs import GeminiJobs
from vlm2vla_training.annotation.gemini_journal import Journal, held
from vlm2vla_training.annotation.gemini_request import RequestSettings, question_about
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.episodes.parquet import EpisodeDataset
from vlm2vla_training.errors import TrainingError, UsageError
from vlm2vla_training.jsonio import JsonlAppender
from vlm2vla_training.progress import finish, track

NOTICE = (
    "annotate: the pictures and logs of these episodes go to Google (Gemini API). Google's terms apply: every call "
    "costs money, and answers must not be used to build competing models"
)
# So many episodes one after another without an answer: it is not the episodes.
_FAILURES_IN_A_ROW = 10

_POSITIVE = (
    "max_output_tokens", "frames_every", "concurrency", "requests_per_minute", "tokens_per_minute", "attempts",
    "batch_episodes",
)  # fmt: skip

Result = tuple[str, AnnotatedEpisode | TrainingError]


@dataclass
class _Run:
    """What came of the episodes so far."""

    failures: list[dict[str, str]] = field(default_factory=list)
    stopped: str | None = None
    in_a_row: int = 0

    def note_failure(self, key: str, error: TrainingError) -> bool:
        """Count an episode without an annotation; return True when the run must stop."""
        if isinstance(error, StoppedError):
            return True
        if isinstance(error, BudgetError | RefusedError):
            self.stopped = self.stopped or str(error)
            return True
        self.failures.append({"episode_key": key, "error": str(error)})
        self.in_a_row += isinstance(error, CallError)
        if self.in_a_row >= _FAILURES_IN_A_ROW:
            self.stopped = self.stopped or f"{self.in_a_row} episodes in a row without an answer; the last: {error}"
        return self.stopped is not None


def run_gemini(args: argparse.Namespace) -> int:
    """`annotate --annotator gemini`: episodes -> annotated.jsonl, with calls.jsonl beside it.

    Returns:
        0 when every episode has its line, quarantined or not; 1 when some are left (the same command goes on).
    """
    started = time.monotonic()
    settings, price = _settings(args)
    dataset = EpisodeDataset(args.episodes)
    if args.dry_run:
        left, _ = _progress(dataset, args.out, settings)
        estimate = estimate_annotation(dataset, left, settings, price)
        print(f"annotate: would ask {settings.model} about {estimate.text()}")
        return 0
    key = api_key()
    if key is None:
        raise UsageError(f"the annotator gemini needs an API key in the environment ({' or '.join(KEY_VARIABLES)})")
    with held(args.out):
        summary, line = _annotate(args, dataset, settings, price, key)
        finish("annotate", args.out, summary, started, line)
    if summary["stopped"]:
        print(f"annotate: stopped: {summary['stopped']}", file=sys.stderr)
    return 1 if summary["left"] else 0


def _annotate(
    args: argparse.Namespace, dataset: EpisodeDataset, settings: RequestSettings, price: Price, key: str
) -> tuple[dict[str, Any], str]:
    """Ask about what is left; return the summary and its line in words."""
    left, finished = _progress(dataset, args.out, settings)
    run, stop = _Run(), threading.Event()
    speed = LineSettings(args.requests_per_minute, args.tokens_per_minute, args.attempts, args.first_wait_s)
    path = args.out / ANNOTATED_FILE
    with Journal(args.out, price, finished) as journal, JsonlAppender(path, durable=True) as file:
        spent = journal.spent
        estimate = estimate_annotation(dataset, left, settings, price, spent.mean_output_tokens())
        print(f"{NOTICE}.\nannotate: {estimate.text()}; spent so far: {spent.text()}", file=sys.stderr, flush=True)
        calls: GeminiCalls | BatchCalls
        if args.batch:
            batches = BatchSettings(args.batch_episodes, args.attempts, args.poll_s, args.max_usd)
            jobs = GeminiJobs(key, args.model, speed, stop)
            calls = BatchCalls(settings, batches, price, journal, jobs, args.out, stop)
            outcomes = in_jobs(GeminiAnnotator(settings, calls), dataset, left, calls, stop)
        else:
            if journal.jobs:
                raise UsageError(f"{args.out} waits for {len(journal.jobs)} jobs of Batch mode; give --batch again")
            calls = GeminiCalls(key, settings, speed, price, journal, Budget(args.max_usd, spent.at_most_usd()), stop)
            episodes = _unfinished(dataset, settings, finished)
            outcomes = in_parallel(GeminiAnnotator(settings, calls), episodes, args.concurrency, stop)
        # Closed before the journal, whatever happens: what is under way still writes into it.
        with closing(outcomes) as results:
            for episode_key, result in track(results, len(left), "annotate", spent.text):
                if isinstance(result, AnnotatedEpisode):
                    file.append(result.to_json())
                    run.in_a_row = 0
                elif run.note_failure(episode_key, result):
                    stop.set()
        calls.close()
        if isinstance(calls, BatchCalls):
            run.stopped = run.stopped or calls.closed
    left, _ = _progress(dataset, args.out, settings)
    told = {"settings": asdict(settings), "estimate": asdict(estimate), "open_jobs": len(journal.jobs)}
    outcome = {"cost": spent.to_json(), "failures": run.failures, "stopped": run.stopped, "left": len(left)}
    summary = {"annotator": annotator_name(settings), **told, **outcome, **describe(path)}
    quarantined = summary["audit"].get("quarantined", 0)
    return summary, f"{summary['episodes']} episodes, {quarantined} quarantined, {len(left)} left, {spent.text()}"


def _progress(dataset: EpisodeDataset, out: Path, settings: RequestSettings) -> tuple[list[str], set[str]]:
    """Return the keys without an annotation made with these settings, and the contents that were asked about."""
    path = out / ANNOTATED_FILE
    lines = read_annotated(path) if path.exists() else {}
    asked = {key: episode.audit["asked"] for key, episode in lines.items() if "asked" in episode.audit}
    wanted = asdict(settings).items()
    left = [key for key in dataset.steps() if not wanted <= asked.get(key, {}).items()]
    return left, {str(one["content"]) for one in asked.values()}


def _settings(args: argparse.Namespace) -> tuple[RequestSettings, Price]:
    if args.prices is None or args.max_usd is None:
        raise UsageError("--annotator gemini spends money: give --prices (a table of yours) and --max-usd")
    for name in _POSITIVE:
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    settings = RequestSettings(
        args.model, args.prompt_version, args.temperature, args.top_p, args.max_output_tokens, args.frames_every,
        args.embodiment,
    )  # fmt: skip
    return settings, read_price(args.prices, args.model, args.batch)


def _unfinished(dataset: EpisodeDataset, settings: RequestSettings, finished: Container[str]) -> Iterator[Episode]:
    for episode in dataset.episodes():
        if not len(episode) or question_about(episode, settings).content not in finished:
            yield episode


def in_parallel(
    annotator: Annotator, episodes: Iterator[Episode], workers: int, stop: threading.Event
) -> Generator[Result]:
    """Yield each episode's key with its annotation or why there is none, as they come; few episodes are in memory.

    When the caller stops early, what is under way ends first: it is paid for.
    """
    waiting: dict[Future[AnnotatedEpisode], str] = {}
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gemini")
    try:
        for episode in episodes:
            if stop.is_set():
                break
            waiting[pool.submit(annotator.annotate, episode)] = episode.key
            if len(waiting) >= 2 * workers:
                yield from _ready(waiting)
        while waiting:
            yield from _ready(waiting)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def in_jobs(
    annotator: Annotator, dataset: EpisodeDataset, left: Collection[str], calls: BatchCalls, stop: threading.Event
) -> Generator[Result]:
    """Yield each episode's key with its annotation or why there is none, as jobs of Batch mode end. What one job leaves
    open (repairs, failed requests, what had no room below the limit) goes into the next.
    """
    every = frozenset(dataset.steps())
    wanted, waiting = set(left), set[str]()
    try:
        calls.recover()
        while not stop.is_set():
            for episode in dataset.episodes(every - wanted):
                waiting.discard(episode.key)
                try:
                    yield episode.key, annotator.annotate(episode)
                except WaitingError:
                    waiting.add(episode.key)
                except TrainingError as error:
                    yield episode.key, error
                if stop.is_set():
                    return
            calls.submit()
            if not calls.next_ended():
                return
            wanted = waiting - calls.waiting_episodes()
    except StoppedError:
        return
    except CallError as error:
        calls.closed = str(error)


def _ready(waiting: dict[Future[AnnotatedEpisode], str]) -> Iterator[Result]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        key, error = waiting.pop(future), future.exception()
        if error is None:
            yield key, future.result()
        elif isinstance(error, TrainingError):
            yield key, error
        else:
            raise error
