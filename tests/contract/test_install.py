"""What each kind of machine gets installed, proven by pip's own resolver against empty environments.

These tests use pip as this machine has it configured, and so need its package index.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

# A slow package index is not a failure of ours.
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("shared_schema", "twin", "server", "client", "training")
MODEL_LIBRARIES = {"torch", "torchvision", "transformers", "peft", "trl", "vllm", "xgrammar", "accelerate", "datasets",
                   "safetensors", "tokenizers", "triton"}
ROBOT_DRIVERS = {"mujoco", "pyrealsense2", "interbotix-xs-modules", "opencv-python", "opencv-python-headless",
                 "google-genai", "glfw", "vlm2vla-client", "vlm2vla-twin", "vlm2vla-training"}


def run(*command: str | Path, timeout_s: float = 800, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout_s, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five wheels, built from copies: a build inside the checkout would leave its folders there."""
    folder = tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    sources = [folder / name for name in SOURCES]
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "wheels", *sources)
    return folder / "wheels"


@pytest.fixture
def empty_environment(tmp_path: Path) -> Path:
    """The Python of a new virtual environment with nothing in it, not even pip."""
    venv.create(tmp_path / "venv", with_pip=False)
    return tmp_path / "venv" / "bin" / "python"


def would_install(
    python: Path, wheels: Path, requirement: str, constraints: str = "constraints.txt"
) -> dict[str, str]:
    """Names and versions that pip would install for `requirement` into the environment of `python`."""
    report = wheels.parent / f"report-{canonicalize_name(requirement.partition('[')[0])}.json"
    pip("--python", python, "install", "-q", "--dry-run", "--report", report, "-c", ROOT / constraints,
        "--find-links", wheels, requirement)
    items = json.loads(report.read_text())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in items}


def test_robot_pc_install_pulls_no_model_library(wheels: Path, empty_environment: Path) -> None:
    names = would_install(empty_environment, wheels, "vlm2vla-client[sim]")
    assert {"vlm2vla-client", "vlm2vla-schema", "vlm2vla-twin", "httpx", "mujoco"} <= names.keys()
    assert not names.keys() & MODEL_LIBRARIES
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-"))}
    assert "vlm2vla-server" not in names


def test_the_gemini_verifier_is_an_extra_that_pulls_no_model_library(wheels: Path, empty_environment: Path) -> None:
    plain = would_install(empty_environment, wheels, "vlm2vla-client")
    assert not {name for name in plain if name.startswith("google-")}
    names = would_install(empty_environment, wheels, "vlm2vla-client[gemini]")
    assert "google-genai" in names
    assert not names.keys() & (MODEL_LIBRARIES | {"mujoco", "vlm2vla-server"})


def test_drivers_of_cameras_and_motors_are_extras_without_model_library(wheels: Path, empty_environment: Path) -> None:
    drivers = {"pyrealsense2", "opencv-python-headless", "dynamixel-sdk", "rerun-sdk"}
    assert not would_install(empty_environment, wheels, "vlm2vla-client").keys() & drivers
    names = would_install(empty_environment, wheels, "vlm2vla-client[realsense,video,dynamixel,rerun]")
    assert drivers <= names.keys()
    assert not names.keys() & (MODEL_LIBRARIES | {"mujoco", "vlm2vla-server"})


@pytest.mark.parametrize("side", ["client", "server"])
def test_openpi_s_websocket_is_an_extra_without_openpi(wheels: Path, empty_environment: Path, side: str) -> None:
    libraries = {"msgpack", "websockets"}
    assert not would_install(empty_environment, wheels, f"vlm2vla-{side}").keys() & libraries
    names = would_install(empty_environment, wheels, f"vlm2vla-{side}[openpi]")
    assert libraries <= names.keys() and "openpi-client" not in names
    assert not names.keys() & MODEL_LIBRARIES


def test_server_install_pulls_no_robot_or_camera_driver(wheels: Path, empty_environment: Path) -> None:
    names = would_install(empty_environment, wheels, "vlm2vla-server")
    assert {"vlm2vla-server", "vlm2vla-schema", "fastapi", "uvicorn"} <= names.keys()
    assert not names.keys() & ROBOT_DRIVERS
    assert not names.keys() & MODEL_LIBRARIES, "an engine is an extra: openai needs none of these"


