"""A process that vLLM starts does not outlive a server that was killed outright."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import multiprocessing, os, sys, time
from vlm2vla_server.engines.vllm_parent import watch

def engine() -> None:
    watch()
    print(os.getpid(), flush=True)
    time.sleep(300)

if __name__ == "__main__":
    watch()
    child = multiprocessing.get_context("spawn").Process(target=engine)
    child.start()
    child.join()
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_server_takes_its_engine_process_along(tmp_path: Path) -> None:
    program = tmp_path / "server.py"
    program.write_text(PROGRAM)
    server = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        engine = int(server.stdout.readline())
        time.sleep(0.3)
        assert runs(engine) and server.poll() is None
        server.send_signal(signal.SIGKILL)
        server.wait(10)
        deadline_s = time.monotonic() + 10
        while runs(engine) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not runs(engine)
    finally:
        server.kill()
        if "engine" in locals() and runs(engine):
            os.kill(engine, signal.SIGKILL)
