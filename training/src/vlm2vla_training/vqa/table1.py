"""Table 1: its twelve benchmarks by lmms-eval's names, its figures, and the share that a fine-tune keeps of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CHECKED_WITH = "0.7.3"
"""The version of lmms-eval in which every name and metric below was found."""


@dataclass(frozen=True)
class Benchmark:
    """One column of Table 1.

    Attributes:
        name: as printed. task, metric: lmms-eval's.
        scale: lmms-eval's value times this is in the unit of the table (per cent; MME: points of its perception part).
        paper_base, paper_ours, paper_at: Gemma-3-12B-IT, VLM2VLA and VLM2VLA-AT as printed.
    """

    name: str
    task: str
    metric: str
    scale: float
    paper_base: float
    paper_ours: float
    paper_at: float


TABLE_1: tuple[Benchmark, ...] = (
    Benchmark("MMMU", "mmmu_val", "mmmu_acc", 100.0, 46.0, 42.7, 45.9),
    Benchmark("MMStar", "mmstar", "average", 100.0, 46.3, 48.0, 45.2),
    Benchmark("MME", "mme", "mme_perception_score", 1.0, 1182.3, 1391.7, 1082.2),
    Benchmark("OCRBench", "ocrbench", "ocrbench_accuracy", 100.0, 75.0, 63.9, 65.5),
    Benchmark("MMB-en", "mmbench_en_dev", "gpt_eval_score", 1.0, 76.9, 68.5, 70.9),
    Benchmark("MMB-cn", "mmbench_cn_dev", "gpt_eval_score", 1.0, 74.7, 67.6, 66.8),
    Benchmark("TextVQA", "textvqa_val", "exact_match", 100.0, 68.9, 64.9, 64.2),
    Benchmark("DocVQA", "docvqa_val", "anls", 100.0, 80.6, 78.4, 74.6),
    Benchmark("InfoVQA", "infovqa_val", "anls", 100.0, 50.4, 46.2, 44.8),
    Benchmark("AI2D", "ai2d", "exact_match", 100.0, 78.5, 74.0, 74.1),
    Benchmark("ChartQA", "chartqa", "relaxed_overall", 100.0, 55.1, 58.3, 41.8),
    Benchmark("RealWorldQA", "realworldqa", "exact_match", 100.0, 50.6, 43.3, 44.5),
)


def share(base: float, tuned: float) -> float | None:
    """The share of the base's score that the fine-tuned model keeps, 1.0 for all of it; None where the base has 0."""
    return tuned / base if base > 0 else None


@dataclass(frozen=True)
class Retention:
    """Shares by benchmark with their minimum and plain mean; both None when no benchmark has a share."""

    shares: dict[str, float | None]
    minimum: float | None
    mean: float | None


def retention(base: Mapping[str, float], tuned: Mapping[str, float]) -> Retention:
    """What is kept on the benchmarks that both have.

    Args:
        base, tuned: score by benchmark, in one unit.
    """
    shares = {name: share(base[name], tuned[name]) for name in base if name in tuned}
    known = [value for value in shares.values() if value is not None]
    return Retention(shares, min(known, default=None), sum(known) / len(known) if known else None)


def paper_retention(variant: str = "main") -> Retention:
    """The paper's own: minimum 85.2 % and mean 95.6 % for "main", 75.9 and 90.9 % for "at"."""
    base = {one.name: one.paper_base for one in TABLE_1}
    return retention(base, {one.name: one.paper_at if variant == "at" else one.paper_ours for one in TABLE_1})
