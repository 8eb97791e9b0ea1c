"""``doctor --robot dynamixel``: ROBOTIS's real SDK against motors on a pseudo-terminal; none is ever written to."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dynamixel_sdk import PacketHandler, PortHandler
from vendor_doubles.dynamixel_bus import PING, READ, Faults, MotorBus, Table, whole_arm

from vlm2vla_client.cli import main
from vlm2vla_client.config import ClientConfig, load_config
from vlm2vla_client.errors import ConfigurationError, RobotError
from vlm2vla_client.physical import make_robot
from vlm2vla_client.robots import dynamixel
from vlm2vla_client.robots.dynamixel import DynamixelSettings, Motor, process_with, read_motors


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamixel, "process_with", lambda port: None)  # the double is a thread of this very test


def read(bus: MotorBus, motors: int = 9) -> dict[int, Motor | str]:
    return dict(read_motors(DynamixelSettings(port=bus.port, motors=motors)))


def healthy(said: Motor | str) -> Motor:
    assert isinstance(said, Motor), said
    return said


def test_every_motor_says_what_it_is_and_nothing_is_written() -> None:
    with MotorBus(whole_arm(motor_1=Table(position=1024), motor_9=Table(model=1060, load=-120))) as bus:
        found = read(bus)
        asked = {instruction for _, instruction in bus.instructions}
    motors = [healthy(said) for said in found.values()]
    assert [motor.model for motor in motors] == ["XM430-W350"] * 7 + ["XL430-W250"] * 2
    assert motors[0].position_rad == pytest.approx(-math.pi / 2) and motors[1].position_rad == 0.0
    assert asked == {READ} and asked <= {PING, READ}, "a write instruction could move or drop the arm"
    assert not [motor for motor in motors if motor.problem]
    assert str(motors[0]) == "XM430-W350, torque on, -90.0 deg, -32 mA, 11.9 V, 31 C"


def test_register_126_is_a_current_in_one_model_and_a_load_in_another_and_both_are_signed() -> None:
    with MotorBus(whole_arm(motor_9=Table(model=1060, load=-120))) as bus:
        found = read(bus)
        port = PortHandler(bus.port)
        port.openPort()
        naive, _, _ = PacketHandler(2.0).read2ByteTxRx(port, 9, 126)
        port.closePort()
    assert naive == 65416, "the SDK hands out what is no load at all"
    assert healthy(found[9]).load == "load -12 %" and healthy(found[1]).load == "-32 mA"


def test_a_motor_that_does_not_answer_is_named_and_never_read_as_zero() -> None:
    with MotorBus({1: Table(), 3: Table()}) as bus:
        found = read(bus, motors=3)
        port = PortHandler(bus.port)
        port.openPort()
        naive, result, _ = PacketHandler(2.0).read1ByteTxRx(port, 2, 146)
        port.closePort()
    assert (naive, result) == (0, -3001), "0 degrees Celsius, says who does not look at the result"
    assert found[2] == "There is no status packet!"
    assert healthy(found[1]).temperature_c == healthy(found[3]).temperature_c == 31


def test_a_lost_answer_and_a_damaged_one_are_asked_for_again() -> None:
    with MotorBus({1: Table(), 2: Table()}, Faults(unanswered={1: 2}, corrupt={2: 2})) as bus:
        found = read(bus, motors=2)
    assert healthy(found[1]).model == healthy(found[2]).model == "XM430-W350"
    with MotorBus({1: Table()}, Faults(corrupt={1: 3})) as bus:
        assert read(bus, motors=1)[1] == "Incorrect status packet!"


def test_a_hardware_error_comes_with_good_data_and_is_told() -> None:
    with MotorBus(whole_arm(motor_2=Table(hardware_error=0b100100, torque=0, celsius=78))) as bus:
        motor = healthy(read(bus)[2])
    assert motor.errors == ("overheating", "overload") and not motor.torque_on and motor.temperature_c == 78
    assert motor.problem is not None and "hardware error: overheating, overload" in motor.problem


def test_a_refused_register_is_a_sentence_where_the_sdk_has_a_checksum_for_data() -> None:
    with MotorBus({1: Table()}, Faults(refused={1: 70})) as bus:
        assert read(bus, motors=1)[1] == (
            "register 70: [RxPacketError] Writing or Reading is not available to target address!"
        )
        port = PortHandler(bus.port)
        port.openPort()
        naive, result, error = PacketHandler(2.0).read1ByteTxRx(port, 1, 70)
        port.closePort()
    assert result == 0 and error == 7 and naive not in (0, 1), "no hardware error reads as some"


def test_values_that_look_like_a_header_are_stuffed_and_come_through() -> None:
    with MotorBus({1: Table(position=0x00FDFFFF)}) as bus:
        expected = (0x00FDFFFF - 2048) * math.tau / 4096
        assert healthy(read(bus, motors=1)[1]).position_rad == pytest.approx(expected)


@pytest.mark.parametrize(("table", "words"), [
    (Table(tenth_volts=92), "9.2 V, outside its 9.5 to 16.0 V"), (Table(celsius=71), "71 C, and it switches off at 80"),
])  # fmt: skip
def test_a_motor_near_its_own_limits_is_a_problem(table: Table, words: str) -> None:
    with MotorBus({1: table}) as bus:
        problem = healthy(read(bus, motors=1)[1]).problem
    assert problem is not None and words in problem


def test_a_line_that_never_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamixel, "BUS_DEADLINE_S", 0.3)
    words = r"not read within 0\.3 s: is this the motors' port"
    with MotorBus({}, Faults(noise=True)) as bus, pytest.raises(RobotError, match=words):
        read(bus)


def test_a_port_that_cannot_be_opened_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(RobotError, match="cannot open"):
        list(read_motors(DynamixelSettings(port=str(tmp_path / "ttyDXL"))))
    with MotorBus({}) as bus, pytest.raises(RobotError, match="knows no baud rate 12345"):
        list(read_motors(DynamixelSettings(port=bus.port, baud_rate=12345)))


def test_while_the_driver_has_the_port_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with MotorBus(whole_arm()) as bus:
        driver = "import os, sys; os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY); print(flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", driver, bus.port]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdin is not None and other.stdout is not None
        try:
            other.stdout.readline()
            assert process_with(Path(bus.port)) == other.pid
            monkeypatch.setattr(dynamixel, "process_with", process_with)
            with pytest.raises(RobotError, match=f"process {other.pid} has .* open: end the arm's driver first"):
                read(bus)
            assert not bus.instructions
        finally:
            other.stdin.close()
            other.wait(10)
            other.stdout.close()


def test_a_port_of_nobody_and_processes_that_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "1" / "fd"
    folder.mkdir(parents=True)
    (folder / "0").symlink_to(tmp_path / "elsewhere")
    assert process_with(tmp_path / "port", tmp_path) is None
    (folder / "1").symlink_to(tmp_path / "port")
    assert process_with(tmp_path / "port", tmp_path) == 1


def doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str], port: str) -> tuple[int, dict[str, dict[str, Any]]]:
    file = tmp_path / "vlm2vla" / "client.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'robot = "dynamixel"\ncamera = "images"\nverifier = "none"\n[dynamixel]\nport = "{port}"\n')
    code = main(["doctor", "--json", "--server", "http://127.0.0.1:1"])
    return code, {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_doctor_lists_every_motor_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    motors = whole_arm(motor_4=Table(hardware_error=0x20))
    del motors[7]
    with MotorBus(motors) as bus:
        code, found = doctor(tmp_path, capsys, bus.port)
    assert code == 2 and not {"limits", "commissioned"} & found.keys(), "nothing is going to move"
    assert found["motor 1 waist"]["good"] and found["motor 9 gripper"]["good"]
    assert "overload" in found["motor 4 elbow"]["found"] and "support the arm" in found["motor 4 elbow"]["remedy"]
    assert "no status packet" in found["motor 7 wrist_angle"]["found"] and found["motor 7 wrist_angle"]["remedy"]


def test_doctor_without_the_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(tmp_path, capsys, str(tmp_path / "ttyDXL"))
    assert code == 2 and "cannot open" in found["motors"]["found"] and "U2D2" in found["motors"]["remedy"]


def test_doctor_without_the_sdk_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dynamixel_sdk", None)
    code, found = doctor(tmp_path, capsys, "/dev/ttyDXL")
    assert code == 2 and found["motors"]["remedy"] == "pip install 'vlm2vla-client[dynamixel]'"


@pytest.mark.parametrize("command", [
    ["run", "--robot", "dynamixel", "--task", "t"], ["run", "--task", "t"], ["home"], ["doctor", "--commission"],
    ["calibrate", "--wall-x-m", "0.5"],
])  # fmt: skip
def test_it_is_never_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    file = tmp_path / "client.toml"
    file.write_text('robot = "dynamixel"\n[limits]\ncounter_z_m = 0.0\nwall_x_m = 0.5\n')
    assert main([*command, "--config", str(file)]) == 2
    assert "'dynamixel' is only read" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="only read"):
        make_robot("dynamixel", ClientConfig())


def test_its_table_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "client.toml"
    file.write_text('[dynamixel]\nport = "/dev/ttyUSB0"\nbaud_rate = 57600\nmotors = 7\n')
    settings = DynamixelSettings.from_table(load_config(file).arms["dynamixel"])
    assert settings == DynamixelSettings("/dev/ttyUSB0", 57600, 7)
    for table, words in (({"prot": "x"}, "unknown key"), ({"motors": True}, "wrong type"), ({"motors": 0}, "1 to 252")):
        with pytest.raises(ConfigurationError, match=words):
            DynamixelSettings.from_table(table)
