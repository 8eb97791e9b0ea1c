"""A model folder's processor and chat template, for the engines that run a model themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from vlm2vla_schema.processors import end_of_turn, template_options, without_video
from vlm2vla_server.engines.base import Conversation, EngineStartError, PromptRefused


def quietly_load(factory: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` from a local folder, never from the network and never running code from the folder."""
    try:
        return factory.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as problem:
        raise EngineStartError(f"cannot load {factory.__name__} from {folder}: {problem}") from problem


def load_processor(folder: Path) -> Any:
    """Tokenizer, template and image processor of a model folder. A part for videos that cannot be loaded, for it needs
    torchvision, is left out: frames are pictures here. Raises EngineStartError."""
    try:
        return quietly_load(transformers.AutoProcessor, folder)
    except EngineStartError as problem:
        if not isinstance(problem.__cause__, ImportError):
            raise
        whole: Any = PROCESSOR_MAPPING.get(type(quietly_load(transformers.AutoConfig, folder)), None)
        if whole is None or "video_processor" not in whole.get_attributes():
            raise
    return quietly_load(without_video(whole), folder)


def apply_template(
    processor: Any, images: Sequence[NDArray[np.uint8]], conversation: Conversation, **options: Any
) -> Any:
    """The model's own chat template around a conversation, with the answer about to begin. Raises PromptRefused."""
    try:
        return processor.apply_chat_template(
            _messages(images, conversation), add_generation_prompt=True, **template_options(processor), **options
        )
    except jinja2.TemplateError as problem:
        raise PromptRefused(
            "the model's chat template refuses this order of turns; most want user and assistant in turn, the user "
            "first, after at most one system message"
        ) from problem


def _messages(images: Sequence[NDArray[np.uint8]], conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as processors take it."""
    waiting = iter(images)

    def part(text: str | None) -> dict[str, Any]:
        if text is None:
            return {"type": "image", "image": Image.fromarray(next(waiting))}
        return {"type": "text", "text": text}

    return [{"role": turn.role, "content": [part(text) for text in turn.parts]} for turn in conversation]


def picture_options(processor: Any) -> dict[str, Any]:
    """What the processor is told about every picture: it is whole, where it would otherwise cut crops out of it."""
    return {"do_pan_and_scan": False} if hasattr(processor.image_processor, "do_pan_and_scan") else {}


def reads_images_whole(processor: Any) -> bool:
    """Whether the model lets the tokens of an image attend to one another: its processor marks them by the name from
    which transformers makes such a mask."""
    return "token_type_ids" in processor(text=["?"])


def stop_ids(configured: Any, processor: Any) -> list[int]:
    """The template's end of turn first, then whatever else ends an answer. configured: `eos_token_id` of the
    checkpoint's generation settings: one id, several, or None. Raises EngineStartError when nothing ends an answer."""
    found = end_of_turn(processor) if getattr(processor, "chat_template", None) else None
    wanted = [found[0]] if found else []
    for source in (configured, processor.tokenizer.eos_token_id):
        many = source if isinstance(source, list) else [source]
        wanted.extend(int(i) for i in many if i is not None)
    if not wanted:
        raise EngineStartError("the model names no end-of-turn and no end-of-sequence token")
    return list(dict.fromkeys(wanted))
