"""`closed.py REPORT PROGRAM words...`: a program to which the network is closed.

What it asks of the network goes to the file REPORT, a line each, and is refused there and then. The audit hook hears of
every socket of Python, whichever package opens it. Allowed are this machine's own address and sockets that have a path.
"""

import os
import runpy
import sys
from typing import Any

import huggingface_hub.constants

OWN = ("localhost", "127.0.0.1", "::1")
EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getaddrinfo": 0}


def close_network(report: str) -> None:
    handle = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        place = arguments[EVENTS[event]]
        host = place[0] if isinstance(place, tuple) else place
        if host in OWN or (event != "socket.getaddrinfo" and not isinstance(place, tuple)):
            return
        os.write(handle, f"{event} {place!r}\n".encode())
        raise OSError(101, "the network is closed")

    sys.addaudithook(hear)


if __name__ == "__main__":
    close_network(sys.argv[1])
    huggingface_hub.constants.HF_HUB_CACHE = os.path.abspath("hub")  # not that of this machine's user
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
