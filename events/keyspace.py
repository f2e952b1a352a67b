"""Every key that Cargo reads or writes, built and parsed in one place (DESIGN section 2).

Whoever needs a key asks a ``Keyspace`` for it; nobody joins strings with ``/``. Keys are ``str``; bytes that
are no UTF-8, as people may put them, survive as surrogates (``key_bytes`` and ``key_text``). Parsing never
guesses: a key of a shape not listed here is None, and an illegal name inside a known shape is None too.
Only ``requests/`` and ``controls/``, which people write by hand, are parsed whatever their last part is, so
that a malformed one can be answered instead of overlooked.

Pure: no I/O, no clock, no randomness.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple

DEFAULT_PREFIX = "/cargo"

MAX_MIGRATION_ID = 64
"""The id becomes part of container, directory and mount names, which have limits of their own."""
MAX_HOST_NAME = 63
"""A DNS label."""
MAX_CONTAINER_NAME = 128

SEQ_DIGITS = 12
"""Zero padding of a sequence number: keys then sort as numbers do."""
MAX_SEQ = 10**SEQ_DIGITS - 1

_MIGRATION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_CONTAINER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{1,127}", re.ASCII)
_SEQ = re.compile(r"[0-9]{12}", re.ASCII)
_PROCESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}(/[A-Za-z0-9][A-Za-z0-9._-]{0,62})?", re.ASCII)
_PREFIX = re.compile(r"(/[A-Za-z0-9._-]+)+", re.ASCII)


def key_bytes(key: str) -> bytes:
    """The bytes that the store holds for ``key``."""
    return key.encode("utf-8", "surrogateescape")


def key_text(raw: bytes) -> str:
    """The ``str`` for a stored key; bytes that are no UTF-8 become surrogates and come back unchanged."""
    return raw.decode("utf-8", "surrogateescape")


def prefix_end(prefix: bytes) -> bytes:
    """The first key after every key that starts with ``prefix``; ``b"\\0"`` means: no end.

    This is how etcd expresses a prefix as a half-open range (etcd.io, learning/api, "Key ranges").
    """
    trimmed = prefix.rstrip(b"\xff")
    if not trimmed:
        return b"\0"
    return trimmed[:-1] + bytes([trimmed[-1] + 1])


def valid_migration_id(text: str) -> bool:
    """Letters, digits, ``.``, ``_`` and ``-``; starts with a letter or digit; at most 64 characters."""
    return _MIGRATION_ID.fullmatch(text) is not None


def valid_host_name(text: str) -> bool:
    """As a migration id, at most 63 characters."""
    return _HOST_NAME.fullmatch(text) is not None


def valid_container_name(text: str) -> bool:
    """Docker's own rule, ``[a-zA-Z0-9][a-zA-Z0-9_.-]+``, at most 128 characters; no leading slash."""
    return _CONTAINER_NAME.fullmatch(text) is not None


def safe_id_for(raw: bytes | str) -> str:
    """A legal migration id standing for an illegal one, so that even that request gets its answer.

    ``raw`` is what stood after ``requests/``. The same input always gives the same id.
    """
    data = key_bytes(raw) if isinstance(raw, str) else raw
    return f"invalid-{hashlib.sha256(data).hexdigest()[:16]}"


class Place(NamedTuple):
    """A parsed key: its ``kind`` and the variable parts in the order of the key.

    Kinds and parts: ``request`` (id, perhaps illegal), ``control`` (id, perhaps illegal), ``event``
    (migration, seq as decimal text), ``head`` (migration), ``inbox`` (host, migration), ``host`` (host),
    ``inventory`` (host, container), ``progress`` (migration, host), ``leader`` (), ``failpoints`` (process),
    ``placement`` (container).
    """

    kind: str
    parts: tuple[str, ...]


