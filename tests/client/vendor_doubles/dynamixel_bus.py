"""Dynamixel X motors on a pseudo-terminal, for ROBOTIS's real SDK to talk to.

It speaks Protocol 2.0 as ROBOTIS's e-Manual describes it (instruction and status packets, CRC-16, byte stuffing), with
the X series' registers. Traps of the SDK 4.1.0 that a caller meets here, by its own files:

- port_handler.py `setupPort`: pyserial's exception instead of the documented False;
- protocol2_packet_handler.py `read1ByteTxRx`: 0 when nothing answered;
- the same file's `readTxRx`: the bytes of the checksum as data, when a status holds an error and no data;
- its `rxPacket`: no end while a line never falls silent;
- ``ERRBIT_ALERT``: a hardware error is a bit beside data that are good;
- a register may mean another thing in another model (126: current of an XM430, load of an XL430).
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import threading
import tty
from dataclasses import dataclass, field

PING, READ, STATUS = 1, 2, 0x55
ACCESS_ERROR, ALERT = 7, 0x80
HEADER = b"\xff\xff\xfd\x00"


def crc16(data: bytes) -> int:
    """CRC-16 with the polynomial 0x8005, bit by bit."""
    value = 0
    for byte in data:
        value ^= byte << 8
        for _ in range(8):
            value = (value << 1) ^ (0x8005 if value & 0x8000 else 0)
        value &= 0xFFFF
    return value


@dataclass
class Table:
    """One motor's registers; the defaults are those of a healthy XM430-W350 at 12 V and 31 C, torque on."""

    model: int = 1020
    torque: int = 1
    hardware_error: int = 0
    load: int = -12
    position: int = 2048
    tenth_volts: int = 119
    celsius: int = 31
    firmware: int = 45

    def read(self, address: int, length: int) -> bytes:
        """Registers as they lie in the motor, little-endian."""
        memory = bytearray(256)
        for start, size, value in (
            (0, 2, self.model), (6, 1, self.firmware), (31, 1, 80), (32, 2, 160), (34, 2, 95), (64, 1, self.torque),
            (70, 1, self.hardware_error), (126, 2, self.load), (132, 4, self.position), (144, 2, self.tenth_volts),
            (146, 1, self.celsius),
        ):  # fmt: skip
            memory[start : start + size] = value.to_bytes(size, "little", signed=value < 0)
        return bytes(memory[address : address + length])


@dataclass
class Faults:
    """What goes wrong on the line."""

    unanswered: dict[int, int] = field(default_factory=dict)  # motor: how many more requests it ignores
    corrupt: dict[int, int] = field(default_factory=dict)  # motor: how many more answers arrive with a wrong CRC
    refused: dict[int, int] = field(default_factory=dict)  # motor: the address that it answers with an access error
    noise: bool = False


class MotorBus:
    """Use as a context manager; ``port`` is what a client opens. ``instructions`` is everything that was asked."""

    def __init__(self, motors: dict[int, Table], faults: Faults | None = None) -> None:
        self.motors, self.faults = motors, faults or Faults()
        self.instructions: list[tuple[int, int]] = []
        self._stop = threading.Event()

    def __enter__(self) -> MotorBus:
        self._ours, self._theirs = pty.openpty()
        tty.setraw(self._theirs)
        self.port = os.ttyname(self._theirs)
        os.set_blocking(self._ours, False)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        os.close(self._ours)
        os.close(self._theirs)

    def _serve(self) -> None:
        waiting = b""
        while not self._stop.is_set():
            if self.faults.noise:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._ours, b"$GPGGA,nobody,asked," * 50)
            if not select.select([self._ours], [], [], 0.0 if self.faults.noise else 0.02)[0]:
                continue
            with contextlib.suppress(BlockingIOError, OSError):
                waiting += os.read(self._ours, 4096)
            while (packet := self._packet(waiting)) is not None:
                waiting = waiting[len(packet) :]
                self._answer(packet)

    def _packet(self, data: bytes) -> bytes | None:
        if len(data) < 7 or len(data) < 7 + int.from_bytes(data[5:7], "little"):
            return None
        packet = data[: 7 + int.from_bytes(data[5:7], "little")]
        assert packet.startswith(HEADER) and crc16(packet[:-2]) == int.from_bytes(packet[-2:], "little")
        return packet

    def _answer(self, packet: bytes) -> None:
        number, instruction, parameters = packet[4], packet[7], packet[8:-2]
        self.instructions.append((number, instruction))
        motor = self.motors.get(number)
        if motor is None or instruction not in (PING, READ):
            return
        if self._counted(self.faults.unanswered, number):
            return
        address, length = int.from_bytes(parameters[0:2], "little"), int.from_bytes(parameters[2:4], "little")
        error, data = ALERT if motor.hardware_error else 0, motor.read(address, length)
        if self.faults.refused.get(number) == address:
            error, data = error | ACCESS_ERROR, b""
        body = (bytes([STATUS, error]) + data).replace(b"\xff\xff\xfd", b"\xff\xff\xfd\xfd")
        status = HEADER + bytes([number]) + (len(body) + 2).to_bytes(2, "little") + body
        checked = crc16(status) ^ (1 if self._counted(self.faults.corrupt, number) else 0)
        os.write(self._ours, status + checked.to_bytes(2, "little"))

    def _counted(self, left: dict[int, int], number: int) -> bool:
        left[number] = left.get(number, 0) - 1
        return left[number] >= 0


def whole_arm(**changes: Table) -> dict[int, Table]:
    """Nine motors, the last two of them XL430, as in a WidowX 250S. ``motor_4=Table(...)`` changes one."""
    motors = {number: Table(model=1060 if number >= 8 else 1020) for number in range(1, 10)}
    return motors | {int(name.removeprefix("motor_")): table for name, table in changes.items()}
