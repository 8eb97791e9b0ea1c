"""One thread that does all model work, so that the event loop never does any.

Jobs run one at a time in the order they came. A job streams items back to the event loop and is told when nobody
listens any more; it then has to return at its next check (one token).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vlm2vla_server.engines.base import GenerationError

T = TypeVar("T")
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class Outlet(Generic[T]):
    """The worker's end of one stream. `put` never blocks; `aborted` turns true when the reader has gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._abort = threading.Event()
        self.items: asyncio.Queue[T | _End] = asyncio.Queue()

    @property
    def aborted(self) -> bool:
        """Whether the reader has gone."""
        return self._abort.is_set()

    def abort(self) -> None:
        """Called by the reader."""
        self._abort.set()

    def put(self, item: T | _End) -> None:
        """Hand one item to the event loop; dropped when the loop has closed meanwhile."""
        try:
            self._loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:
            self._abort.set()


class Worker:
    """The thread and its queue. `stream` and `call` are used on the event loop.

    The thread dies of whatever is no ordinary error (anything but an Exception), and of errors after which, `fatal`
    says, nothing works any more; every reader then gets a GenerationError, and `wait_dead` returns.
    """

    def __init__(self, name: str, fatal: Callable[[BaseException], bool] = lambda problem: False) -> None:
        self._fatal = fatal
        self._death: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._death.set_running_or_notify_cancel()  # a reader that stops waiting must not cancel it for the others
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._outlets: set[Outlet[object]] = set()
        self.running = 0
        self.waiting = 0

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def close(self) -> None:
        """Abort every job and wait at most CLOSE_TIMEOUT_S for the thread. Blocks: call it off the event loop."""
        if not self._closed.is_set():
            self._closed.set()
            with self._lock:
                for outlet in self._outlets:
                    outlet.abort()
            self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    async def wait_dead(self) -> str:
        """Wait until the thread has ended without having been closed; returns why."""
        return await asyncio.wrap_future(self._death)

    def _run(self) -> None:
        why = "its thread ended"
        try:
            while (job := self._jobs.get()) is not None:
                with self._lock:
                    self.waiting -= 1
                self.running = 1
                try:
                    job()
                finally:
                    self.running = 0
        except BaseException as problem:
            why = f"{type(problem).__name__} ended its thread"
        finally:
            if not self._closed.is_set():
                self._die(why)

    def _die(self, why: str) -> None:
        with self._lock:
            outlets = list(self._outlets)
            self.waiting = 0
            self._death.set_result(why)
        for outlet in outlets:
            outlet.put(_End(GenerationError("the engine died")))

    def _check_alive(self) -> None:
        if self._death.done():
            raise GenerationError("the engine died")
        if self._closed.is_set():
            raise GenerationError("the engine is shutting down")

    async def stream(self, work: Callable[[Outlet[T]], None]) -> AsyncIterator[T]:
        """Run `work` on the thread and yield what it puts. Leaving the loop early aborts the job."""
        self._check_alive()
        outlet: Outlet[T] = Outlet(asyncio.get_running_loop())
        self._submit(work, outlet)
        try:
            while True:
                item = await outlet.items.get()
                if isinstance(item, _End):
                    if item.error is not None:
                        raise item.error
                    return
                yield item
        finally:
            outlet.abort()
            with self._lock:
                self._outlets.discard(outlet)

    def _submit(self, work: Callable[[Outlet[T]], None], outlet: Outlet[T]) -> None:
        def job() -> None:
            error: BaseException | None = None
            try:
                if not outlet.aborted:
                    work(outlet)
            except BaseException as problem:  # carried to the reader, who raises it
                error = problem
            if error is None and self._closed.is_set():
                error = GenerationError("the engine is shutting down")
            if error is not None and (not isinstance(error, Exception) or self._fatal(error)):
                outlet.put(_End(GenerationError("the engine died")))
                raise error
            outlet.put(_End(error))

        with self._lock:
            if self._death.done():
                raise GenerationError("the engine died")
            self._outlets.add(outlet)  # type: ignore[arg-type]  # a set of outlets of any item type
            self.waiting += 1
        self._jobs.put(job)

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the thread and return its result."""

        def once(outlet: Outlet[T]) -> None:
            outlet.put(work())

        result: list[T] = []
        async for item in self.stream(once):
            result.append(item)
        return result[0]
