"""A connection to PostgreSQL by its wire protocol, on the standard library: enough for simple queries.

It never connects again by itself; everything that does not work raises OSError, as a client of the service would see it.
"""

from __future__ import annotations

import socket
import struct

CONNECT_SECONDS = 0.25
ANSWER_SECONDS = 2.0
PROTOCOL_3 = 196608
"""https://www.postgresql.org/docs/15/protocol-message-formats.html, StartupMessage."""


class PostgresqlConnection:
    """Simple queries as the user ``service``, who needs no password (see the recipe in labkit.images)."""

    def __init__(self, address: str, port: int) -> None:
        self._socket = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        self._socket.settimeout(ANSWER_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        words = b"user\0service\0database\0postgres\0\0"
        try:
            self._socket.sendall(struct.pack(">II", 8 + len(words), PROTOCOL_3) + words)
            self._rows()
        except OSError:
            self.close()
            raise

    def wait_up_to(self, seconds: float) -> None:
        """How long an answer may take from now on."""
        self._socket.settimeout(seconds)

    def query(self, text: str) -> list[list[str]]:
        """All rows of all statements in ``text``. Raises OSError, also for an error of the server."""
        raw = text.encode() + b"\0"
        self._socket.sendall(b"Q" + struct.pack(">I", 4 + len(raw)) + raw)
        return self._rows()

    def _rows(self) -> list[list[str]]:
        rows: list[list[str]] = []
        failed = ""
        while True:
            head = self._file.read(5)
            if len(head) < 5:
                raise ConnectionError(failed or "the connection was closed")
            kind, length = head[:1], struct.unpack(">I", head[1:])[0] - 4
            body = self._file.read(length)
            if kind == b"D":
                rows.append(columns(body))
            elif kind == b"E":
                failed = body.decode(errors="replace").replace("\0", " ")
            elif kind == b"Z":
                if failed:
                    raise ConnectionError(failed)
                return rows

    def close(self) -> None:
        """Let go of the connection."""
        self._file.close()
        self._socket.close()


def columns(body: bytes) -> list[str]:
    """The values of one DataRow message; an absent one is empty."""
    (count,) = struct.unpack_from(">H", body)
    at, found = 2, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", body, at)
        at += 4
        found.append(body[at : at + length].decode() if length >= 0 else "")
        at += max(0, length)
    return found
