"""Gemini as the verifier, as in the paper (appendix D.5): both pictures and the D.5 prompt in, its JSON out.

Google's library (google-genai) is trusted with the wire only. Its ``response.parsed`` is None for an answer that is no
JSON, without an error, and it retries nothing unless told to: text, finish reason, retries and the deadline are ours.
An answer that is not exactly a verdict is an error and never a success.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from typing import TYPE_CHECKING, Any

from vlm2vla_client.errors import ConfigurationError, VerifierError
from vlm2vla_client.verifiers.base import Notes
from vlm2vla_client.verifiers.gemini_answer import MAX_MESSAGE_CHARS, Call, Cost, judge
from vlm2vla_client.verifiers.gemini_settings import EXTRA, GeminiSettings, account
from vlm2vla_schema.gemini import (
    KEY_VARIABLES,
    PASSING_STATUS,
    Tokens,
    api_key,
    asked_to_wait_s,
    cost_usd,
    is_transport_error,
)
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.limits import CONFIDENCES, MAX_REASONING_CHARS
from vlm2vla_schema.prompts import verify_prompt, verify_prompt_version
from vlm2vla_schema.types import Frame, Verdict

if TYPE_CHECKING:
    from google.genai import Client
    from google.genai.types import GenerateContentResponse

ATTEMPTS = 3
CLOUD_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
FIRST_WAIT_S = 1.0
#: Google refuses a request whose own time limit is shorter ("Minimum allowed deadline is 10s").
MIN_SERVER_TIMEOUT_S = 10.0
#: An attempt with less time than this would be paid for and not waited for.
MIN_ATTEMPT_S = 1.0
#: D.5's three fields in its order, in Google's own form of a schema.
RESPONSE_SCHEMA: dict[str, Any] = {
    "type": "OBJECT",
    "properties": {
        "success": {"type": "BOOLEAN"},
        "confidence": {"type": "STRING", "enum": list(CONFIDENCES)},
        "reasoning": {"type": "STRING", "description": f"At most {MAX_REASONING_CHARS} characters."},
    },
    "required": ["success", "confidence", "reasoning"],
    "propertyOrdering": ["success", "confidence", "reasoning"],
}


class GeminiVerifier:
    """Asks Gemini, with retries and a doubling wait inside one deadline.

    Consent is the caller's matter (``outside.open_outside``): this class sends what it is given.

    Args:
        settings: model, account, prices.
        attempts: requests for one verdict at most.
        first_wait_s: before the second request; doubles each time, with a random part.

    Raises:
        ConfigurationError: google-genai is not installed, or there is no key, or no credentials for the Vertex project.
    """

    name = "gemini"
    checks = True

    def __init__(
        self, settings: GeminiSettings, *, attempts: int = ATTEMPTS, first_wait_s: float = FIRST_WAIT_S
    ) -> None:
        try:
            import google.genai  # noqa: F401 - takes seconds; here, so that it is paid before anything moves
        except ImportError as error:
            raise ConfigurationError(f"{EXTRA} ({error})") from None
        self._key = None if settings.project is not None else api_key()
        if settings.project is None and self._key is None:
            raise ConfigurationError(
                f"the verifier gemini needs an API key in the environment ({' or '.join(KEY_VARIABLES)}), or project "
                "and location under [gemini] in client.toml for Vertex AI"
            )
        self._settings = settings
        self._attempts = attempts
        self._first_wait_s = first_wait_s
        try:
            self._client: Client | None = self._connect()
        except Exception as error:  # Google's libraries raise many kinds for credentials that are missing or unreadable
            raise ConfigurationError(
                f"no connection to {account(settings)} can be made: {type(error).__name__}: {self._clean(str(error))}"
            ) from None
        self._notes: Notes | None = None
        self.cost = Cost()

    def note_in(self, notes: Notes) -> None:
        """Records every call there from now on."""
        self._notes = notes

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        """The verdict, within ``deadline_s`` over all attempts.

        Raises:
            VerifierError: no valid verdict in time; ``again`` is False when asking again would not help.
        """
        ends_s = time.monotonic() + deadline_s
        images = [encode_jpeg(before.image), encode_jpeg(after.image)]
        prompt = verify_prompt(subtask, next_subtask)
        call = Call("timeout", f"no time was left of {deadline_s:g} s", again=True)
        for attempt in range(1, self._attempts + 1):
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                break
            began_s = time.monotonic()
            call = self._ask(images, prompt, left_s)
            self._record(call, attempt, time.monotonic() - began_s, verify_prompt_version(next_subtask))
            if call.verdict is not None:
                return call.verdict
            if not call.again or attempt == self._attempts:
                break
            wait_s = max(self._first_wait_s * 2 ** (attempt - 1) * random.uniform(1.0, 1.5), call.wait_s)
            if time.monotonic() + wait_s + MIN_ATTEMPT_S >= ends_s:
                raise VerifierError(f"{call.message}; no time for another attempt within {deadline_s:g} s")
            time.sleep(wait_s)
        raise VerifierError(call.message, again=call.again)

    def _ask(self, images: list[bytes], prompt: str, left_s: float) -> Call:
        """One request, in a thread of its own: the library's time limit is one of silence, not of the whole."""
        from google.genai.errors import APIError

        box: queue.SimpleQueue[GenerateContentResponse | Exception] = queue.SimpleQueue()
        client = self._client = self._client or self._connect()

        def ask() -> None:
            try:
                box.put(self._generate(client, images, prompt, left_s))
            except Exception as error:
                box.put(error)

        threading.Thread(target=ask, name="gemini", daemon=True).start()
        try:
            answer = box.get(timeout=left_s)
        except queue.Empty:
            self.close()  # ends the request that nobody waits for any more
            return Call("timeout", f"{self._settings.model} gave no answer within {left_s:.1f} s", again=True)
        except BaseException:
            self.close()
            raise
        if isinstance(answer, APIError):
            return self._refused(answer)
        if isinstance(answer, Exception):
            return self._failed(answer)
        return judge(answer)

    def _failed(self, error: Exception) -> Call:
        """No answer, or a body that Google's library could not read."""
        what = f"{type(error).__name__}: {error}"
        if not is_transport_error(error):
            return Call("invalid", self._clean(f"Google's answer cannot be read: {what}"), again=True)
        kind = "timeout" if "Timeout" in type(error).__name__ else "network"
        return Call(kind, self._clean(f"no answer from Google: {what}"), again=True)

    def _generate(
        self, client: Client, images: list[bytes], prompt: str, left_s: float
    ) -> GenerateContentResponse:
        from google.genai import types

        parts = [types.Part.from_bytes(data=data, mime_type="image/jpeg") for data in images]
        content = types.Content(role="user", parts=[*parts, types.Part.from_text(text=prompt)])
        config = types.GenerateContentConfig(
            response_mime_type="application/json",
            response_schema=RESPONSE_SCHEMA,
            max_output_tokens=self._settings.max_output_tokens,
            automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
            http_options=types.HttpOptions(
                timeout=max(1, int(1000 * left_s)),
                headers={"X-Server-Timeout": f"{max(left_s, MIN_SERVER_TIMEOUT_S):.0f}"},
            ),
        )
        return client.models.generate_content(model=self._settings.model, contents=content, config=config)

    def _connect(self) -> Client:
        from google.genai import Client

        settings = self._settings
        if settings.project is not None:
            import google.auth  # now, not at the first verdict, where the library itself would look for credentials

            found, _ = google.auth.default(scopes=[CLOUD_SCOPE])
            return Client(vertexai=True, credentials=found, project=settings.project, location=settings.location)
        return Client(vertexai=False, api_key=self._key)

    def _refused(self, error: Any) -> Call:
        code = int(error.code or 0)
        said = f"{code} {error.status or ''}".strip()
        message = self._clean(f"Google answered {said}: {error.message or 'no message'}")
        again = code in PASSING_STATUS
        free = Tokens(0, 0, 0)  # an error answer is not billed
        return Call("http_error" if again else "refused", message, again, asked_to_wait_s(error), tokens=free)

    def _clean(self, text: str) -> str:
        """``text`` without the key, should somebody have echoed it, and not too long for a line."""
        return (text.replace(self._key, "[key]") if self._key else text)[:MAX_MESSAGE_CHARS]

    def _record(self, call: Call, attempt: int, seconds: float, prompt_version: str) -> None:
        usd = cost_usd(call.tokens, self._settings.prices.get(self._settings.model))
        self.cost.add(call.tokens, usd)
        if self._notes is None:
            return
        self._notes.record(
            "verifier_call",
            verifier=self.name,
            model=self._settings.model,
            attempt=attempt,
            prompt_version=prompt_version,
            outcome=call.outcome,
            message=call.message,
            finish_reason=call.finish_reason,
            raw_text=call.text,
            prompt_tokens=call.tokens.prompt,
            output_tokens=call.tokens.output,
            thought_tokens=call.tokens.thought,
            usd=usd,
            seconds=seconds,
            total=self.cost,
        )

    def problem(self, timeout_s: float) -> str | None:
        """Why Google would not answer, found by asking about the model: no picture is sent, nothing is billed."""
        from google.genai import types
        from google.genai.errors import APIError

        options = types.HttpOptions(
            timeout=int(1000 * timeout_s),
            headers={"X-Server-Timeout": f"{max(timeout_s, MIN_SERVER_TIMEOUT_S):.0f}"},
        )
        client = self._client = self._client or self._connect()
        try:
            client.models.get(model=self._settings.model, config=types.GetModelConfig(http_options=options))
        except APIError as error:
            return self._refused(error).message
        except Exception as error:  # two HTTP libraries and Google's credentials raise nearly anything
            return self._clean(f"no answer from Google: {type(error).__name__}: {error}")
        return None

    def close(self) -> None:
        """Closes the connection; a later call opens another."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
