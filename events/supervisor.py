"""A word to whoever started this daemon: systemd learns when a service is ready.

sd_notify(3) by hand: one datagram to the socket that the environment names. No other supervisor takes notice, and a
supervisor that does not listen is no reason to fail.
"""

from __future__ import annotations

import contextlib
import os
import socket

READY = "READY=1"


def tell(state: str) -> None:
    """Send ``state``; nothing where nobody asked for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
    ):
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.send(state.encode())