def test_server_with_its_engine_pulls_no_robot_or_camera_driver(wheels: Path, empty_environment: Path) -> None:
    names = would_install(empty_environment, wheels, "vlm2vla-server[transformers]")
    assert {"torch", "transformers", "peft", "xgrammar"} <= names.keys()
    assert not names.keys() & ROBOT_DRIVERS
    if names["torch"].endswith("+cpu"):
        assert not {name for name in names if name.startswith(("nvidia-", "cuda-"))}


def test_the_pinned_versions_of_the_gpu_box_still_resolve(wheels: Path, empty_environment: Path) -> None:
    """What `scripts/install-server cuda` would install; nothing of it is downloaded or run here."""
    constraints = "constraints-vllm-cuda.txt"
    names = would_install(empty_environment, wheels, "vlm2vla-server[vllm,transformers,openai]", constraints)
    assert {"vllm", "torch", "transformers", "peft", "xgrammar", "httpx"} <= names.keys()
    assert not names.keys() & (ROBOT_DRIVERS - {"opencv-python-headless"}), "vLLM itself reads pictures with OpenCV"
    lines = (ROOT / constraints).read_text().splitlines()
    pinned = {str(canonicalize_name(name)): version for name, _, version in (line.partition("==") for line in lines)}
    ours = {"vlm2vla-server", "vlm2vla-schema"}
    found = {name: version.partition("+")[0] for name, version in names.items() if name not in ours}
    assert {name: version for name, version in found.items() if pinned.get(name) != version} == {}


def test_install_server_cpu_makes_an_environment_that_serves(tmp_path: Path) -> None:
    """The script itself, on a copy: a build inside the checkout would leave its folders there."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("scripts", "shared_schema", "server"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    folder = tmp_path / "installed"
    run("env", f"VLM2VLA_PYTHON={sys.executable}", tmp_path / "scripts/install-server", "cpu", folder)
    twin = ROOT / "models/twin"
    server = ("vlm2vla-server", "check", "--engine", "transformers", "--model", twin / "base", "--adapter",
              f"twin={twin / 'adapter'}")
    info = json.loads(run(folder / "bin" / server[0], *server[1:]))
    assert info["ready"] and info["policy"]


def test_client_runs_from_its_wheels_alone(wheels: Path, empty_environment: Path) -> None:
    pip("--python", empty_environment, "install", "-q", "-c", ROOT / "constraints.txt", "--find-links", wheels,
        "vlm2vla-client")
    printed = run(empty_environment.with_name("vlm2vla-client"), "--help")
    assert "run" in printed and "replay" in printed
    absent = run(empty_environment, "-c", "import importlib.util as u; "
                 "print([n for n in ('torch', 'transformers', 'mujoco') if u.find_spec(n)])")
    assert absent.strip() == "[]"


def test_wheels_carry_their_types_and_pages(wheels: Path) -> None:
    found = {path.name.split("-")[0]: zipfile.ZipFile(path).namelist() for path in wheels.glob("*.whl")}
    assert len(found) == 5
    for package, names in found.items():
        assert f"{package}/py.typed" in names
        assert all(name.startswith((package + "/", package + "-")) for name in names)
        source = next(ROOT.glob(f"*/src/{package}"))
        wanted = {str(path.relative_to(source.parent)) for path in source.rglob("*.py")}
        assert wanted <= set(names), "a folder without __init__.py is not packaged"


def test_the_reader_compiled_reads_the_same(tmp_path: Path) -> None:
    """What VLM2VLA_COMPILE=1 builds passes the tests of the reader; it needs a C compiler and Python's headers."""
    source, target = tmp_path / "training", tmp_path / "compiled"
    shutil.copytree(ROOT / "training", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    compiled = {**os.environ, "VLM2VLA_COMPILE": "1"}
    install = ("-m", "pip", "install", "-q", "--no-deps", "-c", ROOT / "constraints.txt", "--target", target, source)
    run(sys.executable, *install, environment=compiled)
    first = {**os.environ, "PYTHONPATH": str(target)}
    asked = "from vlm2vla_training.episodes import rlds, tfexample as e, tfrecord as r, wire; print(rlds, e, r, wire)"
    assert run(sys.executable, "-c", asked, environment=first).count(".so") == 4
    tests = [ROOT / "tests" / "training" / f"test_{name}.py" for name in ("tfrecord", "rlds", "ingest_spread")]
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, environment=first)
    assert " passed" in done and "failed" not in done
