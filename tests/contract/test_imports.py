"""Import contracts: they hold, they would notice a breach, and light programs load light."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("shared_schema", "twin", "server", "client", "training")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages under `folder`, which is this repository or a copy of its sources."""
    paths = os.pathsep.join(str(folder / name / "src") for name in SOURCES)
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--config", str(folder / "pyproject.toml")],
        cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": paths},
    )


@pytest.fixture
def copy_of_sources(tmp_path: Path) -> Path:
    for name in SOURCES:
        shutil.copytree(ROOT / name / "src", tmp_path / name / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_import_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_contracts_notice_breaches(copy_of_sources: Path) -> None:
    breaches = {
        "client/src/vlm2vla_client/safety.py": ("import torch", "A robot PC needs no model library"),
        "server/src/vlm2vla_server/policy.py": ("import vlm2vla_twin", "The server does not know the twin"),
        "twin/src/vlm2vla_twin/expert.py": ("import mujoco", "mujoco only in the twin's"),
        "training/src/vlm2vla_training/cli.py": ("import vlm2vla_client", "never import one another"),
    }
    for name, (statement, _) in breaches.items():
        with (copy_of_sources / name).open("a") as file:
            file.write(f"\n{statement}\n")
    done = lint_imports(copy_of_sources)
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if "BROKEN" in line]
    for _, contract in breaches.values():
        assert any(contract in line for line in broken), f"{contract!r} did not notice\n{done.stdout}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("vlm2vla_client.cli", ("torch", "transformers", "mujoco", "matplotlib", "pyrealsense2", "cv2")),
        ("vlm2vla_client.safety", ("torch", "mujoco", "httpx")),
        ("vlm2vla_server.cli", ("torch", "transformers", "mujoco")),
        ("vlm2vla_server.app", ("torch", "transformers", "mujoco")),
        ("vlm2vla_training.cli", ("torch", "transformers", "mujoco")),
        ("vlm2vla_twin.kinematics", ("mujoco",)),
        ("vlm2vla_schema.messages", ("torch", "httpx", "fastapi")),
    ],
)
def test_a_module_loads_without_heavy_libraries(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
