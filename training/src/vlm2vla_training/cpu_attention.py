"""Attention for training on a CPU: transformers' SDPA, computed in float32 under a bfloat16 autocast.

torch's bfloat16 kernel for CPUs takes two (270 tokens) to five times (64 tokens) as long, forward and backward
together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CPU_ATTENTION = "sdpa_float32"
"""Name for `attn_implementation`; known to transformers once this module is imported."""


def _float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    with torch.autocast("cpu", enabled=False):
        mixed, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return mixed.to(query.dtype), weights


ALL_ATTENTION_FUNCTIONS.register(CPU_ATTENTION, _float32)
ALL_MASK_ATTENTION_FUNCTIONS.register(CPU_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
