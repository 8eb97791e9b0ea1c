"""What one evaluation is: suites, seeds, policy, verifier. Frozen once, stored beside the trials."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.policies.baselines import BASELINES
from vlm2vla_twin.tasks import SUITES

MAX_CYCLES = 12
PAPER_TRIALS = 30
"""Trials of each policy and task in section 4.2; the three languages together have three times as many."""
POLICIES = ("server", "expert", "random", "swapped", *BASELINES)
VERIFIERS = ("server", "twin", "none")
LANGUAGES = tuple(name for name in SUITES if name.startswith("pick_carrot_"))
GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(SUITES),
    "languages": LANGUAGES,
    "in_distribution": tuple(name for name, suite in SUITES.items() if suite.scenario == "in_distribution"),
    "out_of_distribution": tuple(name for name, suite in SUITES.items() if suite.scenario == "out_of_distribution"),
}


@dataclass(frozen=True)
class EvalOptions:
    """One evaluation, as asked for.

    Attributes:
        suites: names of suites, in the order they are run.
        trials: trials of each suite, with the seeds ``seed`` .. ``seed + trials - 1``.
        mode: ``varied`` moves everything; ``paper`` keeps what D.1 keeps invariant.
        verifiers: names in the order of the chain.
        model: adapter name for the policy, None for the server's default.
        policy_server: where a baseline's own server answers.
        unnorm_key: whose statistics OpenVLA and ECoT scale by; None for BridgeData V2's.
        record: keep a full recording of every trial under ``out/episodes``.
        parallel: trials that run at once; what a trial shows does not depend on it.
    """

    suites: tuple[str, ...]
    trials: int
    seed: int
    out: Path
    policy: str = "server"
    verifiers: tuple[str, ...] = ("server",)
    model: str | None = None
    policy_server: str | None = None
    unnorm_key: str | None = None
    mode: Literal["varied", "paper"] = "varied"
    max_cycles: int = MAX_CYCLES
    record: bool = False
    parallel: int = 1

    @property
    def seeds(self) -> range:
        """The seeds of every suite."""
        return range(self.seed, self.seed + self.trials)

    @property
    def needs_server(self) -> bool:
        """Whether a server is asked for anything."""
        return self.policy in ("server", "swapped") or "server" in self.verifiers


def suites_of(text: str) -> tuple[str, ...]:
    """Suites by name, group (``all``, ``languages``, ``in_distribution``, ``out_of_distribution``) or a comma list.

    Raises:
        ConfigurationError: an unknown name.
    """
    names: list[str] = []
    for part in text.split(","):
        part = part.strip()
        if part not in SUITES and part not in GROUPS:
            raise ConfigurationError(f"unknown suite {part!r}; known are {', '.join([*SUITES, *GROUPS])}")
        names += GROUPS.get(part, (part,))
    return tuple(dict.fromkeys(names))


def trials_of(text: str) -> int:
    """A number of trials, or ``paper`` for the paper's.

    Raises:
        ValueError: neither.
    """
    return PAPER_TRIALS if text == "paper" else int(text)


def split_of(seed: int) -> str:
    """Which part of the seeds this one belongs to; nothing may be tuned on ``test``."""
    if seed < 500_000:
        return "training"
    return "development" if seed < 1_000_000 else "test"
