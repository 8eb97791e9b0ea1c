"""lmms-eval, in an environment of its own, against our /v1: one process a model and task, its results read back.

lmms-eval grades a request that failed to the end like an answer: a run in which that happened is refused here. MMBench
has a judge pick the option where an answer names none; by default that would be OpenAI's server, with our key and the
model's answers. Here it is the base model on the same server.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2vla_schema.messages import BASE_MODEL_NAME
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.jsonio import read_json, read_jsonl
from vlm2vla_training.vqa.table1 import TABLE_1

FAILED_MARKS = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED]")
LOG_FILE = "lmms_eval.log"
_LOG_LINES = 15
# Runs in lmms-eval's environment: its version, and the metrics of every task asked about, as one line of JSON.
_CHECK = """
import importlib.metadata, json, sys
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
include = sys.argv[1] or None
index = TaskManager("ERROR", include).task_index
found = {}
for name in sys.argv[2:]:
    place = index.get(name, {}).get("yaml_path")
    config = load_yaml_config(place, mode="simple") if isinstance(place, str) and place != "-1" else None
    found[name] = None if config is None else [str(one["metric"]) for one in config.get("metric_list", [])]
print(json.dumps({"version": importlib.metadata.version("lmms-eval"), "metrics": found}))
"""


@dataclass(frozen=True)
class LmmsEval:
    """How lmms-eval is called.

    Attributes:
        python: the interpreter of its environment. url, api_key: of our server.
        at_once: requests under way at a time; above the server's `--max-concurrency` they are refused and sent again.
        limit: questions a task, 0 for all. include: folder with further task files, and where it is run.
    """

    python: Path
    url: str
    api_key: str | None
    at_once: int
    limit: int
    include: Path | None

    def check(self, tasks: Sequence[str]) -> tuple[str, dict[str, list[str] | None]]:
        """The installed version, and the metrics of each task, None for a name that it does not know.

        Raises:
            UsageError: there is no lmms-eval in that environment.
        """
        command = [str(self.python), "-c", _CHECK, str(self.include.resolve()) if self.include else "", *tasks]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=self._environment(), check=False)
        except OSError as error:
            raise UsageError(f"--lmms-python {self.python} cannot be started: {error.strerror}") from error
        if done.returncode:
            raise UsageError(f"--lmms-python {self.python}: lmms-eval cannot be loaded:\n{done.stderr[-1500:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        return str(answer["version"]), answer["metrics"]

    def score(self, model: str, task: str, metric: str | None, folder: Path) -> tuple[str, float, int]:
        """Run one task on one model, unless `folder` holds it already.

        Returns:
            The metric's name, its value as lmms-eval gives it, and how many questions were asked.

        Raises:
            DataError: lmms-eval failed, a request failed to the end, or the metric is not in its results. What it wrote
                is put aside as FOLDER.failed, so that the same command runs this part again.
        """
        if not list(folder.rglob("*_results.json")):
            self._run(model, task, folder)
        try:
            questions = refuse_failures(folder, task)
            name, value = read_metric(folder, task, metric)
        except DataError as error:
            raise DataError(f"{error}; see {_put_aside(folder)}") from error
        return name, value, questions

    def _run(self, model: str, task: str, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = f"model_version={model},base_url={self.url}/v1,num_concurrent={self.at_once}"
        command = [
            str(self.python), "-m", "lmms_eval", "--model", "openai", "--model_args", settings, "--tasks", task,
            "--batch_size", "1", "--log_samples", "--output_path", str(folder.resolve()),
        ]  # fmt: skip
        command += ["--limit", str(self.limit)] if self.limit else []
        command += ["--include_path", str(self.include.resolve())] if self.include else []
        with (folder / LOG_FILE).open("wb") as log:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment(), cwd=self.include, check=False
            )
        if done.returncode or not list(folder.rglob("*_results.json")):
            tail = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            told = "\n".join([*tail, f"see {_put_aside(folder)}"])
            raise DataError(f"lmms-eval ended with {done.returncode} on {task} ({model}):\n{told}")

    def _environment(self) -> dict[str, str]:
        """The caller's, without our own packages, with the key and the judge."""
        judge = {"OPENAI_API_URL": f"{self.url}/v1/chat/completions", "MODEL_VERSION": BASE_MODEL_NAME}
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        return {**kept, "API_TYPE": "openai", "OPENAI_API_KEY": self.api_key or "unused", **judge}


def missing(metrics: dict[str, list[str] | None]) -> list[str]:
    """What of Table 1 an installed lmms-eval lacks: tasks, and metrics of tasks."""
    found = []
    for one in TABLE_1:
        names = metrics.get(one.task)
        if names is None:
            found.append(f"{one.name}: no task {one.task}")
        elif one.metric not in names:
            found.append(f"{one.name}: {one.task} has {', '.join(names)}, not {one.metric}")
    return found


def refuse_failures(folder: Path, task: str) -> int:
    """Count the answers of a run.

    Raises:
        DataError: there are none, or a request failed to the end.
    """
    lines = [line for path in sorted(folder.rglob("*_samples_*.jsonl")) for line in read_jsonl(path)]
    failed = [line for line in lines if any(mark in json.dumps(line, ensure_ascii=False) for mark in FAILED_MARKS)]
    if failed:
        said = json.dumps(failed[0].get("filtered_resps"), ensure_ascii=False)[:200]
        raise DataError(f"{len(failed)} of {len(lines)} requests of {task} failed to the end, the first with {said}")
    if not lines:
        raise DataError(f"lmms-eval left no answers of {task}")
    return len(lines)


def read_metric(folder: Path, task: str, metric: str | None) -> tuple[str, float]:
    """A metric and its value from the newest results file; without a name, the first number of the task.

    Raises:
        DataError: it is not there, or is no number.
    """
    results: dict[str, Any] = read_json(sorted(folder.rglob("*_results.json"))[-1])["results"].get(task, {})
    numbers = {
        key.split(",")[0]: float(value)
        for key, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in key and "," in key
    }
    name = metric if metric is not None else next(iter(numbers), None)
    if name is None or name not in numbers:
        raise DataError(f"lmms-eval's results of {task} hold {sorted(numbers)}; expected {metric or 'a number'}")
    return name, numbers[name]


def _put_aside(folder: Path) -> Path:
    aside = folder.with_name(folder.name + ".failed")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
