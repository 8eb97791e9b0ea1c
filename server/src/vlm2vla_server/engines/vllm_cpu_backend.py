"""vLLM's CPU attention backend with `vllm_cpu.cut_at_images` before it. Imported by vLLM, by name."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder

from vlm2vla_server.engines.vllm_cpu import cut_at_images


class ImageAwareMetadataBuilder(CPUAttentionMetadataBuilder):
    """Describes a batch to the kernel."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As the parent, image by image."""
        return super().build(common_prefix_len, cut_at_images(common_attn_metadata), fast_build)


class ImageAwareCPUBackend(CPUAttentionBackend):
    """What vLLM looks up under CPU_ATTN."""

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Images attend in both directions."""
        return True

    @staticmethod
    def get_builder_cls() -> type[ImageAwareMetadataBuilder]:
        """The builder above."""
        return ImageAwareMetadataBuilder
