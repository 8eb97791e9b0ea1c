"""vLLM's processes end with the server that started them (entry point `vllm.general_plugins` of this distribution).

A server that is killed outright cannot tell vLLM's engine process, which stays, with the card's memory, and the next
server does not fit beside it. So each process that vLLM starts waits for its parent's end.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

EXIT_CODE = 1


def watch() -> None:
    """Called by vLLM at the start of each of its processes; does nothing in the server itself."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(EXIT_CODE)

    threading.Thread(target=wait, name="vlm2vla-parent", daemon=True).start()