class Keyspace:
    """All keys under one prefix. Raises ValueError for a part that is illegal where it stands."""

    def __init__(self, prefix: str = DEFAULT_PREFIX) -> None:
        if _PREFIX.fullmatch(prefix) is None:
            raise ValueError(f"the key prefix {prefix!r} must look like '/cargo': parts after slashes, no final slash")
        self.prefix = prefix
        self.root = f"{prefix}/"
        """Prefix of everything."""
        self.requests = f"{prefix}/requests/"
        self.controls = f"{prefix}/controls/"
        self.migrations = f"{prefix}/migrations/"
        self.hosts = f"{prefix}/hosts/"
        self.inventories = f"{prefix}/inventory/"
        self.progresses = f"{prefix}/progress/"
        self.failpoint_sets = f"{prefix}/failpoints/"
        self.inboxes = f"{prefix}/inbox/"
        self.placements = f"{prefix}/placements/"
        self.leader = f"{prefix}/coordinator/leader"
        self.members = f"{prefix}/members/"
        self.joins = f"{prefix}/join/"

    # --- building ------------------------------------------------------------------------------

    def request(self, request_id: str) -> str:
        """Where a person puts the request ``request_id``."""
        return self.requests + _legal(request_id, valid_migration_id, "migration id")

    def control(self, migration: str) -> str:
        """Where a person puts ``abort``, ``pause`` and so on for ``migration``."""
        return self.controls + _legal(migration, valid_migration_id, "migration id")

    def migration(self, migration: str) -> str:
        """Prefix of everything recorded about ``migration``."""
        return f"{self.migrations}{_legal(migration, valid_migration_id, 'migration id')}/"

    def events(self, migration: str) -> str:
        """Prefix of the events of ``migration``."""
        return f"{self.migration(migration)}ev/"

    def event(self, migration: str, seq: int) -> str:
        """Key of event number ``seq``, which starts at 1."""
        if not 1 <= seq <= MAX_SEQ:
            raise ValueError(f"{seq} is no sequence number of an event")
        return f"{self.events(migration)}{seq:0{SEQ_DIGITS}d}"

    def head(self, migration: str) -> str:
        """Key of the head of ``migration``. It sorts after all its events."""
        return f"{self.migration(migration)}head"

    def inbox(self, host: str) -> str:
        """Prefix of the wake-up pointers for ``host``."""
        return f"{self.inboxes}{_legal(host, valid_host_name, 'host name')}/"

    def inbox_pointer(self, host: str, migration: str) -> str:
        """Key of the wake-up pointer for ``host`` about ``migration``."""
        return self.inbox(host) + _legal(migration, valid_migration_id, "migration id")

    def host(self, host: str) -> str:
        """Key of the registration of ``host``."""
        return self.hosts + _legal(host, valid_host_name, "host name")

    def inventory(self, host: str) -> str:
        """Prefix of what runs on ``host``."""
        return f"{self.inventories}{_legal(host, valid_host_name, 'host name')}/"

    def inventory_item(self, host: str, container: str) -> str:
        """Key of one container that runs on ``host``."""
        return self.inventory(host) + _legal(container, valid_container_name, "container name")

    def progress(self, migration: str, host: str) -> str:
        """Key of the latest progress of ``migration`` on ``host``."""
        return self.progress_of(migration) + _legal(host, valid_host_name, "host name")

    def progress_of(self, migration: str) -> str:
        """Prefix of the progress of ``migration`` on all hosts."""
        return f"{self.progresses}{_legal(migration, valid_migration_id, 'migration id')}/"

    def failpoints(self, process: str) -> str:
        """Key of the faults to inject into ``process``: ``coordinator`` or ``hostd/<host>``."""
        if _PROCESS.fullmatch(process) is None:
            raise ValueError(f"{process!r} is no process name")
        return self.failpoint_sets + process

    def placement(self, container: str) -> str:
        """Key of the note of where ``container`` belongs."""
        return self.placements + _legal(container, valid_container_name, "container name")

    def member(self, name: str) -> str:
        """Key of the pins of the member ``name``: ``coordinator/<name>`` or ``hostd/<host>``."""
        kind, _, own = name.partition("/")
        if kind not in ("coordinator", "hostd"):
            raise ValueError(f"{name!r} is no member's name")
        return f"{self.members}{kind}/{_legal(own, valid_host_name, 'name')}"

    def join_request(self, host: str) -> str:
        """Where a new host publishes its keys."""
        return f"{self.joins}{_legal(host, valid_host_name, 'host name')}/request"

    def renewal(self, host: str) -> str:
        """Where a member's agent asks for its next certificate, all the time."""
        return f"{self.joins}{_legal(host, valid_host_name, 'host name')}/renewal"

    def renewed(self, host: str) -> str:
        """Where it finds the certificate."""
        return f"{self.joins}{_legal(host, valid_host_name, 'host name')}/renewed"

    def join_answer(self, host: str) -> str:
        """Where a new host finds its certificate."""
        return f"{self.joins}{_legal(host, valid_host_name, 'host name')}/answer"

    # --- parsing -------------------------------------------------------------------------------

    def parse(self, key: str) -> Place | None:
        """What ``key`` is, or None when no key of ours looks like that."""
        if not key.startswith(self.root):
            return None
        kind, slash, rest = key[len(self.root) :].partition("/")
        if not slash:
            return None
        if kind == "requests":
            return Place("request", (rest,))
        if kind == "controls":
            return Place("control", (rest,))
        if kind == "migrations":
            return _parse_migration(rest)
        if kind == "failpoints":
            return Place("failpoints", (rest,)) if _PROCESS.fullmatch(rest) else None
        if kind == "coordinator":
            return Place("leader", ()) if rest == "leader" else None
        single = {"hosts": ("host", valid_host_name), "placements": ("placement", valid_container_name)}.get(kind)
        if single is not None:
            name, valid = single
            return Place(name, (rest,)) if valid(rest) else None
        double = {
            "inbox": ("inbox", valid_host_name, valid_migration_id),
            "inventory": ("inventory", valid_host_name, valid_container_name),
            "progress": ("progress", valid_migration_id, valid_host_name),
        }.get(kind)
        if double is not None:
            name, valid_first, valid_second = double
            first, _, second = rest.partition("/")
            return Place(name, (first, second)) if valid_first(first) and valid_second(second) else None
        return None


def _parse_migration(rest: str) -> Place | None:
    migration, _, inner = rest.partition("/")
    if not valid_migration_id(migration):
        return None
    if inner == "head":
        return Place("head", (migration,))
    branch, _, seq = inner.partition("/")
    if branch == "ev" and _SEQ.fullmatch(seq) and int(seq) >= 1:
        return Place("event", (migration, str(int(seq))))
    return None


def _legal(text: str, valid: Callable[[str], bool], what: str) -> str:
    if not valid(text):
        raise ValueError(f"{text!r} is no legal {what}")
    return text
