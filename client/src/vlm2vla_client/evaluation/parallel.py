"""Trials side by side: threads of one process, since a trial mostly waits for a server that answers many at once.

The physics of each trial runs in its own thread and on its own simulated clock, so what a trial shows does not depend
on how many run beside it; one OpenGL context draws for all of them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from vlm2vla_client.evaluation.trial import PolicyMaker
from vlm2vla_client.evaluation.trials import Trial
from vlm2vla_client.policies.base import Asked, CycleEvent, Policy, PolicyInfo, Scenario, SubtasksAnswer
from vlm2vla_schema.types import Frame

STOP_WAIT_S = 20.0
"""How long trials that must stop are waited for; they end at the next word of their answer."""

Key = tuple[str, int]
"""Suite and seed."""


def finished(
    keys: Sequence[Key], run_one: Callable[[Key], Trial], workers: int, stop: threading.Event
) -> Iterator[Trial]:
    """Runs ``run_one`` on each key and yields the trials as they end; the first error, or Ctrl-C, ends them all.

    Args:
        run_one: called in several threads at once when ``workers`` is above 1.
        stop: set when no trial may go on; ``run_one`` must then soon raise. Set at the end in any case.

    Raises:
        BaseException: what ``run_one`` raised first.
    """
    if workers <= 1:
        yield from map(run_one, keys)
        return
    waiting: queue.SimpleQueue[Key] = queue.SimpleQueue()
    for key in keys:
        waiting.put(key)
    ended: queue.SimpleQueue[Trial | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            while not stop.is_set():
                ended.put(run_one(waiting.get_nowait()))
        except queue.Empty:
            return
        except BaseException as error:  # raised where the trials are read, whatever it is
            ended.put(error)

    threads = [threading.Thread(target=work, name=f"trial-{n}", daemon=True) for n in range(min(workers, len(keys)))]
    for thread in threads:
        thread.start()
    try:
        for _ in keys:
            item = ended.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        for thread in threads:
            thread.join(STOP_WAIT_S)


def stoppable(maker: PolicyMaker, stop: threading.Event) -> PolicyMaker:
    """Policies that are interrupted, as by Ctrl-C, at the next word to or from them once ``stop`` is set.

    Ctrl-C itself reaches only the main thread.
    """
    return lambda request, world: StoppablePolicy(maker(request, world), stop)


class StoppablePolicy:
    """Another policy's answers until ``stop`` is set, then KeyboardInterrupt."""

    def __init__(self, policy: Policy, stop: threading.Event) -> None:
        self.name = policy.name
        self._policy = policy
        self._stop = stop

    def _check(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt

    def info(self) -> PolicyInfo:
        """The inner policy's."""
        return self._policy.info()

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """The inner policy's, unless it is time to stop."""
        self._check()
        return self._policy.subtasks(frame, task, scenario, asked)

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """The inner policy's, event by event, unless it is time to stop."""
        for event in self._policy.cycle(frame, subtask, asked):
            self._check()
            yield event

    def alive(self, timeout_s: float) -> bool:
        """The inner policy's."""
        return self._policy.alive(timeout_s)

    def close(self) -> None:
        """Closes the inner policy."""
        self._policy.close()
