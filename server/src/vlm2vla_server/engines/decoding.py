"""The pieces of one decoding step: pick a token, keep to a grammar, turn token ids into text."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import torch
import xgrammar

_RESERVED = re.compile(r"<unused\d+>")
MAX_GRAMMARS = 32
"""Compiled grammars kept: the stages' own, and some that callers of /v1 bring."""
_TURN_MARKS = ("<start_of_turn>", "<end_of_turn>")


def pick_token(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Sample one token id. logits: [vocabulary], any float type, -inf where forbidden.

    temperature 0 takes the likeliest. Otherwise nucleus sampling: the smallest set of tokens whose probabilities
    reach top_p (appendix D.4). No top_k, no repetition penalty. Sampling is done in float32 on the CPU so that a seed
    means the same on every device.
    """
    if temperature <= 0.0:
        return int(torch.argmax(logits))
    probabilities = torch.softmax(logits.to("cpu", torch.float32) / temperature, dim=-1)
    if top_p < 1.0:
        ordered, order = torch.sort(probabilities, descending=True)
        before = torch.cumsum(ordered, dim=-1) - ordered
        kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
        return int(order[torch.multinomial(kept, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


class GrammarCache:
    """Grammars compiled for one tokenizer, the newest MAX_GRAMMARS kept. `width` is the model's number of logits, which
    may exceed the tokenizer's vocabulary: the surplus is masked too."""

    def __init__(self, tokenizer: Any, width: int, stop_ids: Sequence[int]) -> None:
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=width, stop_token_ids=list(stop_ids))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self._width = width
        self._compiled: dict[str, xgrammar.CompiledGrammar] = {}
        self._lock = threading.Lock()

    def constraint(self, grammar: str) -> Constraint:
        """A fresh constraint for one generation. Raises RuntimeError on EBNF that xgrammar cannot read."""
        with self._lock:
            compiled = self._compiled.pop(grammar, None)
            if compiled is None:
                compiled = self._compiler.compile_grammar(grammar)
            self._compiled[grammar] = compiled  # the last is the newest
            while len(self._compiled) > MAX_GRAMMARS:
                del self._compiled[next(iter(self._compiled))]
        return Constraint(compiled, self._width)


class Constraint:
    """The grammar's state along one generation."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, width: int) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = xgrammar.allocate_token_bitmask(1, width)

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [vocabulary] on the CPU in float32; forbidden entries become -inf, in place."""
        self._matcher.fill_next_token_bitmask(self._bitmask)
        xgrammar.apply_token_bitmask_inplace(logits.unsqueeze(0), self._bitmask)
        return logits

    def accept(self, token: int) -> None:
        """Advance by the chosen token. Raises RuntimeError if the grammar refuses it (a bug: it was masked)."""
        if not self._matcher.accept_token(token):
            raise RuntimeError(f"the grammar refused token {token}, which its own mask had allowed")


class Detokenizer:
    """Token ids to text, piece by piece; the pieces joined are the text of all ids at once.

    A character whose bytes are spread over several tokens is held back until complete. Control tokens give no text;
    reserved ones (`<unused6133>`, the digits of Table 2) do, whatever the tokenizer calls them.
    """

    def __init__(self, tokenizer: Any, silent: frozenset[int]) -> None:
        """silent: ids that give no text, see `control_tokens`."""
        self._tokenizer = tokenizer
        self._silent = silent
        self._ids: list[int] = []
        self._context = 0
        self._done = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if token in self._silent:
            return ""
        self._ids.append(token)
        return self._advance(hold=True)

    def flush(self) -> str:
        """Whatever was held back, at the end of the generation."""
        return self._advance(hold=False)

    def _advance(self, *, hold: bool) -> str:
        before = self._decode(self._ids[self._context : self._done])
        after = self._decode(self._ids[self._context :])
        if hold and after.endswith("\ufffd"):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def control_tokens(tokenizer: Any, stop_ids: Sequence[int]) -> dict[int, str]:
    """Id -> text of the tokens that steer the model rather than say something: special ones, turn marks, stops.

    The reserved `<unusedN>` are not among them: the digits of Table 2 are written with these.
    """
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    found.update({i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special})
    vocabulary = tokenizer.get_vocab()
    found.update({vocabulary[mark]: mark for mark in _TURN_MARKS if mark in vocabulary})
    found.update({i: tokenizer.convert_ids_to_tokens(i) for i in stop_ids})
    return {int(i): str(text) for i, text in found.items() if not _RESERVED.fullmatch(str(text))}
