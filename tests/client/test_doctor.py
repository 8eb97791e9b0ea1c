"""``doctor``: every missing part is named with its remedy, and what is there is called good."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from client_fakes import info_body
from gemini_server import error, gemini_server
from robot_fakes import limits

from vlm2vla_client import doctor_machine
from vlm2vla_client.cli import main
from vlm2vla_client.commissioning import write_record
from vlm2vla_client.doctor_machine import camera_findings, disk_findings, realsense_devices, robot_findings
from vlm2vla_client.verifiers.gemini_settings import record_consent

KEY = "AIza-secret-of-the-lab"


def disk_with(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """So many bytes are free wherever `doctor` looks."""
    usage = SimpleNamespace(free=free_bytes)
    monkeypatch.setattr(doctor_machine, "shutil", SimpleNamespace(disk_usage=lambda _: usage, which=shutil.which))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bare machine: no settings, no keys, no ROS; and a disk with 8 GiB free, whatever this computer's holds."""
    disk_with(monkeypatch, 8 << 30)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "VLM2VLA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config" / "vlm2vla"


class Info(BaseHTTPRequestHandler):
    """/healthz and /info of a server."""

    body: dict[str, Any]

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        """Any path."""
        data = json.dumps(self.body if self.path == "/info" else {"status": "ok"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def policy_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server whose /info has the changes that the test names."""
    handler = type("Handler", (Info,), {"body": info_body(**getattr(request, "param", {}))})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(5)


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["doctor", "--json", *arguments])
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == code
    return code, {finding["what"]: finding for finding in answer["findings"]}


def test_a_bare_machine_misses_everything_and_is_told_how_to_mend_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, "--server", "http://127.0.0.1:1", "--verifier", "gemini,human")
    assert code == 2
    for what in ("configuration", "limits", "server", "RealSense on USB", "ROS", "interbotix", "arm's USB adapter",
                 "gemini consent", "gemini", "verifier human"):  # fmt: skip
        assert not found[what]["good"] and found[what]["remedy"], what
    assert "configure" in found["configuration"]["remedy"] and "counter_z_m" in found["limits"]["found"]
    assert "GEMINI_API_KEY" in found["gemini"]["remedy"] and found["disk"]["good"]


def test_the_lines_for_people_hold_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--server", "http://127.0.0.1:1"]) == 2
    lines = capsys.readouterr().out.splitlines()
    missing = [index for index, line in enumerate(lines) if line.startswith("MISSING")]
    assert len(missing) >= 8 and all(lines[index + 1].lstrip().startswith("-> ") for index in missing)
    assert f"{len(missing)} missing" in lines[-1]


def test_a_configured_machine_in_the_twin_is_all_good(
    folder: Path, policy_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = findings(capsys, "--sim", "--server", policy_server)
    assert code == 0, found
    assert "twin" in found["server"]["found"] and found["simulator"]["good"]


@pytest.mark.parametrize("policy_server", [{"policy": False}], indirect=True)
def test_a_model_that_was_never_trained_to_act_is_found(policy_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, "--server", policy_server, "--verifier", "none")
    assert code == 2 and not found["policy"]["good"] and "--allow-untrained" in found["policy"]["remedy"]


@pytest.mark.parametrize("policy_server", [{"protocol": 2}], indirect=True)
def test_another_protocol_is_found(policy_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, "--sim", "--server", policy_server)
    assert code == 2 and "protocol" in found["server"]["found"] and "same version" in found["server"]["remedy"]


def test_measured_limits_and_consent_are_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configure", "--no-input", "--counter-z-m", "0.012", "--wall-x-m", "0.52"]) == 0
    capsys.readouterr()
    record_consent(folder)
    _, found = findings(capsys, "--server", "http://127.0.0.1:1")
    assert found["configuration"]["good"] and found["limits"]["good"] and found["gemini consent"]["good"]


def test_a_wrong_configuration_is_one_finding_and_the_rest_is_still_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir(parents=True)
    (folder / "client.toml").write_text("servr = 'x'\n")
    code, found = findings(capsys, "--server", "http://127.0.0.1:1")
    assert code == 2 and "servr" in found["configuration"]["found"] and "disk" in found


def test_gemini_is_asked_about_the_model_and_sent_no_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    with gemini_server() as server:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        _, found = findings(capsys, "--sim", "--server", "http://127.0.0.1:1", "--verifier", "gemini")
        assert found["gemini"]["good"] and server.requests == [] and len(server.asked_for_models) == 1
    with gemini_server(models=error(400, "INVALID_ARGUMENT", f"API key not valid: {KEY}")) as server:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        code, found = findings(capsys, "--sim", "--server", "http://127.0.0.1:1", "--verifier", "gemini")
    assert code == 2 and not found["gemini"]["good"] and "not valid" in found["gemini"]["found"]
    assert KEY not in str(found)


def test_an_arm_that_nobody_confirmed_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configure", "--no-input", "--counter-z-m", "0.012", "--wall-x-m", "0.52"]) == 0
    capsys.readouterr()
    _, found = findings(capsys, "--server", "http://127.0.0.1:1")
    assert not found["commissioned"]["good"] and "doctor --commission" in found["commissioned"]["remedy"]
    write_record("widowx", "wx250s", limits(counter_z_m=0.012, wall_x_m=0.52), {})
    _, found = findings(capsys, "--server", "http://127.0.0.1:1")
    assert found["commissioned"]["good"]


def test_cameras_are_found_by_what_the_kernel_says(tmp_path: Path) -> None:
    for name, vendor, product in (("2-1", "8086", "Intel(R) RealSense(TM) Depth Camera 435"), ("1-1", "8086", "Hub")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "idVendor").write_text(vendor + "\n")
        (tmp_path / name / "product").write_text(product + "\n")
    (tmp_path / "usb1").mkdir()
    assert realsense_devices(tmp_path) == ["Intel(R) RealSense(TM) Depth Camera 435"]


def test_no_camera_and_no_arm_passes_unlooked_at() -> None:
    assert [finding.what for finding in camera_findings("v4l2")] == ["OpenCV", "USB camera"]
    assert [finding.what for finding in camera_findings("video")] == ["OpenCV"]
    (client,) = robot_findings("bridge", {})
    assert client.what == "widowx_envs" and not client.good and "edgeml" in client.remedy


@pytest.mark.parametrize("importable", [True, False])
def test_ros_is_asked_under_its_own_python_without_ours(
    importable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / ("interbotix_xs_modules" if importable else "other")
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    setup = tmp_path / "setup.bash"
    setup.write_text(f'[ -z "$PYTHONPATH" ] || exit 9\nexport PYTHONPATH="{tmp_path}/site"\n')
    python = shutil.which("python3")
    assert python is not None
    monkeypatch.setenv("PYTHONPATH", "/of/the/client")
    found = {item.what: item for item in robot_findings("widowx", {"setup": [str(setup)], "python": python})}
    assert found["ROS"].good and found["interbotix"].good is importable
    assert importable or "interbotix_xs_modules" in found["interbotix"].found


def test_the_disk_is_measured_where_recordings_will_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(monkeypatch, doctor_machine.MIN_FREE_BYTES)
    (good,) = disk_findings(tmp_path / "not" / "made" / "yet")
    assert good.good and str(tmp_path) in good.found and "2.0 GiB" in good.found
    disk_with(monkeypatch, doctor_machine.MIN_FREE_BYTES - 1)
    (full,) = disk_findings(tmp_path)
    assert not full.good and "--record" in full.remedy
