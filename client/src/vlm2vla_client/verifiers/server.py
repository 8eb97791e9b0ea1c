"""The verifier that asks the server's own model (POST /verify, D.5 with the model itself as the judge)."""

from __future__ import annotations

from pydantic import ValidationError

from vlm2vla_client.errors import PolicyError, VerifierError
from vlm2vla_client.http import GRACE_S, ServerConnection
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.messages import VerifyResponse
from vlm2vla_schema.types import Frame, Verdict


class ServerVerifier:
    """Sends the pictures before and after to ``/verify``.

    Args:
        connection: shared with the policy; closed by its owner.
        model: adapter name, ``base``, or None for the server's default.
    """

    name = "server"
    checks = True

    def __init__(self, connection: ServerConnection, *, model: str | None = None) -> None:
        self._connection = connection
        self._model = model

    def verify(
        self, before: Frame, after: Frame, subtask: str, next_subtask: str | None, deadline_s: float
    ) -> Verdict:
        """One request; any error of the wire or of the answer's form becomes a VerifierError."""
        fields: dict[str, object] = {"subtask": subtask, "next_subtask": next_subtask}
        if self._model is not None:
            fields["model"] = self._model
        images = {"before": encode_jpeg(before.image), "after": encode_jpeg(after.image)}
        try:
            answer = self._connection.post("/verify", fields, images, max(0.1, deadline_s - GRACE_S))
        except PolicyError as error:
            raise VerifierError(f"/verify gave no verdict: {error}") from error
        try:
            verdict = VerifyResponse.model_validate(answer)
        except ValidationError as error:
            raise VerifierError(f"/verify did not answer with a verdict ({error.error_count()} fields wrong)") from None
        return Verdict(success=verdict.success, confidence=verdict.confidence, reasoning=verdict.reasoning)

    def close(self) -> None:
        """The connection belongs to the run."""
