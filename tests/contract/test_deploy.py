"""The container set-up, checked without a container engine: shape, hardening, settings, host-setup."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "server/Dockerfile"
VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")
NOT_IN_ENV_EXAMPLE = {"VLM2VLA_TORCH_INDEX_URL"}  # of the demo's build only; README.md


def services() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load(COMPOSE.read_text())["services"]
    assert isinstance(found, dict)
    return found


def env_file(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("name", sorted(services()))
def test_every_service_is_confined(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["init"] is True
    assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service
    assert "/tmp" in service["tmpfs"]
    assert service["logging"]["options"]["max-size"]
    known = {
        "build", "cap_drop", "command", "depends_on", "deploy", "entrypoint", "environment", "healthcheck", "image",
        "init", "logging", "network_mode", "ports", "profiles", "read_only", "restart", "security_opt", "shm_size",
        "stop_grace_period", "tmpfs", "user", "volumes",
    }  # fmt: skip
    assert set(service) <= known, "a key that the compose format does not have, or that nobody has looked at"


def test_the_server_has_a_gpu_a_health_check_a_restart_policy_and_a_cache() -> None:
    server = services()["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "/readyz" in server["healthcheck"]["test"][-1] and server["healthcheck"]["start_period"]
    assert server["restart"] == "unless-stopped"
    volumes = yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert "cache" in volumes and "cache:/app/cache" in server["volumes"]
    weights = [volume for volume in server["volumes"] if ":/models/" in volume]
    assert len(weights) == 2 and all(volume.endswith(":ro") for volume in weights)


def test_the_time_to_stop_covers_draining() -> None:
    from vlm2vla_server.service import CUT_TIMEOUT_S
    from vlm2vla_server.serving import FLUSH_TIMEOUT_S
    from vlm2vla_server.settings import Settings

    grace_s = float(services()["server"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > Settings.drain_s + CUT_TIMEOUT_S + FLUSH_TIMEOUT_S


def test_commands_are_ones_that_the_programs_take() -> None:
    from vlm2vla_server.cli import parser

    for name in ("server", "demo-server"):
        parsed = parser().parse_args([str(word) for word in services()[name]["command"]])
        assert parsed.command == "serve" and parsed.adapters
    assert services()["demo-client"]["command"][0] == "run"


def test_env_example_names_every_variable_with_the_default_of_the_compose_file() -> None:
    example = env_file(ROOT / ".env.example")
    used: dict[str, set[str]] = {}
    for name, default in VARIABLE.findall(COMPOSE.read_text()):
        used.setdefault(name, set()).add(default)
    assert set(used) - NOT_IN_ENV_EXAMPLE == set(example)
    for name in set(example):
        assert used[name] == {example[name]}, name


def test_environment_of_the_server_consists_of_its_settings() -> None:
    from vlm2vla_server import settings as s

    given = {key: value for key, value in services()["server"]["environment"].items() if key.startswith("VLM2VLA_")}
    filled = {key: VARIABLE.sub(lambda m: m[2] or "", value) for key, value in given.items()}
    filled |= {"VLM2VLA_API_KEY": "k", "VLM2VLA_ENGINE_OPTIONS": "quantization=fp8"}  # empty ones count as not given
    read = s.from_environment(filled)
    assert len(read) == len(given)
    assert s.build({**read, "model": ROOT, "host": "0.0.0.0"}, ROOT).engine == "vllm"


def test_the_dockerfile_runs_as_a_user_without_privileges_and_holds_no_weights_or_secrets() -> None:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    stages: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("FROM "):
            stages[line.split()[-1]] = []
        elif line and not line.startswith("#"):
            stages[list(stages)[-1]].append(line)
    assert set(stages) == {"base", "server", "demo-client"}
    for name in ("server", "demo-client"):
        users = [line.split()[1] for line in stages[name] if line.startswith("USER ")]
        assert users == ["10001"]
        assert any(line.startswith("ENTRYPOINT [") for line in stages[name]), "exec form: signals must arrive"
    assert not re.search(r"models/|HF_TOKEN|API_KEY", text) and "ADD " not in text
    for line in (line for lines in stages.values() for line in lines):
        if line.startswith("COPY "):
            for source in shlex.split(line)[1:-1]:
                assert list(ROOT.glob(source)), f"{source} does not exist"
        if "apt-get install" in line:
            assert "--no-install-recommends" in line and "rm -rf /var/lib/apt/lists" in line
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".env", "models", ".git"} <= set(ignored)


# --- scripts/host-setup -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


def setup(checkout: Path, *arguments: str, answers: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN",)}
    if answers is not None:
        environment["VLM2VLA_SETUP_ANSWERS_ON_STDIN"] = "1"
    return subprocess.run(
        [str(checkout / "scripts/host-setup"), *arguments],
        input=answers or "", capture_output=True, text=True, timeout=30, env=environment,
    )  # fmt: skip


def test_host_setup_writes_a_private_file_with_a_random_key(checkout: Path) -> None:
    done = setup(checkout, "--yes", "--hf-token", "hf_abc", "--adapter-path", "/data/adapter", "--bind", "10.0.0.5")
    assert done.returncode == 0, done.stderr
    path = checkout / ".env"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    values = env_file(path)
    assert re.fullmatch(r"[0-9a-f]{64}", values["VLM2VLA_API_KEY"])
    assert values["HF_TOKEN"] == "hf_abc" and values["VLM2VLA_ADAPTER_PATH"] == "/data/adapter"
    assert values["VLM2VLA_BIND"] == "10.0.0.5" and "TLS" in done.stdout
    assert values["VLM2VLA_API_KEY"] not in done.stdout + done.stderr and "hf_abc" not in done.stdout + done.stderr
    assert set(values) == set(env_file(ROOT / ".env.example"))
    assert (checkout / "models/base").is_dir()
    again = setup(checkout, "--yes", "--force")
    assert again.returncode == 0 and env_file(path)["VLM2VLA_API_KEY"] != values["VLM2VLA_API_KEY"]
    assert (values["VLM2VLA_ENGINE"], values["VLM2VLA_ENGINE_OPTIONS"]) == ("vllm", "")
    assert setup(checkout, "--yes", "--force", "--engine", "transformers").returncode == 0
    assert env_file(path)["VLM2VLA_ENGINE_OPTIONS"] == "device=cuda,dtype=bfloat16", "it computes on the CPU otherwise"
    assert [one.name for one in checkout.glob(".env*")] == [".env"]


def test_host_setup_keeps_an_existing_file(checkout: Path) -> None:
    (checkout / ".env").write_text("VLM2VLA_API_KEY=precious\n")
    done = setup(checkout, "--yes")
    assert done.returncode == 2 and "--force" in done.stderr
    assert (checkout / ".env").read_text() == "VLM2VLA_API_KEY=precious\n"


def test_host_setup_asks_for_what_no_flag_gave(checkout: Path) -> None:
    done = setup(checkout, "--bind", "127.0.0.1", answers="9000\n./models/g\n\n\nhf_x\n")
    assert done.returncode == 0, done.stderr
    values = env_file(checkout / ".env")
    assert (values["VLM2VLA_BIND"], values["VLM2VLA_PORT"]) == ("127.0.0.1", "9000")
    assert (values["VLM2VLA_MODEL_PATH"], values["VLM2VLA_ADAPTER_PATH"]) == ("./models/g", "./models/adapter")
    assert values["HF_TOKEN"] == "hf_x" and "Port" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "0"),
        ("--port", "many"),
        ("--bind", "a b"),
        ("--bind", "x\nHF_TOKEN=y"),
        ("--engine", "other"),
        ("--hf-token", "a b"),
        ("--model-path", "a$b"),
        ("--model-path", "a\nb"),
        ("--hf-token-file", "nowhere"),
        ("--unknown",),
        ("--port",),
    ],
)
def test_host_setup_refuses_values_that_would_not_survive(checkout: Path, arguments: tuple[str, ...]) -> None:
    done = setup(checkout, "--yes", *arguments)
    assert done.returncode == 2 and done.stderr
    assert not (checkout / ".env").exists()


def test_host_setup_without_a_terminal_says_so(checkout: Path) -> None:
    done = setup(checkout)
    assert done.returncode == 2 and "--yes" in done.stderr
