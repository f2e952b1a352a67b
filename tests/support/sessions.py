"""Connections of a client to real services, each a ``labkit.witness.Session``: write a record, list all records.

Only what the witness needs, on the standard library: SQL, HTTP, and lines of text. A session
never connects again by itself; everything that does not work raises OSError, as a client of the service would see it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import socket

from labkit.postgresql import PostgresqlConnection

CONNECT_SECONDS = 0.25
ANSWER_SECONDS = 2.0
LIST_SECONDS = 30.0


def _connected(address: str, port: int) -> socket.socket:
    made = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
    made.settimeout(ANSWER_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


class PostgresqlSession(PostgresqlConnection):
    """Records as rows, each written together with a movement of money."""

    ACCOUNTS = 5000
    SCHEMA = (
        "CREATE TABLE records (number bigint PRIMARY KEY, text text NOT NULL)",
        "CREATE INDEX ON records (text)",
        f"CREATE TABLE accounts AS SELECT id, 1000 AS balance, repeat('x', 200) AS filler "
        f"FROM generate_series(0, {ACCOUNTS - 1}) AS id",
        "ALTER TABLE accounts ADD PRIMARY KEY (id)",
        "CREATE EXTENSION amcheck",
    )

    def write(self, number: int) -> None:
        """A record, and money moved between two accounts, in one transaction."""
        one, other = number % self.ACCOUNTS, number * 7919 % self.ACCOUNTS
        self.query(
            f"BEGIN; INSERT INTO records VALUES ({number}, 'record {number}'); "
            f"UPDATE accounts SET balance = balance - 1 WHERE id = {one}; "
            f"UPDATE accounts SET balance = balance + 1 WHERE id = {other}; COMMIT"
        )

    def numbers(self) -> list[int]:
        """All records."""
        self.wait_up_to(LIST_SECONDS)
        return [int(number) for (number,) in self.query("SELECT number FROM records ORDER BY number")]


class HttpSession:
    """Records are files that are PUT below /records, each beside a look at a page of the site."""

    PAGES = 300
    FOLDERS = 7

    def __init__(self, address: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(address, port, timeout=CONNECT_SECONDS)
        self._connection.connect()
        self._connection.sock.settimeout(ANSWER_SECONDS)

    @staticmethod
    def page(number: int) -> bytes:
        """What the site has as ``pages/<number>.html``."""
        return hashlib.sha256(b"page %d" % number).hexdigest().encode() * (number % 40 * 20 + 1)

    @classmethod
    def record(cls, number: int) -> bytes:
        """The contents of a record's file."""
        return hashlib.sha256(b"record %d" % number).hexdigest().encode() * (number % 9 + 1)

    def fetch(self, path: str, method: str = "GET", body: bytes | None = None) -> bytes:
        """The answer's body. Raises OSError for any other status than success."""
        try:
            self._connection.request(method, path, body)
            answer = self._connection.getresponse()
            found = answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{path}: {error!r}") from error
        if answer.status not in (200, 201, 204):
            raise ConnectionError(f"{path}: {answer.status}")
        return found

    def write(self, number: int) -> None:
        """One file; a page that is not what it should be fails the test, as no outage explains it."""
        self.fetch(f"/records/{number % self.FOLDERS}/{number}", "PUT", self.record(number))
        page = number * 31 % self.PAGES
        assert self.fetch(f"/pages/{page}.html") == self.page(page), page

    def numbers(self) -> list[int]:
        """Every file whose name is a number and whose contents are right."""
        self._connection.sock.settimeout(LIST_SECONDS)
        found = []
        for folder in range(self.FOLDERS):
            rows = json.loads(self.fetch(f"/records/{folder}/"))
            found += [int(row["name"]) for row in rows if row["size"] == len(self.record(int(row["name"])))]
        return sorted(found)

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()


class LineSession:
    """The services of tests/support/services: ``put N`` → ``ok N``, ``all`` → all numbers."""

    def __init__(self, address: str, port: int) -> None:
        self._socket = _connected(address, port)
        self._file = self._socket.makefile("rb")

    def ask(self, words: str) -> bytes:
        """One line and its answer."""
        self._socket.sendall(words.encode() + b"\n")
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the connection was closed")
        return line.strip()

    def write(self, number: int) -> None:
        """One record."""
        answer = self.ask(f"put {number}")
        if answer != b"ok %d" % number:
            raise ConnectionError(answer.decode(errors="replace"))

    def numbers(self) -> list[int]:
        """All records."""
        self._socket.settimeout(LIST_SECONDS)
        return [int(number) for number in self.ask("all").split()]

    def close(self) -> None:
        """Let go of the connection."""
        self._file.close()
        self._socket.close()
