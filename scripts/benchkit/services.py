"""The services whose clients are watched while they move, and how one asks them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from labkit.postgresql import PostgresqlConnection
from labkit.witness import Connection, load_keys

KEYS = 10_000
VALUE_BYTES = 1000
ANSWERING_SECONDS = 30.0


class Session(Protocol):
    """One connection of a client. Everything raises OSError when it does not work."""

    def ping(self) -> None:
        """Any answer at all."""

    def read(self, key: int) -> None:
        """Ask for one value."""

    def write(self, key: int) -> None:
        """Change one value; returns once that was acknowledged."""

    def close(self) -> None:
        """Let go of the connection."""


class RedisClient(Connection):
    """Values of 1 kB by key."""

    VALUE = b"x" * VALUE_BYTES

    def ping(self) -> None:
        self.call(b"PING")

    def read(self, key: int) -> None:
        self.call(b"GET", b"key:%d" % key)

    def write(self, key: int) -> None:
        self.call(b"SET", b"key:%d" % key, self.VALUE)


class PostgresqlClient(PostgresqlConnection):
    """Rows of 1 kB by primary key, each write a transaction of its own."""

    SCHEMA = (
        f"CREATE TABLE accounts AS SELECT id, 1000 AS balance, repeat('x', {VALUE_BYTES}) AS filler "
        f"FROM generate_series(0, {KEYS - 1}) AS id; ALTER TABLE accounts ADD PRIMARY KEY (id); ANALYZE accounts"
    )

    def ping(self) -> None:
        self.query("SELECT 1")

    def read(self, key: int) -> None:
        self.query(f"SELECT balance, filler FROM accounts WHERE id = {key}")

    def write(self, key: int) -> None:
        self.query(f"UPDATE accounts SET balance = balance + 1 WHERE id = {key}")


@dataclass(frozen=True)
class Service:
    """What is run, where it listens, and how its data is laid out."""

    name: str
    """For people; in lower case also of the lab's image and of the plots."""
    port: int
    connect: Callable[[str, int], Session]
    prepare: Callable[[str, int], None]
    """Lay out KEYS values; the service at that address answers already."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the container, as the docker SDK calls them."""

    @property
    def image(self) -> str:
        """The lab's name of its image."""
        return self.name.lower()

    def wait_until_answering(self, address: str) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + ANSWERING_SECONDS
        while True:
            try:
                session = self.connect(address, self.port)
                try:
                    return session.ping()
                finally:
                    session.close()
            except OSError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.name} does not answer at {address}:{self.port}") from None
            time.sleep(0.01)


def _load_redis(address: str, port: int) -> None:
    load_keys(address, port, KEYS, VALUE_BYTES)


def _load_postgresql(address: str, port: int) -> None:
    session = PostgresqlClient(address, port)
    session.wait_up_to(ANSWERING_SECONDS)
    session.query(PostgresqlClient.SCHEMA)
    session.close()


REDIS = Service("Redis", 6379, RedisClient, _load_redis)
POSTGRESQL = Service(
    "PostgreSQL",
    5432,
    PostgresqlClient,
    _load_postgresql,
    {"stop_signal": "SIGINT", "shm_size": "128m"},  # a fast shutdown, as its own documentation has it for containers
)
