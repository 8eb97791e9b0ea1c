"""A repair of vLLM's attention on CPUs, loaded by vLLM itself in each of its processes (entry point
`vllm.general_plugins` of this distribution).

Gemma 3 lets the tokens of one image attend to one another in both directions. vLLM 0.32 does so on GPUs; its CPU
backend reads every prompt as plain causal text, says nothing, and gives other log-probabilities than transformers. Its
kernel knows better: it takes a causal flag for each sequence of a batch. So a sequence is handed to it in pieces, text
and images in turn, that share their keys. On any other platform nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

Piece: TypeAlias = tuple[int, int, bool]
"""Queries at positions [start, stop) of a sequence, and whether each sees all keys before `stop` (else only those up
to itself)."""


PLUGIN = "vlm2vla-images-on-cpu"
"""The entry point's name, which VLLM_PLUGINS has to hold when it is set."""
BACKEND = f"{__name__}_backend.ImageAwareCPUBackend"


def register() -> None:
    """Called by vLLM at the start of each of its processes; calling it again changes nothing."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)


def is_registered() -> bool:
    """Whether vLLM, told to load its plugins, has loaded this one."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    return bool(AttentionBackendEnum.CPU_ATTN.get_path() == BACKEND)


def pieces(begin: int, end: int, images: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    """Cut the queries at positions [begin, end) at the edges of the images, each given as (first, last) position.

    An image that begins before `begin` came partly from the prefix cache: its remaining queries still see all of it.
    """
    place = begin
    for first, last in sorted(images):
        start, stop = max(first, place), min(last + 1, end)
        if start >= stop:
            continue
        if place < start:
            yield place, start, False
        yield start, stop, True
        place = stop
    if place < end:
        yield place, end, False


def cut_at_images(batch: Any) -> Any:
    """vLLM's CommonAttentionMetadata with every sequence that holds image queries cut into pieces, each a sequence to
    the kernel; the same object when no query of the batch lies in an image (every decoding step)."""
    import torch

    images = batch.mm_req_doc_ranges
    if not images or batch.max_query_len <= 1:
        return batch
    starts, ends = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    rows: list[int] = []
    cuts: list[Piece] = []
    for row in range(batch.num_reqs):
        found = list(pieces(ends[row] - (starts[row + 1] - starts[row]), ends[row], images.get(row) or ()))
        rows += [row] * len(found)
        cuts += found
    if not any(whole for _, _, whole in cuts):
        return batch
    lengths = torch.tensor([0, *(stop - start for start, stop, _ in cuts)])
    query_starts = torch.cumsum(lengths, 0).to(batch.query_start_loc.dtype)
    return replace(
        batch,
        num_reqs=len(cuts),
        query_start_loc=query_starts,
        query_start_loc_cpu=query_starts,
        seq_lens=torch.tensor([stop for _, stop, _ in cuts], dtype=batch.seq_lens.dtype),
        block_table_tensor=batch.block_table_tensor[rows].contiguous(),
        causal=torch.tensor([not whole for _, _, whole in cuts], dtype=torch.int32),
        mm_req_doc_ranges=None,
    )
