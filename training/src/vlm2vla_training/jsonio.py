"""JSON and JSON-lines files that survive a crash: whole-file writes are atomic, a torn last line is dropped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from vlm2vla_training.errors import DataError, UsageError

SETTINGS_FILE = "run.json"


def write_json(path: Path, value: object) -> None:
    """Write `value` so that a reader sees the old file or the whole new one. Blocks on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Parse one JSON file.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; expected a JSON file") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; an unfinished last line is left out.

    Raises:
        DataError: the file is missing, or a line other than the last is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; expected a JSON-lines file") from error
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{path} line {number} is {type(value).__name__}; expected an object")
        yield value


class JsonlAppender:
    """Append objects to a JSON-lines file, one flush a line. Opening drops a torn last line, so a resumed run
    continues behind the last whole object.
    """

    def __init__(self, path: Path, durable: bool = False) -> None:
        """Open or create `path`; `durable` waits until each line is on the disk: for what cannot be made again free."""
        self._durable = durable
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.seek(0)
        whole = self._file.read()
        self._file.truncate(whole.rfind(b"\n") + 1)

    def append(self, value: dict[str, Any]) -> None:
        """Write one object and flush it to the operating system."""
        self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        if self._durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> JsonlAppender:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def sha256_of_files(paths: list[Path]) -> str:
    """Hash the names and bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def same_run(out: Path, settings: dict[str, Any]) -> None:
    """Note what identifies a run in `out`; a folder that holds another run is refused.

    Raises:
        UsageError: the settings there are others.
    """
    path = out / SETTINGS_FILE
    if path.exists():
        before = read_json(path)
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        if changed:
            raise UsageError(f"{out} holds a run with other settings ({', '.join(changed)}); choose another --out")
    write_json(path, settings)
