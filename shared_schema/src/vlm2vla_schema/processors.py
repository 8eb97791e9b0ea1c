"""What training and serving read from a model's own processor: chat template, token types, the parts it has.

A processor here is what transformers calls one; nothing of transformers is imported.
"""

from __future__ import annotations

from typing import Any

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Names under which processors mark what each token is of: 0 text, 1 a picture."""
_ANSWER = "vlm2vla"
_THINKING = "enable_thinking"


def template_options(processor: Any) -> dict[str, Any]:
    """What every rendering of the template is told: not to let the model think, if it can choose. Templates that do not
    ask get nothing: transformers takes what they do not read for the processor's."""
    return {_THINKING: False} if _THINKING in str(processor.chat_template) else {}


def _rendered(processor: Any, answered: bool) -> str:
    """A question, and its answer or what stands before one."""
    turns = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    if answered:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]})
    options = template_options(processor)
    return str(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered, **options))


def end_of_turn(processor: Any) -> tuple[int, str] | None:
    """Id and text of the token that the template writes behind an answer; None when no added token stands there."""
    told = _rendered(processor, answered=True)
    behind = told[told.rindex(_ANSWER) + len(_ANSWER) :]
    tokenizer = processor.tokenizer
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    added = {int(number): str(text) for text, number in tokenizer.get_added_vocab().items()}
    return (int(ids[0]), added[int(ids[0])]) if ids and int(ids[0]) in added else None


def answers_at_once(processor: Any) -> bool:
    """Whether an answer stands right behind the prompt. Not so in templates that open a thought there: what is trained
    as an answer would be read as a thought."""
    return _rendered(processor, answered=True).startswith(_rendered(processor, answered=False) + _ANSWER)


def without_video(processor_class: Any) -> Any:
    """A processor class with a constructor that knows no video part: transformers reads from its parameters what to
    load. For models whose part for videos needs torchvision; frames are pictures here."""

    class Pictures(processor_class):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template)

    return Pictures
