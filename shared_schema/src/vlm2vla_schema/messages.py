"""Request and response of every endpoint of protocol 1 (docs/protocol.md).

Requests are strict: unknown fields are refused and nothing is coerced; an integer is a number, a boolean or a string is
not. Responses are read leniently in one respect: fields added by a newer server of the same protocol are ignored.
An image is base64 of JPEG, PNG or WebP bytes, or a base64 `data:` URL.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from vlm2vla_schema.errors import ErrorInfo
from vlm2vla_schema.limits import MAX_MOTION_PLAN_CHARS
from vlm2vla_schema.types import Confidence, ModelCard, Scenario

PROTOCOL = 1
MAX_IMAGES = 8
MAX_TEXT_CHARS = 2000
BASE_MODEL_NAME = "base"
"""Reserved value of `model`: the untouched VLM, without any adapter."""

# Sampling of appendix D.4 ("nucleus (top-p) sampling with p=0.95 ... distinct temperature settings").
TOP_P_POLICY = 0.95
TEMPERATURE_MOTION_PLAN = 0.1
TEMPERATURE_ACTIONS = 0.5
TEMPERATURE_SUBTASKS: dict[Scenario, float] = {"in_distribution": 0.5, "out_of_distribution": 1.0}
# The paper samples neither the verifier (D.5, a remote model) nor VQA (4.1); greedy answers are reproducible.
TOP_P_GREEDY = 1.0
TEMPERATURE_VERIFY = 0.0
TEMPERATURE_VQA = 0.0
DEFAULT_DEADLINE_MS = 60_000
DEFAULT_MAX_ATTEMPTS = 3
DEFAULT_MOTION_PLAN_MAX_TOKENS = 400

Text: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)]
MotionPlanText: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_MOTION_PLAN_CHARS)]
ImageText: TypeAlias = Annotated[str, Field(min_length=1)]
Temperature: TypeAlias = Annotated[float, Field(ge=0.0, le=2.0)]
EchoText: TypeAlias = Annotated[str, Field(max_length=200)]
WireRow: TypeAlias = Annotated[list[float], Field(min_length=4, max_length=4)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class GenerationFields(_Request):
    """What every generating endpoint accepts, the temperature apart.

    `model` null is the server's first adapter. `deadline_ms` counts from receipt. `seed`, `max_tokens` and sampling
    left null take the stage's defaults. The three ids are echoed; a newer /actions or /cycle of the same non-null
    `episode_id` cancels the older one.
    """

    model: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=600_000)] = DEFAULT_DEADLINE_MS
    max_attempts: Annotated[int, Field(ge=1, le=10)] = DEFAULT_MAX_ATTEMPTS
    constrained: bool = True
    request_id: EchoText | None = None
    episode_id: EchoText | None = None
    frame_id: EchoText | None = None


class SampledFields(GenerationFields):
    """`GenerationFields` and one temperature."""

    temperature: Temperature | None = None


class SubtasksRequest(SampledFields):
    """POST /subtasks (3.1, D.4)."""

    image: ImageText
    task: Text
    scenario: Scenario = "out_of_distribution"


class MotionPlanRequest(SampledFields):
    """POST /motion_plan (3.1, D.4)."""

    image: ImageText
    subtask: Text


class ActionsRequest(SampledFields):
    """POST /actions (3.1, D.4). `motion_plan` must be given; null only for adapters trained without that stage."""

    image: ImageText
    subtask: Text
    motion_plan: MotionPlanText | None


class CycleRequest(GenerationFields):
    """POST /cycle (D.6): motion plan, then actions. It has two temperatures and therefore refuses `temperature`."""

    image: ImageText
    subtask: Text
    motion_plan_temperature: Temperature | None = None
    actions_temperature: Temperature | None = None


class VerifyRequest(SampledFields):
    """POST /verify (D.5): images before and after the chunk. `next_subtask` must be given; null after the last one."""

    before: ImageText
    after: ImageText
    subtask: Text
    next_subtask: Text | None


class VqaRequest(SampledFields):
    """POST /vqa (4.1): a question about 0..8 images, as `image` or as `images`, not both."""

    question: Text
    image: ImageText | None = None
    images: Annotated[list[ImageText], Field(max_length=MAX_IMAGES)] | None = None

    @model_validator(mode="after")
    def _one_way_to_send_images(self) -> Self:
        if self.image is not None and self.images:
            raise ValueError("send image or images, not both")
        return self

    @property
    def all_images(self) -> list[str]:
        """The images of either field, in order."""
        return [self.image] if self.image is not None else list(self.images or [])


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Usage(_Answer):
    """Tokens, summed over attempts."""

    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)
    cached_tokens: int = Field(default=0, ge=0)


class TimingMs(_Answer):
    """Milliseconds; `first_token` counts from the start of generation, `total` from receipt. `parse`, the strict
    parser's own time, is a part of `generate`."""

    queue: float = Field(default=0.0, ge=0.0)
    preprocess: float = Field(default=0.0, ge=0.0)
    first_token: float = Field(default=0.0, ge=0.0)
    generate: float = Field(default=0.0, ge=0.0)
    parse: float = Field(default=0.0, ge=0.0)
    total: float = Field(default=0.0, ge=0.0)


