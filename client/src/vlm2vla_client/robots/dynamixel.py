"""The arm's motors read without ROS, over their USB adapter, with ROBOTIS's own SDK (extra ``dynamixel``). For doctor.

Read-only: it pings and reads, and nothing here writes to a motor, so the torque stays what it is. Moving an arm takes
more than a goal register (shadow motors, gripper, limits): that is the driver's, and ``make_robot`` refuses. The bus
has one master: while the driver has the port, nothing is asked. Registers are those of the X series, as in the SDK's
own control tables. Never run on a physical arm.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vlm2vla_client.errors import ConfigurationError, RobotError

#: The WidowX 250S: shoulder and elbow have two motors each, the second follows the first.
JOINTS: Final = ("waist", "shoulder", "shoulder (2nd)", "elbow", "elbow (2nd)", "forearm_roll", "wrist_angle",
                 "wrist_rotate", "gripper")  # fmt: skip
MODELS: Final = {1020: "XM430-W350", 1060: "XL430-W250", 1120: "XM540-W270"}
ERROR_BITS: Final = {0: "input voltage", 2: "overheating", 3: "encoder", 4: "electrical shock", 5: "overload"}
#: So near to its own limit (degrees Celsius) a motor soon switches itself off.
HOT_C: Final = 10
TRIES: Final = 3
BUS_DEADLINE_S: Final = 5.0
#: Address and bytes of what is read in one piece: motor number to firmware, limits, torque, error, load to temperature.
_BLOCKS: Final = ((0, 7), (31, 5), (64, 1), (70, 1), (126, 21))
_ALERT: Final = 0x80
_PULSES: Final = 4096


@dataclass(frozen=True)
class DynamixelSettings:
    """``[dynamixel]`` of client.toml."""

    port: str = "/dev/ttyDXL"
    baud_rate: int = 1_000_000
    motors: int = len(JOINTS)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> DynamixelSettings:
        """Raises ConfigurationError for an unknown key, a wrong type, or a number of motors that no bus has."""
        for key, value in table.items():
            wanted = {"port": str, "baud_rate": int, "motors": int}.get(key)
            if wanted is None:
                raise ConfigurationError(f"[dynamixel]: unknown key {key!r}; known are port, baud_rate, motors")
            if type(value) is not wanted:
                raise ConfigurationError(f"[dynamixel] {key}: wrong type {type(value).__name__}")
        settings = cls(**table)
        if not 1 <= settings.motors <= 252:
            raise ConfigurationError(f"[dynamixel] motors: expected 1 to 252, got {settings.motors}")
        return settings


@dataclass(frozen=True)
class Motor:
    """What one motor says of itself. ``load`` is a current where the model measures one, else a share of its torque."""

    number: int
    model: str
    firmware: int
    torque_on: bool
    errors: tuple[str, ...]
    position_rad: float
    load: str
    voltage_v: float
    voltage_limits_v: tuple[float, float]
    temperature_c: int
    temperature_limit_c: int

    @property
    def problem(self) -> str | None:
        """Why an arm should not be used with it, or None."""
        low_v, high_v = self.voltage_limits_v
        if self.errors:
            return f"hardware error: {', '.join(self.errors)}; it has no torque until it is rebooted by hand"
        if not low_v <= self.voltage_v <= high_v:
            return f"{self.voltage_v:.1f} V, outside its {low_v:.1f} to {high_v:.1f} V"
        if self.temperature_c > self.temperature_limit_c - HOT_C:
            return f"{self.temperature_c} C, and it switches off at {self.temperature_limit_c} C"
        return None

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.model}, torque {'on' if self.torque_on else 'off'}, {math.degrees(self.position_rad):+.1f} deg, "
            f"{self.load}, {self.voltage_v:.1f} V, {self.temperature_c} C"
        )


def joint_of(number: int) -> str:
    """The joint that a motor of the WidowX 250S moves."""
    return JOINTS[number - 1] if 1 <= number <= len(JOINTS) else "unknown"


def read_motors(settings: DynamixelSettings) -> Iterator[tuple[int, Motor | str]]:
    """Every motor's number with what it says, or with why nothing could be read. Blocks for 5 s at the most.

    Raises:
        ConfigurationError: the SDK is not installed; names the extra.
        RobotError: the port cannot be opened, another process has it, or its noise never ends.
    """
    try:
        from dynamixel_sdk import PacketHandler, PortHandler
    except ImportError as error:
        raise ConfigurationError(
            f"reading motors needs ROBOTIS's SDK: pip install 'vlm2vla-client[dynamixel]' ({error})"
        ) from None
    if (owner := process_with(Path(settings.port))) is not None:
        raise RobotError(f"process {owner} has {settings.port} open: end the arm's driver first (one master a bus)")
    port = PortHandler(settings.port)
    try:
        port.baudrate = settings.baud_rate  # or it would open at 1 Mbit/s first, whatever was asked for
        if not port.openPort():
            raise RobotError(f"{settings.port}: the SDK knows no baud rate {settings.baud_rate}")
    except OSError as error:  # the SDK documents False, but pyserial's error comes through
        raise RobotError(f"cannot open {settings.port}: {error}") from None
    bus = _Bus(port, PacketHandler(2.0))
    try:
        for number in range(1, settings.motors + 1):
            yield number, bus.motor(number)
    except OSError as error:
        raise RobotError(f"{settings.port} is gone: {error}") from None
    finally:
        port.closePort()


def process_with(port: Path, processes: Path = Path("/proc")) -> int | None:
    """A process that has ``port`` open, other than this one; processes of other users cannot be seen."""
    target = os.path.realpath(port)
    for entry in processes.glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) == target and int(entry.parts[-3]) != os.getpid():
                return int(entry.parts[-3])
        except OSError:  # it has ended, or is somebody else's
            continue
    return None


class _NoAnswer(Exception):
    """One motor's silence or refusal; the others may still be read."""


