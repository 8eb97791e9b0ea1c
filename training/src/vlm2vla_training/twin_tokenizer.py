"""The twin model's own tokenizer: built like Gemma's, small, and trained on nothing but text that this project writes.

Digits stand alone, spaces become ``▁``, unknown characters fall back to bytes. The fixed parts of the paper's prompts
are one token each: they never vary, and a short prompt is what makes training and serving on two cores quick.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlm2vla_schema import prompts
from vlm2vla_schema.directions import DEGREES, NAMES
from vlm2vla_training import pretrain_data
from vlm2vla_twin.physics import UnreachableError, World
from vlm2vla_twin.truth import observe

SPECIALS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>",
)  # fmt: skip
ACTION_TOKENS = tuple(f"<unused{index}>" for index in range(6133, 6143))
"""Table 2's ten tokens for the digits 0..9 of the -AT variant."""
VOCABULARY = 1600
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_THINGS = ("Carrot", "Eggplant", "Banana", "Fish", "Yellow Plate", "Pan", "Pot", "Cup", "Spoon", "Sink")
_STEPS = (
    "Move to {a}", "Grasp {a}", "Lift {a}", "Move {a} to {b}", "Lower {a} to {b}", "Release {a}", "Place {a} on {b}",
    "Move {a} above {b}", "Retract",
)  # fmt: skip


def prompt_texts() -> list[str]:
    """The fixed stretches of every prompt that the model meets, longest first."""
    templates = (
        prompts.SUBTASKS_D4, prompts.MOTION_PLAN_D4, prompts.ACTIONS_D4, prompts.ACTIONS_WITHOUT_PLAN_D4,
        prompts.VERIFY_D5, prompts.VERIFY_LAST_D5, prompts.COMPLETION_B2, prompts.DIRECTION_B2,
    )  # fmt: skip
    stretches = {part for template in templates for part in re.split(r"\{[a-z_]+\}", template) if len(part) > 12}
    return sorted(stretches, key=lambda part: (-len(part), part))


def robot_words(count: int, seed: int = 1) -> Iterator[str]:
    """Subtask lists, motion plans and verdicts, for the vocabulary only; the base never sees them as answers."""
    rng = np.random.default_rng(seed)
    degrees = [word for _, word in DEGREES] + ["far "]
    answers = ["forward", "backward", "left", "right", "up", "down", "none", "yes", "no"]
    for _ in range(count):
        a, b = rng.choice(_THINGS, 2, replace=False)
        yield str([step.format(a=a, b=b) for step in rng.choice(_STEPS, 4, replace=False)])
        words = [str(rng.choice(degrees)) + str(rng.choice(pair)) for pair in NAMES]
        state = rng.choice(["open", "closed"])
        yield f"Move {words[0]}, {words[1]} and {words[2]}, gripper stays {state}."
        yield (
            f"Move {words[2]}, then close the gripper. Open the gripper, then move {words[0]}. "
            f"Hold still, gripper stays {state}."
        )
        yield '{"success": true, "confidence": "High", "reasoning": "The gripper is centered above the carrot."}'
        yield (
            '{"success": false, "confidence": "Medium", '
            '"reasoning": "The carrot is not lifted, released or on the plate."}'
        )
        yield ", ".join(str(word) for word in rng.choice(answers, 3))
        yield f"[[{rng.uniform(-0.05, 0.05):.3f}, {rng.uniform(-0.05, 0.05):.3f}, 0.0, 1.0], [0.0, 0.0, 0.05, 0.0]]"


def _corpus() -> Iterator[str]:
    rng = np.random.default_rng(0)
    for seed in range(300):
        spec, _ = pretrain_data.random_scene(seed)
        if not spec.objects:
            continue
        try:
            truth = observe(World(spec, settle_s=0.0))
        except UnreachableError:
            continue
        for question, answer in pretrain_data.conversation(truth, rng, turns=12):
            yield question
            yield answer
    yield from robot_words(400)


def train_tokenizer() -> Tokenizer:
    """Train the tokenizer; a deterministic function of this package's own text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[\[\]\"'{}.,:?-]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 40,
        special_tokens=[*SPECIALS, *ACTION_TOKENS, *bytes_],
        show_progress=False,
        min_frequency=2,
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁"],
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_plain_bytes(state, set(bytes_)))
    plain = ["\n", "\n\n", "\n\n\n", "\n\n\n\n", "user", "model", *prompt_texts()]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


def _plain_bytes(state: str, bytes_: set[str]) -> str:
    """Byte tokens are pieces of the BPE model, not special tokens, or decoding would drop them."""
    data = json.loads(state)
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in bytes_]
    return json.dumps(data, ensure_ascii=False)
