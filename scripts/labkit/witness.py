"""A client outside of the hosts that writes numbered records to Redis and remembers which were acknowledged.

It is what the whole project is measured by: no acknowledged record may be missing afterwards, and the time
between two answers is the outage. Numbers are never written twice: a record whose answer was lost may or may
not be there, which is what a real client knows, too.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

ANSWER_SECONDS = 1.0
CONNECT_SECONDS = 0.25
NUMBERS_SECONDS = 10.0
LIST_KEY = b"witness"


@dataclass
class Answer:
    """One acknowledged record: its number, when the answer came (monotonic), and from which address."""

    number: int
    at: float
    address: str


class Connection:
    """A minimal RESP client: enough for a few commands, and it never reconnects by itself."""

    def __init__(self, address: str, port: int, timeout_seconds: float = CONNECT_SECONDS) -> None:
        self._socket = socket.create_connection((address, port), timeout=timeout_seconds)
        self._socket.settimeout(ANSWER_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def call(self, *words: bytes) -> bytes | int | list[bytes]:
        """Send one command and return its answer. Raises OSError, also for an error answer."""
        parts = [b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)]
        self._socket.sendall(b"".join(parts))
        return self._read()

    def _read(self) -> bytes | int | list[bytes]:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the connection was closed")
        kind, rest = line[:1], line[1:-2]
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        if kind == b"$":
            body = self._file.read(int(rest) + 2)
            return body[:-2]
        if kind == b"*":
            return [self._read() for _ in range(int(rest))]  # type: ignore[misc]
        raise ConnectionError(rest.decode("utf-8", "replace"))

    def close(self) -> None:
        """Let go of the socket."""
        with contextlib.suppress(OSError):
            self._file.close()
            self._socket.close()


class Session(Protocol):
    """What the witness needs of a connection to any service; everything raises OSError when it does not work."""

    def write(self, number: int) -> None:
        """Write one record; returns once it was acknowledged."""

    def numbers(self) -> list[int]:
        """All records that the service has."""

    def close(self) -> None:
        """Let go of the connection."""


class RedisSession(Connection):
    """Records as the elements of one list."""

    def write(self, number: int) -> None:
        """Append the number."""
        self.call(b"RPUSH", LIST_KEY, b"%d" % number)

    def numbers(self) -> list[int]:
        """The whole list, in its order."""
        found = self.call(b"LRANGE", LIST_KEY, b"0", b"-1")
        assert isinstance(found, list)
        return [int(number) for number in found]


class AskingSession(RedisSession):
    """Only asks, and changes nothing: its records are answers."""

    def write(self, number: int) -> None:
        """Ask for a sign of life."""
        self.call(b"PING")


@dataclass
class Witness:
    """Writes to whichever of ``addresses`` answers, as fast as one connection can or every ``pause_seconds``."""

    addresses: list[str]
    port: int
    pause_seconds: float = 0.001
    answers: list[Answer] = field(default_factory=list)
    attempted: int = 0
    connect: Callable[[str, int], Session] = RedisSession

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)

    def start(self) -> None:
        """Begin; returns once a first record was acknowledged."""
        self._thread.start()
        self.wait_for(len(self.answers) + 1)

    def stop(self) -> None:
        """End; harmless when repeated."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def wait_for(self, count: int, timeout_seconds: float = 60.0) -> None:
        """Until ``count`` records have been acknowledged in all. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_seconds
        while len(self.answers) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {len(self.answers)} of {count} records were acknowledged in time")
            self._stop.wait(0.005)

    def wait_for_more(self, count: int, timeout_seconds: float = 60.0) -> None:
        """Until ``count`` further records have been acknowledged."""
        self.wait_for(len(self.answers) + count, timeout_seconds)

    def longest_gap(self, after: float = 0.0) -> tuple[float, Answer, Answer]:
        """The longest time between two answers from ``after`` (monotonic) on: the outage, and its two ends."""
        answers = [answer for answer in self.answers if answer.at >= after]
        pairs = itertools.pairwise(answers)
        return max(((second.at - first.at, first, second) for first, second in pairs), key=lambda gap: gap[0])

    def missing_from(self, address: str) -> list[int]:
        """Acknowledged numbers that the service at ``address`` does not have, or has not exactly once."""
        acknowledged = [answer.number for answer in list(self.answers)]  # before the look: it may go on writing
        counts = Counter(self.numbers(address))
        return [number for number in acknowledged if counts[number] != 1]

    def numbers(self, address: str) -> list[int]:
        """All records that the service at ``address`` has. Raises OSError."""
        deadline = time.monotonic() + NUMBERS_SECONDS
        while True:
            try:
                session = self.connect(address, self.port)
                break
            except OSError:  # a service that has just started may have a packet lost on its way
                if time.monotonic() > deadline:
                    raise
        try:
            return session.numbers()
        finally:
            session.close()

    def _run(self) -> None:
        connection: Session | None = None
        turn = 0
        while not self._stop.is_set():
            address = self.addresses[turn % len(self.addresses)]
            try:
                if connection is None:
                    connection = self.connect(address, self.port)
                self.attempted += 1
                connection.write(self.attempted)
                self.answers.append(Answer(self.attempted, time.monotonic(), address))
                self._stop.wait(self.pause_seconds)
            except OSError:
                if connection is not None:
                    connection.close()
                connection = None
                turn += 1
                self._stop.wait(0.001)
        if connection is not None:
            connection.close()


def numbers_in(address: str, port: int) -> list[int]:
    """All numbers in the list of the Redis there, in its order."""
    return Witness([address], port).numbers(address)


def load_keys(address: str, port: int, count: int, size_bytes: int) -> None:
    """Fill the service with ``count`` keys of ``size_bytes`` each."""
    connection = Connection(address, port, timeout_seconds=5)
    try:
        for number in range(count):
            connection.call(b"SET", b"key:%d" % number, (b"%08d" % number) * (size_bytes // 8))
    finally:
        connection.close()


def wait_until_answering(address: str, port: int, timeout_seconds: float = 30.0) -> None:
    """Until the service answers PING there. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            connection = Connection(address, port)
            try:
                if connection.call(b"PING") == b"PONG":
                    return
            finally:
                connection.close()
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing answers at {address}:{port}")
        threading.Event().wait(0.01)
