"""``ask``: one question about the live frame, to the base model and to the adapter, side by side."""

from __future__ import annotations

from typing import Any

from vlm2vla_client.cameras.base import Camera
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.policies.server import about_model, validated
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.messages import BASE_MODEL_NAME, InfoResponse, VqaResponse
from vlm2vla_schema.types import Frame

FRAME_AGE_S = 0.5
FRAME_TIMEOUT_S = 3.0
INFO_TIMEOUT_S = 5.0
ANSWER_DEADLINE_S = 60.0


def live_frame(camera: Camera) -> Frame:
    """The newest frame of a camera that is started and closed for it. Raises CameraError."""
    try:
        camera.start()
        return camera.latest(FRAME_AGE_S, FRAME_TIMEOUT_S)
    finally:
        camera.close()


def ask_both(connection: ServerConnection, frame: Frame, question: str, model: str | None) -> dict[str, str]:
    """The answers by model name: the base model's, then the adapter's (None: the server's default).

    Both get the same picture, byte for byte, at temperature 0 (the default of /vqa).

    Raises:
        PolicyError: no server, no such model, or no answer.
    """
    info = validated(InfoResponse, connection.get("/info", INFO_TIMEOUT_S))
    adapter = about_model(info, model)[0]
    images = {"image": encode_jpeg(frame.image)}
    answers: dict[str, str] = {}
    for name in dict.fromkeys((BASE_MODEL_NAME, adapter)):
        fields: dict[str, Any] = {"question": question, "model": name}
        answer = connection.post("/vqa", fields, images, ANSWER_DEADLINE_S)
        answers[name] = validated(VqaResponse, answer).answer
    return answers
