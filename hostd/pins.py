"""Keeps this host's SSH pins as the fleet's members are: whose host key is believed, and whose key may come here.

``known_hosts`` and ``authorized_keys`` follow from ``members/``, which the fleet's authority has signed. A host that was
removed is gone from both at once, or within a few seconds if nobody says so. Only in a secured fleet; elsewhere a person keeps these files.

It must never write anything that is not in a record which the authority has signed, nor empty the files because the bus
does not answer: what is pinned stays as it is until somebody says otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from events.crypto import write_file
from events.errors import CargoError
from events.membership import Member

LOOK_SECONDS = 5.0
HEADER = "# Kept by cargo-hostd from the members of the fleet; what is written here by hand is lost.\n"


class Pins:
    """A thread that looks at the members when it is told that they changed, and every LOOK_SECONDS."""

    def __init__(
        self,
        host: str,
        members: Callable[[], Mapping[str, Member]],
        known_hosts: Path,
        authorized_keys: Path,
        log: structlog.stdlib.BoundLogger,
        line: Callable[[str, str], str] | None = None,
        bar: Callable[[frozenset[str]], None] = lambda _peers: None,
    ) -> None:
        """``line`` makes the line of ``authorized_keys`` of a peer from its name and key.

        ``bar`` gets the hosts that were removed, as the authority says. Not those of whom nothing is known: whoever controls
        the bus can take records away, and running containers read over connections that are open.
        """
        self._bar = bar
        self._line = line or authorized_line
        self._host = host
        self._members = members
        self._known_hosts = known_hosts
        self._authorized_keys = authorized_keys
        self._log = log
        self._closing = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pins", daemon=True)

    def start(self) -> None:
        """Look once, then in the background."""
        self.look()
        self._thread.start()

    def close(self) -> None:
        """Stop looking; the files stay."""
        self._closing = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(LOOK_SECONDS)

    def wake(self) -> None:
        """The members have changed: the thread looks now."""
        self._woken.set()

    def look(self) -> None:
        """Write what has changed. What is wrong is logged, and tried again."""
        try:
            members = self._members()
            self._write(self._known_hosts, known_hosts(members), 0o644)
            self._write(self._authorized_keys, authorized_keys(members, self._host, self._line), 0o600)
            self._bar(removed_hosts(members))
        except CargoError as error:
            self._log.warning("the SSH pins stay as they are", reason=str(error))

    def _write(self, path: Path, text: str, mode: int) -> None:
        if not path.exists() or path.read_bytes() != text.encode():
            write_file(path, text.encode(), mode)
            self._log.info("SSH pins written", file=str(path), hosts=text.count("\n") - 1)

    def _run(self) -> None:
        while True:
            self._woken.wait(LOOK_SECONDS)
            self._woken.clear()  # before the look: what changes during it is looked at once more
            if self._closing:
                return
            self.look()


def removed_hosts(members: Mapping[str, Member]) -> frozenset[str]:
    """Hosts of which the authority says that they are members no more."""
    return frozenset(
        name.partition("/")[2] for name, one in members.items() if name.startswith("hostd/") and not one.active
    )


def known_hosts(members: Mapping[str, Member]) -> str:
    """Every host's key under its name in Cargo."""
    hosts = {name.partition("/")[2]: one.ssh_host_key for name, one in sorted(members.items()) if one.ssh_host_key}
    return HEADER + "".join(f"{host} {key}\n" for host, key in hosts.items())


def authorized_line(peer: str, key: str) -> str:
    """How the key of ``peer`` opens this host."""
    return f"restrict {key} hostd@{peer}"


def authorized_keys(members: Mapping[str, Member], own: str, line: Callable[[str, str], str] = authorized_line) -> str:
    """Every other host's key."""
    lines = [
        line(name.partition("/")[2], one.ssh_client_key)
        for name, one in sorted(members.items())
        if one.ssh_client_key and name != f"hostd/{own}"
    ]
    return HEADER + "".join(f"{one}\n" for one in lines)
