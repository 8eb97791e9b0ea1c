"""Google's Batch mode as its documentation has it, for tests/gemini_server.py: files go up in two requests, a job of a
file is created, runs, and leaves a file of results behind.

Kept are the traps: creating twice makes two jobs, the list is paged, results come in no order, and an error inside them
carries a google.rpc code, not an HTTP status.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

_RPC_CODES = {400: 3, 404: 5, 429: 8, 499: 1, 500: 13, 503: 14}
_PAGE = 2


class _Captured:
    """What a reply writes, kept instead of sent."""

    def __init__(self) -> None:
        self.status = 0
        self.wfile = io.BytesIO()
        self.close_connection = False

    def send_response(self, status: int) -> None:
        self.status = status

    def send_header(self, name: str, value: str) -> None:
        """Headers have no place in a file of results."""

    def end_headers(self) -> None:
        """Nothing."""


@dataclass
class BatchJob:
    """A job as the server knows it; `looks`: how often it was asked for."""

    name: str
    display_name: str
    model: str
    file: str
    results: str
    looks: int = 0
    ended_as: str = "BATCH_STATE_SUCCEEDED"

    def state(self) -> str:
        return ("BATCH_STATE_PENDING", "BATCH_STATE_RUNNING", self.ended_as)[min(self.looks, 2)]

    def operation(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "name": self.name, "displayName": self.display_name, "model": self.model, "state": self.state(),
            "inputConfig": {"fileName": self.file}, "createTime": "2026-11-28T08:00:00Z",
        }  # fmt: skip
        if self.state() == "BATCH_STATE_SUCCEEDED":
            metadata["output"] = {"responsesFile": self.results}
        return {"name": self.name, "metadata": metadata, "done": self.looks >= 2}


@dataclass
class BatchBox:
    """Files and jobs. `happened` is told of upload, create, look, list and download once they have taken effect and
    before they are answered; True swallows the answer, and the caller sees a closed connection. `end_as` names the
    state in which the n-th job ends.
    """

    answer: Callable[[str, dict[str, str], dict[str, Any]], Callable[[BaseHTTPRequestHandler], None]]
    happened: Callable[[str], bool] = lambda _: False
    end_as: dict[int, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: list[BatchJob] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def post(self, handler: BaseHTTPRequestHandler, path: str, data: bytes, base: str) -> bool:
        """Handle a POST that belongs to Batch mode; False for all others."""
        url = urlsplit(path)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        if url.path == "/upload/v1beta/files":
            if headers["x-goog-upload-command"] == "start":
                upload = f"{base}/upload/v1beta/files?upload_id=files/f{len(self.files)}"
                self._send(handler, 200, {}, {"X-Goog-Upload-URL": upload, "X-Goog-Upload-Status": "active"})
                return True
            name = parse_qs(url.query)["upload_id"][0]
            self.files[name] = self.files.get(name, b"") + data
            last = "finalize" in headers["x-goog-upload-command"]
            file = {"file": {"name": name, "mimeType": "jsonl", "sizeBytes": str(len(data)), "state": "ACTIVE"}}
            self._tell(handler, "upload", file, {"X-Goog-Upload-Status": "final" if last else "active"})
            return True
        if match := re.fullmatch(r"/v1beta/(models/[^:]+):batchGenerateContent", url.path):
            self._tell(handler, "create", self._create(match[1], json.loads(data)["batch"]).operation())
            return True
        return False

    def get(self, handler: BaseHTTPRequestHandler, path: str) -> bool:
        """Handle a GET that belongs to Batch mode; False for all others."""
        url = urlsplit(path)
        if url.path == "/v1beta/batches":
            begin = int(parse_qs(url.query).get("pageToken", ["0"])[0])
            page: dict[str, Any] = {"operations": [job.operation() for job in self.jobs[begin : begin + _PAGE]]}
            if begin + _PAGE < len(self.jobs):
                page["nextPageToken"] = str(begin + _PAGE)
            self._tell(handler, "list", page)
        elif url.path.startswith("/v1beta/batches/"):
            job = next((job for job in self.jobs if job.name == url.path.removeprefix("/v1beta/")), None)
            if job is None:
                self._send(handler, 404, {"error": {"code": 404, "message": "no such job", "status": "NOT_FOUND"}})
                return True
            job.looks += 1
            self._tell(handler, "look", job.operation())
        elif match := re.fullmatch(r"/v1beta/(files/[^:]+):download", url.path):
            self._tell(handler, "download", self.files[match[1]])
        else:
            return False
        return True

    def delete(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        """Delete a file."""
        del self.files[path.removeprefix("/v1beta/")]
        self._send(handler, 200, {})

    def _create(self, model: str, batch: dict[str, Any]) -> BatchJob:
        with self._lock:
            number = len(self.jobs)
            file = batch["inputConfig"]["fileName"]
            job = BatchJob(f"batches/b{number}", batch["displayName"], model, file, f"files/r{number}")
            job.ended_as = self.end_as.get(number, job.ended_as)
            self.jobs.append(job)
        if job.ended_as == "BATCH_STATE_SUCCEEDED":
            lines = [json.loads(line) for line in self.files[job.file].splitlines()]
            results = [self._result(model, line) for line in reversed(lines)]
            self.files[job.results] = b"".join(json.dumps(one).encode() + b"\n" for one in results if one)
        return job

    def _result(self, model: str, line: dict[str, Any]) -> dict[str, Any] | None:
        captured = _Captured()
        reply = self.answer(f"/v1beta/{model}:generateContent", {}, line["request"])
        reply(cast("BaseHTTPRequestHandler", captured))
        if not captured.status:
            return None
        body = json.loads(captured.wfile.getvalue())
        if captured.status == 200:
            return {"key": line["key"], "response": body}
        return {"key": line["key"], "error": {"code": _RPC_CODES[captured.status], "message": body["error"]["message"]}}

    def _tell(
        self, handler: BaseHTTPRequestHandler, event: str, body: dict[str, Any] | bytes,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        if self.happened(event):
            handler.close_connection = True
            return
        self._send(handler, 200, body, headers)

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, body: dict[str, Any] | bytes,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
