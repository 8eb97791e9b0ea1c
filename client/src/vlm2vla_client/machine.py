"""What a published number must name besides its seeds: the commit and the machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def current_commit() -> str | None:
    """The commit that this code runs from, with ``+`` when files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def about_machine() -> dict[str, str]:
    """System, processor and Python of this machine."""
    return {"system": platform.platform(), "processor": _processor(), "python": platform.python_version()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.machine()
    return platform.machine()