class _Bus:
    """Reads by numbers; what the SDK leaves to its caller is done here."""

    def __init__(self, port: Any, packets: Any) -> None:
        self._port, self._packets = port, packets
        self._ends_s = time.monotonic() + BUS_DEADLINE_S
        read = port.readPort

        def bounded(length: int) -> Any:
            # On a line that never falls silent (no motors at all) the SDK looks for a packet for ever.
            if time.monotonic() > self._ends_s:
                raise RobotError(f"not read within {BUS_DEADLINE_S:g} s: is this the motors' port?")
            return read(length)

        port.readPort = bounded

    def motor(self, number: int) -> Motor | str:
        try:
            blocks = [self._read(number, address, length) for address, length in _BLOCKS]
        except _NoAnswer as error:
            return str(error)
        about, limits, torque, errors, now = blocks
        model = int.from_bytes(about[0:2], "little")
        load = int.from_bytes(now[0:2], "little", signed=True)
        position = int.from_bytes(now[6:10], "little", signed=True)
        return Motor(
            number=number,
            model=MODELS.get(model, f"model {model}"),
            firmware=about[6],
            torque_on=torque[0] == 1,
            errors=tuple(name for bit, name in ERROR_BITS.items() if errors[0] >> bit & 1),
            position_rad=(position - _PULSES // 2) * 2.0 * math.pi / _PULSES,
            # The same register: per mille of its torque in an XL430, 2.69 mA in an XM.
            load=f"load {load / 10:+.0f} %" if model == 1060 else f"{2.69 * load:+.0f} mA",
            voltage_v=int.from_bytes(now[18:20], "little") / 10,
            voltage_limits_v=(_tenths(limits[3:5]), _tenths(limits[1:3])),
            temperature_c=now[20],
            temperature_limit_c=limits[0],
        )

    def _read(self, number: int, address: int, length: int) -> bytes:
        """One block. Raises _NoAnswer: none in three tries, or the motor refuses."""
        why = ""
        for _ in range(TRIES):
            data, result, error = self._packets.readTxRx(self._port, number, address, length)
            if result != 0:  # the data are zeros then, and zero is a temperature too
                why = self._packets.getTxRxResult(result).removeprefix("[TxRxResult] ")
                continue
            if error & ~_ALERT or len(data) != length:
                # An error status carries no data; the SDK then hands out the packet's checksum as if it were some.
                raise _NoAnswer(f"register {address}: {self._packets.getRxPacketError(error & ~_ALERT) or 'no data'}")
            return bytes(data)  # the alert bit only says that the error register is worth a look
        raise _NoAnswer(why)


def _tenths(data: bytes) -> float:
    return int.from_bytes(data, "little") / 10
