"""The verifiers outside this machine's model and simulator, made before anything starts: gemini and human."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.verifiers.base import Verifier
from vlm2vla_client.verifiers.gemini import GeminiVerifier
from vlm2vla_client.verifiers.gemini_settings import GeminiSettings, has_consented, notice
from vlm2vla_client.verifiers.human import HumanVerifier

CONSENT_HINT = (
    "to consent, add --gemini-consent to this run, or record it once with `vlm2vla-client configure --gemini-consent`; "
    "or choose another --verifier (server, human)"
)


def open_outside(
    names: Sequence[str],
    settings: GeminiSettings,
    config_folder: Path,
    *,
    consent: bool,
    say: Callable[[str], None] | None = None,
) -> dict[str, Verifier]:
    """Those of ``names`` that are outside, ready to be asked, by name. Says what is sent to Google before it can be.

    Args:
        config_folder: where a recorded consent lies.
        consent: given for this run (``--gemini-consent``).

    Raises:
        ConfigurationError: no consent, no google-genai, or no key; nothing was sent.
    """
    made: dict[str, Verifier] = {}
    if "gemini" in names:
        if not (consent or has_consented(config_folder)):
            raise ConfigurationError(f"{notice(settings)}; nobody has consented to that here: {CONSENT_HINT}")
        made["gemini"] = GeminiVerifier(settings)
        (say or _say)(f"note: {notice(settings)}.")
    if "human" in names:
        made["human"] = HumanVerifier()
    return made


def close_outside(made: Mapping[str, Verifier], *, say: Callable[[str], None] | None = None) -> None:
    """Closes them and says what the calls cost."""
    for verifier in made.values():
        verifier.close()
        if isinstance(verifier, GeminiVerifier) and verifier.cost.calls:
            (say or _say)(f"gemini: {verifier.cost.text()}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
