"""Questions to the models of one server, over its OpenAI-shaped door: the same bytes for base and adapter."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import httpx
from PIL import Image

from vlm2vla_schema.images import to_base64
from vlm2vla_schema.messages import BASE_MODEL_NAME, InfoResponse
from vlm2vla_training.errors import DataError, UsageError
from vlm2vla_training.vqa.questions import Question

MAX_TOKENS = 24
_TIMEOUT_S = 120.0
_BUSY = (429, 503)
_BUSY_TRIES, _BUSY_WAIT_S = 20, 0.5


class Server:
    """One running server of ours (`vlm2vla-server serve`).

    Args:
        url: such as http://localhost:8000. api_key: its key, where it has one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=_TIMEOUT_S)

    def models(self, wanted: Sequence[str]) -> dict[str, str]:
        """The weights' hash of the base and of each adapter asked for, base first.

        Args:
            wanted: names of adapters; empty: the one that the server uses by default, if that is one.

        Raises:
            DataError: no server answers. UsageError: it has no such adapter.
        """
        try:
            response = self._client.get("/info").raise_for_status()
            info = InfoResponse.model_validate(response.json())
        except (httpx.HTTPError, ValueError) as error:
            raise DataError(f"{self.url}/info: {error}; expected a running vlm2vla-server") from error
        hashes = {adapter.name: adapter.hash for adapter in info.adapters}
        names = [name for name in (wanted or [info.model]) if name != BASE_MODEL_NAME]
        unknown = [name for name in names if name not in hashes]
        if unknown:
            raise UsageError(f"the server has the adapters {sorted(hashes)}; --models asks for {unknown}")
        return {BASE_MODEL_NAME: str(info.base_hash), **{name: hashes[name] for name in names}}

    def ask(self, model: str, question: Question, wording: str) -> str:
        """What a model says, greedily, in at most 24 tokens.

        Raises:
            DataError: the request failed; an answer that never came is not counted as wrong.
        """
        body = chat(model, question.texts[wording], question.picture)
        for _ in range(_BUSY_TRIES):
            try:
                response = self._client.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                raise DataError(f"{self.url} did not answer a question to {model!r}: {error}") from error
            if response.status_code not in _BUSY:
                break
            time.sleep(_BUSY_WAIT_S)
        if response.status_code != httpx.codes.OK:
            said = f"{response.status_code}: {response.text[:200]}"
            raise DataError(f"{self.url} answered a question to {model!r} with {said}")
        try:
            return str(response.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{self.url} did not answer with a chat completion: {response.text[:200]}") from error

    def ask_all(self, jobs: Sequence[tuple[str, Question, str]], at_once: int) -> Iterator[str]:
        """The answers in the order of the jobs (model, question, wording), `at_once` requests under way at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            try:
                yield from pool.map(lambda job: self.ask(*job), jobs)
            finally:
                pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Server:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self._client.close()


def chat(model: str, text: str, picture: Any) -> dict[str, Any]:
    """The body of one question: the picture as PNG, uint8 [H, W, 3], before the text."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    url = "data:image/png;base64," + to_base64(buffer.getvalue())
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {
        "model": model, "max_tokens": MAX_TOKENS, "temperature": 0, "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