class StageResult(_Answer):
    """What every generating endpoint's answer carries; `policy` only if the model card says it was trained to act."""

    model: str
    policy: bool
    prompt_version: str
    raw_text: str
    attempts: int = Field(ge=1)
    finish_reason: str
    usage: Usage
    timing_ms: TimingMs
    request_id: str | None = None
    episode_id: str | None = None
    frame_id: str | None = None


class SubtasksResponse(StageResult):
    """Answer of POST /subtasks."""

    subtasks: list[str] = Field(min_length=1)


class MotionPlanResponse(StageResult):
    """Answer of POST /motion_plan."""

    motion_plan: str


class ActionsResponse(StageResult):
    """Answer of POST /actions: rows [dx_m, dy_m, dz_m, gripper]."""

    actions: list[WireRow] = Field(min_length=1)


class CycleStages(_Answer):
    """The common fields of each stage of a cycle; `motion_plan` is null for adapters without that stage."""

    motion_plan: StageResult | None = None
    actions: StageResult


class CycleResponse(StageResult):
    """Answer of POST /cycle; attempts, usage and timing at the top level are sums over `stages`."""

    motion_plan: str | None
    actions: list[WireRow] = Field(min_length=1)
    stages: CycleStages


class VerifyResponse(StageResult):
    """Answer of POST /verify. `probability` of "done", 0 to 1, where the server asks for more than one half and the
    model said "done"; below what it asks for, `success` is false although `raw_text` says true."""

    success: bool
    confidence: Confidence
    reasoning: str
    probability: float | None = None


class VqaResponse(StageResult):
    """Answer of POST /vqa."""

    answer: str


class PlanEvent(_Answer):
    """The motion plan of a streamed cycle."""

    event: Literal["plan"] = "plan"
    motion_plan: str


class RowEvent(_Answer):
    """One row, sent as soon as its closing bracket is decoded."""

    event: Literal["row"] = "row"
    index: int = Field(ge=0)
    row: WireRow


class DoneEvent(CycleResponse):
    """The end of a streamed cycle: the full answer."""

    event: Literal["done"] = "done"


class ActionsDoneEvent(ActionsResponse):
    """The end of a streamed /actions: the full answer."""

    event: Literal["done"] = "done"


class ErrorEvent(_Answer):
    """The end of a stream that failed."""

    event: Literal["error"] = "error"
    error: ErrorInfo


CycleEvent: TypeAlias = PlanEvent | RowEvent | DoneEvent | ErrorEvent
ActionsEvent: TypeAlias = RowEvent | ActionsDoneEvent | ErrorEvent

_CYCLE_EVENT: TypeAdapter[CycleEvent] = TypeAdapter(Annotated[CycleEvent, Field(discriminator="event")])
_ACTIONS_EVENT: TypeAdapter[ActionsEvent] = TypeAdapter(Annotated[ActionsEvent, Field(discriminator="event")])


def parse_cycle_event(line: str | bytes) -> CycleEvent:
    """Read one line of a streamed /cycle; raises pydantic.ValidationError."""
    return _CYCLE_EVENT.validate_json(line)


def parse_actions_event(line: str | bytes) -> ActionsEvent:
    """Read one line of a streamed /actions; raises pydantic.ValidationError."""
    return _ACTIONS_EVENT.validate_json(line)


class AdapterInfo(_Answer):
    """One adapter of /info. `proven` when its effect on the model was measured before the server became ready."""

    name: str
    hash: str
    policy: bool
    proven: bool = False
    card: ModelCard


class LimitsInfo(_Answer):
    """The limits in force on this server."""

    max_row_translation_m: float
    max_rows: int
    max_images: int = MAX_IMAGES
    max_body_mb: float
    max_concurrency: int
    max_text_chars: int = MAX_TEXT_CHARS
    max_motion_plan_chars: int = MAX_MOTION_PLAN_CHARS


class InfoResponse(_Answer):
    """GET /info. `model` is the default of the request field `model`, `policy` and `image_size` (px) are its own."""

    protocol: int
    model: str
    policy: bool
    base_model: str | None = None
    base_hash: str | None = None
    stages: list[str] = Field(default_factory=list)
    adapters: list[AdapterInfo]
    prompt_versions: dict[str, str]
    limits: LimitsInfo
    units: dict[str, str]
    image_size: int
    engine: str
    versions: dict[str, str]


UNITS: dict[str, str] = {
    "actions": "[dx, dy, dz, gripper]; metres; robot base frame, +x forward, +y left, +z up; gripper 1 open, 0 closed",
    "translation": "m",
    "time": "ms",
    "image_size": "px",
}
"""Value of `InfoResponse.units`."""
