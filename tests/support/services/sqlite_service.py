"""A small ledger on SQLite in WAL mode, with synchronous=FULL: an answer means that the record is on disk.

A container's program: Python alone, one thread a client. Each line ``put N`` is answered by ``ok N``, ``all`` by all
numbers in one line. Every record also moves money between accounts, so that there are pages to change everywhere, and
indexes; the sum of all accounts never changes. It ends on SIGTERM at once, as it may: what it said is on disk.
"""

import signal
import socketserver
import sqlite3
import threading

ACCOUNTS = 2000
FILE = "/data/ledger.sqlite"
writing = threading.Lock()


def opened() -> sqlite3.Connection:
    connection = sqlite3.connect(FILE, timeout=30, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA wal_autocheckpoint=200")
    connection.execute("PRAGMA mmap_size=67108864")
    return connection


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        connection = opened()
        for line in self.rfile:
            words = line.split()
            if words[:1] == [b"put"]:
                put(connection, int(words[1]))
                self.wfile.write(b"ok %d\n" % int(words[1]))
            else:
                rows = connection.execute("SELECT number FROM records ORDER BY number")
                self.wfile.write(b" ".join(b"%d" % row for row in rows) + b"\n")
        connection.close()


def put(connection: sqlite3.Connection, number: int) -> None:
    one, other = number % ACCOUNTS, number * 7919 % ACCOUNTS
    with writing:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO records VALUES (?, ?)", (number, f"record {number} " * 10))
        connection.execute("UPDATE accounts SET balance = balance - 1 WHERE id = ?", (one,))
        connection.execute("UPDATE accounts SET balance = balance + 1 WHERE id = ?", (other,))
        connection.execute("COMMIT")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    connection = opened()
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE IF NOT EXISTS records (number INTEGER NOT NULL UNIQUE, text TEXT NOT NULL)")
    connection.execute("CREATE INDEX IF NOT EXISTS by_text ON records (text)")
    connection.execute("CREATE TABLE IF NOT EXISTS accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)")
    rows = [(number, 1000) for number in range(ACCOUNTS)]
    connection.executemany("INSERT OR IGNORE INTO accounts VALUES (?, ?)", rows)
    server = Server(("", 7000), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.02)


main()
