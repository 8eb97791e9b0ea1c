"""Runs what is missing of an evaluation, trial by trial, and writes its figures and its report."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm2vla_client.errors import ClientError, ConfigurationError
from vlm2vla_client.evaluation.options import EvalOptions
from vlm2vla_client.evaluation.parallel import Key, finished, stoppable
from vlm2vla_client.evaluation.report import write_report
from vlm2vla_client.evaluation.summary import Summary, read_summary, write_summary
from vlm2vla_client.evaluation.trial import PolicyMaker, ServerFailedError, run_trial
from vlm2vla_client.evaluation.trials import Trial, TrialLog, read_trials
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.machine import current_commit
from vlm2vla_client.policies.base import PolicyInfo
from vlm2vla_client.policies.server import ServerPolicy
from vlm2vla_client.recorder import write_json_atomic
from vlm2vla_client.sim import make_policy

CONFIG = "config.json"
RESTARTS = 2
MAX_PARALLEL = 64
RESTART_WAIT_S = 3.0

Told = Callable[[Trial, int, int], None]


def run_suite(
    options: EvalOptions,
    connection: ServerConnection | None = None,
    *,
    told: Told = lambda trial, done, wanted: None,
    maker: PolicyMaker = make_policy,
) -> Summary:
    """Runs every trial that ``options.out`` lacks, then writes ``summary.json`` and ``report.html``. Blocks.

    A trial whose server fails is started again, twice; after that the evaluation stops without counting it, and the
    same call continues there later. One that ends in a fault of arm or camera is started again too, then counted.

    Args:
        told: called after each trial with the trial, how many are done and how many are wanted.
        maker: gives the policy of a trial; replace it to measure a policy of one's own.

    Raises:
        ConfigurationError: the folder belongs to another evaluation, or a server is needed and none was given.
        ServerError: the server could not be reached, before or between trials.
    """
    if options.trials < 1:
        raise ConfigurationError(f"--trials must be at least 1, received {options.trials}")
    if not 1 <= options.parallel <= MAX_PARALLEL:
        raise ConfigurationError(f"--parallel must be 1 to {MAX_PARALLEL}, received {options.parallel}")
    if options.needs_server and connection is None:
        raise ConfigurationError("this policy or verifier needs a server: give --server URL")
    server = server_facts(connection, options.model) if options.needs_server and connection is not None else {}
    room = server.get("max_concurrency")
    if room is not None and options.parallel > room:
        raise ConfigurationError(f"--parallel {options.parallel}: this server takes {room} requests at once")
    with TrialLog(options.out) as log:
        _same_evaluation(options, server)
        done = {trial.key for trial in read_trials(options.out)}
        wanted = [(name, seed) for name in options.suites for seed in options.seeds]
        commit, stop = current_commit(), threading.Event()
        attempt = _Attempt(options, connection, commit, stoppable(maker, stop), stop)

        def run_one(key: Key) -> Trial:
            trial = attempt.until_counted(*key)
            log.append(trial)
            return trial

        missing = [key for key in wanted if key not in done]
        trials = finished(missing, run_one, options.parallel, stop)
        for count, trial in enumerate(trials, len(wanted) - len(missing) + 1):
            told(trial, count, len(wanted))
        summary, scored = write_summary(options.out, server)
        write_report(options.out, summary, scored)
    return summary


def rebuild(folder: Path) -> tuple[Summary, list[Trial]]:
    """Writes summary and report of an existing folder again, for instance after an override; returns them.

    Raises:
        ConfigurationError: the folder holds no trials.
    """
    _need_trials(folder)
    summary, trials = write_summary(folder, _stored(folder).get("server", {}))
    write_report(folder, summary, trials)
    return summary, trials


def read_evaluation(folder: Path) -> tuple[Summary, list[Trial]]:
    """Summary and trials of an existing folder; writes nothing.

    Raises:
        ConfigurationError: the folder holds no trials.
    """
    _need_trials(folder)
    return read_summary(folder, _stored(folder).get("server", {}))


def _need_trials(folder: Path) -> None:
    if not read_trials(folder):
        raise ConfigurationError(f"{folder} holds no trials")


@dataclass(frozen=True)
class _Attempt:
    """What every trial of this evaluation needs; used by several threads."""

    options: EvalOptions
    connection: ServerConnection | None
    commit: str | None
    maker: PolicyMaker
    stop: threading.Event

    def until_counted(self, name: str, seed: int) -> Trial:
        """One trial, started again after a fault that says nothing about the policy."""
        for attempt in range(RESTARTS + 1):
            last = attempt == RESTARTS
            try:
                trial = run_trial(self.options, name, seed, self.connection, commit=self.commit, maker=self.maker)
            except ServerFailedError:
                if last or self.stop.wait(RESTART_WAIT_S):
                    raise
                continue
            if last or trial.outcome not in ("robot", "camera"):
                return replace(trial, retries=attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")


def server_facts(connection: ServerConnection, model: str | None) -> dict[str, Any]:
    """What ``/info`` says about the model that is measured: name, hash, base, engine, versions.

    Raises:
        PolicyError: nobody answers, or another protocol.
    """
    info: PolicyInfo = ServerPolicy(connection, model=model).info()
    details = info.details
    adapters = [item for item in details.get("adapters", []) if item.get("name") == info.name]
    names = ("base_model", "base_hash", "engine", "versions", "image_size", "prompt_versions", "protocol")
    return {
        "model": info.name,
        "hash": adapters[0].get("hash") if adapters else None,
        "stages": list(info.stages),
        "trained_to_act": info.trained_to_act,
        "max_concurrency": details.get("limits", {}).get("max_concurrency"),
        **{name: details[name] for name in names if name in details},
    }


def _same_evaluation(options: EvalOptions, server: Mapping[str, Any]) -> None:
    """A folder holds the trials of one policy, verifier, model and mode only; suites and seeds may be added.

    Raises:
        ConfigurationError: it was begun with others.
    """
    identity = {
        "policy": options.policy,
        "verifiers": list(options.verifiers),
        "mode": options.mode,
        "max_cycles": options.max_cycles,
        "model": server.get("model"),
        "hash": server.get("hash"),
        "base_hash": server.get("base_hash"),
        **({"unnorm_key": options.unnorm_key} if options.unnorm_key is not None else {}),
    }
    stored = _stored(options.out).get("identity")
    if stored is not None and stored != identity:
        changed = [name for name in identity if stored.get(name) != identity[name]]
        raise ConfigurationError(
            f"{options.out} was begun with another {', '.join(changed)} "
            f"({', '.join(str(stored.get(name)) for name in changed)}); give another --out"
        )
    write_json_atomic(options.out / CONFIG, {"identity": identity, "server": server})


def _stored(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ClientError(f"{path} is not readable JSON: {error}") from None
    return value if isinstance(value, dict) else {}
