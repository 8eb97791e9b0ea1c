"""Reads the data out of Python's serialised files (.pkl) without executing them: plain containers and numpy arrays.

Nothing is imported and nothing is called: the instructions are listed by the standard library's disassembler and a
small machine of our own carries out those that build numbers, texts, lists, dicts and arrays. A file that asks for
anything else is refused. Raw Bridge folders are kept in this form. Format:
https://docs.python.org/3/library/pickletools.html.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vla_training.errors import DataError

MAX_FILE_BYTES = 256 << 20
_MAX_DEPTH = 50
_DTYPE = re.compile(r"^[<>|=]?[?biufcSU]\d*$")
_MARK = object()
# What numpy has called the same five things over the years.
_MODULES = ("numpy", *(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")))
_NAMES = {
    f"{module} {name}": name
    for module in _MODULES
    for name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
} | {"_codecs encode": "encode", "collections OrderedDict": "OrderedDict"}
_PUSHED = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list, "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple, "MARK": lambda: _MARK,
}  # fmt: skip


class _Name(str):
    """One of the few admitted names; never looked up, only recognised."""


class _Array:
    """An array whose shape and bytes arrive later."""

    value: Any = None


class _Type:
    """A numpy type by its code, for example "<f8"."""

    def __init__(self, code: str) -> None:
        self.code = code

    def dtype(self) -> np.dtype[Any]:
        if not _DTYPE.match(self.code):
            raise DataError(f"arrays of type {self.code!r} are not read; expected numbers or texts")
        return np.dtype(self.code)


def read_plain(path: Path) -> Any:
    """Read one file into dicts, lists, tuples, numbers, texts, bytes and numpy arrays.

    Raises:
        DataError: the file is too large, broken, or asks for anything but data; the message names the file and what.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_FILE_BYTES}")
    try:
        return plain(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def plain(data: bytes) -> Any:
    """Read serialised data; see `read_plain`.

    Raises:
        DataError: as `read_plain`.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return _resolved(machine.pop(), {}, 0)
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
        raise DataError(f"broken data: {error!r}") from error
    raise DataError("broken data: no end")


class _Machine:
    """Stack and memo; `step` carries out one instruction."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSHED:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else int(argument)] = self._stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name in ("REDUCE", "BUILD"):
            last, first = self._stack.pop(), self._stack.pop()
            self._stack.append(_called(first, last) if name == "REDUCE" else _built(first, last))
        elif name not in ("PROTO", "FRAME"):
            self._collect(name)

    def _name(self, argument: Any) -> None:
        if argument is None:
            last, first = self._stack.pop(), self._stack.pop()
            argument = f"{first} {last}"
        if argument not in _NAMES:
            raise DataError(f"it asks for '{argument}'; only numbers, texts, containers and numpy arrays are read")
        self._stack.append(_Name(_NAMES[argument]))

    def _to_mark(self) -> list[Any]:
        begin = max(place for place, value in enumerate(self._stack) if value is _MARK)
        items = self._stack[begin + 1 :]
        del self._stack[begin:]
        return items

    def _collect(self, name: str) -> None:
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(self._stack[-count:])
            del self._stack[-count:]
            self._stack.append(items)
        elif name in ("TUPLE", "LIST", "DICT"):
            found = self._to_mark()
            made = tuple(found) if name == "TUPLE" else found if name == "LIST" else dict(_pairs(found))
            self._stack.append(made)
        elif name in ("APPEND", "APPENDS"):
            found = self._to_mark() if name == "APPENDS" else [self._stack.pop()]
            _list(self._stack[-1]).extend(found)
        elif name in ("SETITEM", "SETITEMS"):
            found = self._to_mark() if name == "SETITEMS" else [self._stack.pop(), self._stack.pop()][::-1]
            _dict(self._stack[-1]).update(_pairs(found))
        else:
            raise DataError(f"instruction {name} is not carried out; expected plain data")


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"items for a {type(value).__name__}; expected a list")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise DataError(f"entries for a {type(value).__name__}; expected a dict")
    return value


def _called(name: Any, arguments: Any) -> Any:
    """What the admitted names make of their arguments."""
    if not isinstance(name, _Name) or not isinstance(arguments, tuple):
        raise DataError(f"a call of {type(name).__name__}; expected plain data")
    if name == "_reconstruct":
        return _Array()
    if name == "dtype":
        return _Type(str(arguments[0]))
    if name == "scalar":
        return np.frombuffer(_bytes(arguments[1]), arguments[0].dtype(), count=1)[0]
    if name == "_frombuffer":
        buffer, kind, shape, order = arguments
        return _shaped(buffer, kind, shape, order == "F")
    if name == "encode":
        return str(arguments[0]).encode("latin-1")
    if name == "OrderedDict":
        return dict(_pairs([one for pair in (arguments[0] if arguments else []) for one in pair]))
    raise DataError(f"a call of numpy's {name}; expected plain data")


def _built(target: Any, state: Any) -> Any:
    """Give an announced array or type its contents."""
    if isinstance(target, _Type):
        order = str(state[1])
        target.code = (order if order in "<>=|" else "") + target.code.lstrip("<>=|")
    elif isinstance(target, _Array):
        _, shape, kind, fortran, raw = state
        if isinstance(raw, list):  # an array of objects
            target.value = raw
        else:
            target.value = _shaped(raw, kind, shape, bool(fortran))
    else:
        raise DataError(f"a state for a {type(target).__name__}; expected plain data")
    return target


def _shaped(raw: Any, kind: Any, shape: Any, fortran: bool) -> Any:
    if not isinstance(kind, _Type):
        raise DataError(f"an array of {type(kind).__name__}; expected a numpy type")
    return np.frombuffer(_bytes(raw), kind.dtype()).reshape(tuple(shape), order="F" if fortran else "C")


def _bytes(value: Any) -> bytes:
    # Python 2 wrote bytes as text. A number would be taken for a length, and memory set aside for it.
    if not isinstance(value, str | bytes | bytearray):
        raise DataError(f"an array's contents are of {type(value).__name__}; expected bytes")
    return value.encode("latin-1") if isinstance(value, str) else bytes(value)


def _resolved(value: Any, done: dict[int, Any], depth: int) -> Any:
    """Put finished arrays where they were announced; shared parts are done once, so that nothing can grow."""
    if depth > _MAX_DEPTH:
        raise DataError(f"containers nested more than {_MAX_DEPTH} deep")
    if isinstance(value, _Array):
        return _resolved(value.value, done, depth + 1)
    if isinstance(value, _Name | _Type):
        raise DataError("a bare numpy name; expected plain data")
    if not isinstance(value, list | tuple | dict):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {key: _resolved(one, done, depth + 1) for key, one in value.items()}
        else:
            items = [_resolved(one, done, depth + 1) for one in value]
            done[id(value)] = items if isinstance(value, list) else tuple(items)
    return done[id(value)]
