"""Who does pieces of work that stand alone: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from vlm2vla_training.errors import TrainingError, UsageError

Work = Callable[[str], str]
# Does a piece of work for each text, somewhere, and yields the answers in the order of the texts. Only JSON travels.
Spread = Callable[[Work, Sequence[str]], Iterator[str]]


def chosen_spread(args: argparse.Namespace) -> Spread | None:
    """Who does the work of a command with --workers and --ray; None when nobody else does.

    Raises:
        UsageError: both were given, or no worker.
        ModuleNotFoundError: Ray is not installed (extra `ray`).
    """
    workers = 1 if args.workers is None else args.workers
    if workers < 1 or (workers > 1 and args.ray):
        raise UsageError(f"--workers {workers}: expected at least 1, and not together with --ray")
    if args.ray is not None:
        return over_ray(args.ray)
    return over_processes(workers) if workers > 1 else None


def over_processes(workers: int) -> Spread:
    """Spread over processes of this machine; they are copies of one that has read all imports, and start at once."""
    context = get_context("forkserver")

    def spread(work: Work, texts: Sequence[str]) -> Iterator[str]:
        context.set_forkserver_preload([getattr(work, "func", work).__module__])
        pool = ProcessPoolExecutor(workers, mp_context=context)
        try:
            yield from pool.map(work, texts)
        finally:
            # Their end is nothing to wait for; what nobody will ask for any more is not begun.
            pool.shutdown(wait=False, cancel_futures=True)

    return spread


def over_ray(address: str) -> Spread:
    """Spread over a Ray cluster ("auto", "local", "ray://HOST:PORT") with this package installed on every machine.

    Raises:
        ModuleNotFoundError: Ray is not installed (extra `ray`).
    """
    import ray  # an extra; it starts processes of its own when it is used
    import ray.data

    def spread(work: Work, texts: Sequence[str]) -> Iterator[str]:
        if not ray.is_initialized():
            ray.init(address=address)
        if not texts:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        rows = ray.data.from_items([{"text": text} for text in texts], override_num_blocks=len(texts))
        try:
            for row in rows.map(lambda row: {"text": work(row["text"])}).iter_rows():
                yield str(row["text"])
        except ray.exceptions.RayError as error:
            raise TrainingError(f"Ray: {error}") from error

    return spread
