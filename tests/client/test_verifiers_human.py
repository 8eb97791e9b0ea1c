"""The operator as verifier, on a pseudo-terminal; and the chain "gemini, else human"."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_fakes import ScriptedVerifier, make_frame

from vlm2vla_client.errors import VerifierError
from vlm2vla_client.verifiers.base import Notes
from vlm2vla_client.verifiers.chain import ChainVerifier
from vlm2vla_client.verifiers.human import HumanVerifier, TerminalKeys, show_on_display, side_by_side
from vlm2vla_schema.images import decode_image
from vlm2vla_schema.types import Frame, Verdict

BEFORE, AFTER = make_frame(1), make_frame(2)


@dataclass
class Terminal:
    """Both ends of a pseudo-terminal."""

    operator: int
    program: int

    def type_after(self, seconds: float, keys: bytes) -> None:
        """Presses keys later, as a person would."""
        threading.Timer(seconds, os.write, (self.operator, keys)).start()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    operator, program = os.openpty()
    yield Terminal(operator, program)
    os.close(operator)
    os.close(program)


def notes() -> Notes:
    return Notes(lambda *_, **__: None, lambda frame: Path("runs") / "frames" / f"{frame.frame_id}.jpg", lambda: None)


def ask(terminal: Terminal, deadline_s: float = 10.0, said: list[str] | None = None) -> Verdict:
    say = (said if said is not None else []).append
    verifier = HumanVerifier(keys=TerminalKeys(terminal.program), say=say, show=lambda *_: None)
    verifier.note_in(notes())
    return verifier.verify(BEFORE, AFTER, "Grasp \x1b[31mCarrot", "Lift", deadline_s)


@pytest.mark.parametrize(("key", "success"), [(b"y", True), (b"Y", True), (b"n", False), (b"xn", False)])
def test_one_key_without_enter_decides(terminal: Terminal, key: bytes, success: bool) -> None:
    for index, byte in enumerate(key):
        terminal.type_after(0.3 * (index + 1), bytes([byte]))
    said: list[str] = []
    assert ask(terminal, said=said).success is success
    text = "\n".join(said)
    assert str(Path("runs/frames/f1.jpg")) in text and str(Path("runs/frames/f2.jpg")) in text
    assert "Carrot" in text and "Lift" in text and "\x1b" not in text


def test_q_ends_the_episode(terminal: Terminal) -> None:
    terminal.type_after(0.3, b"q")
    with pytest.raises(KeyboardInterrupt):
        ask(terminal)


def test_silence_is_never_a_success_and_the_deadline_holds(terminal: Terminal) -> None:
    began_s = time.monotonic()
    with pytest.raises(VerifierError, match="no answer"):
        ask(terminal, deadline_s=0.5)
    assert 0.5 <= time.monotonic() - began_s < 5.0


def test_a_key_pressed_before_the_question_is_no_answer(terminal: Terminal) -> None:
    os.write(terminal.operator, b"y\n")
    time.sleep(0.1)
    with pytest.raises(VerifierError, match="no answer"):
        ask(terminal, deadline_s=0.5)


def test_other_keys_do_not_stretch_the_deadline(terminal: Terminal) -> None:
    for index in range(5):
        terminal.type_after(0.2 * index, b"x")
    began_s = time.monotonic()
    with pytest.raises(VerifierError):
        ask(terminal, deadline_s=1.0)
    assert time.monotonic() - began_s < 5.0


def test_a_pipe_cannot_say_yes() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"y\n")
    try:
        with pytest.raises(VerifierError, match="terminal") as caught:
            HumanVerifier(keys=TerminalKeys(reader), say=lambda _: None).verify(BEFORE, AFTER, "Grasp", None, 1.0)
        assert not caught.value.again
    finally:
        os.close(reader)
        os.close(writer)


def test_the_pair_shows_both_pictures() -> None:
    wide = Frame(np.full((48, 64, 3), 200, dtype=np.uint8), 0.0, "a")
    small = Frame(np.full((24, 32, 3), 20, dtype=np.uint8), 0.0, "b")
    pair = decode_image(side_by_side(wide, small))
    assert pair.shape == (48, 64 + 8 + 32, 3)
    assert abs(int(pair[10, 10, 0]) - 200) < 5 and abs(int(pair[10, 90, 0]) - 20) < 5


def test_without_a_display_nothing_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    show_on_display(
        BEFORE, AFTER, Notes(lambda *_, **__: None, lambda _: tmp_path / "frames" / "000000.jpg", lambda: None)
    )
    assert list(tmp_path.iterdir()) == []


def test_with_a_display_the_pair_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opener = tmp_path / "bin" / "xdg-open"
    opener.parent.mkdir()
    opener.write_text(f'#!/bin/sh\ncp "$1" "{tmp_path}/opened.jpg"\n')
    opener.chmod(0o755)
    monkeypatch.setenv("PATH", f"{opener.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DISPLAY", ":99")
    show_on_display(
        BEFORE, AFTER, Notes(lambda *_, **__: None, lambda _: tmp_path / "frames" / "000000.jpg", lambda: None)
    )
    ends_s = time.monotonic() + 10
    while not (tmp_path / "opened.jpg").is_file() and time.monotonic() < ends_s:
        time.sleep(0.05)
    assert (tmp_path / "verify.jpg").read_bytes() == side_by_side(BEFORE, AFTER)
    assert (tmp_path / "opened.jpg").is_file()


# --- in a chain ------------------------------------------------------------------------------------------------


class Hanging(ScriptedVerifier):
    """Uses up all the time it is given, as a silent Gemini would."""

    def verify(self, *arguments: Any) -> Verdict:
        time.sleep(arguments[-1])
        return super().verify(*arguments)


def test_a_silent_first_member_leaves_the_human_half_of_the_time(terminal: Terminal) -> None:
    human = HumanVerifier(keys=TerminalKeys(terminal.program), say=lambda _: None, show=lambda *_: None)
    chain = ChainVerifier([Hanging([VerifierError("timeout")], "gemini"), human])
    chain.note_in(notes())
    terminal.type_after(2.6, b"y")
    began_s = time.monotonic()
    assert chain.verify(BEFORE, AFTER, "Grasp", None, 4.0).success
    assert 2.0 <= time.monotonic() - began_s < 4.5 and chain.name == "gemini,human"


def test_the_chain_does_not_repeat_what_cannot_be_mended() -> None:
    blocked = ScriptedVerifier([VerifierError("blocked", again=False)], "gemini")
    human = ScriptedVerifier([False], "human")
    assert not ChainVerifier([blocked, human]).verify(BEFORE, AFTER, "Grasp", None, 1.0).success
    assert (len(blocked.calls), len(human.calls)) == (1, 1)
