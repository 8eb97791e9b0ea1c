"""A standard proxy (haproxy) in front of several servers, configured as docs/serve.md says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from live_server import Live, free_port

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serve.md"
PROGRAM = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or "haproxy"
START_LIMIT_S = 20.0


def configuration(port: int, replicas: Sequence[Live]) -> str:
    """The configuration printed in docs/serve.md, with other addresses."""
    block = re.search(r"```haproxy\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None, "docs/serve.md has no haproxy block"
    lines = [line for line in block[1].splitlines() if not line.strip().startswith("server ")]
    lines += [f"    server r{number} {live.host}:{live.port} check" for number, live in enumerate(replicas)]
    return re.sub(r"bind \S+", f"bind 127.0.0.1:{port}", "\n".join(lines)) + "\n"


@contextlib.contextmanager
def live_proxy(replicas: Sequence[Live], folder: Path) -> Iterator[str]:
    """Start haproxy over the replicas; yields its URL."""
    port = free_port()
    file = folder / "haproxy.cfg"
    file.write_text(configuration(port, replicas))
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "-db", "-f", str(file)], stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            assert process.poll() is None, (folder / "haproxy.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert time.monotonic() < deadline_s, "haproxy does not listen"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
