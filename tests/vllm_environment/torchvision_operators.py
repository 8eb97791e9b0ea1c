"""For .venv-vllm only: declares the operators that torchvision's Python part registers shapes for.

vLLM imports torchvision. The package index has no build of it for a CPU torch, and the CUDA build cannot load its
compiled part here: its import then fails at the first operator that nobody has declared. Nothing calls them. A .pth
file imports this module at the start of every Python of that environment; torch is imported only when torchvision is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OPERATORS = (
    "nms", "qnms", "roi_align", "qroi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward",
    "roi_pool", "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d",
    "_deform_conv2d_backward",
)  # fmt: skip
_kept: list[object] = []  # a torch library takes its declarations back when it is collected


class BeforeTorchvision(MetaPathFinder):
    """Finds nothing; declares the operators the moment torchvision is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called for every import."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            make: Callable[[str, str], Any] = torch.library.Library  # torch leaves it untyped
            library = make("torchvision", "DEF")
            for name in OPERATORS:
                library.define(f"{name}(Tensor input) -> Tensor")
            _kept.append(library)
        return None


sys.meta_path.insert(0, BeforeTorchvision())
