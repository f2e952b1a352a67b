"""What an agent says of its host and its containers: the values of ``hosts/<host>``,
``inventory/<host>/<container>`` and ``placements/<container>``.

These are *hints* for listing and for rejecting impossible requests early. No right to start or stop
anything ever follows from them: they may be old, and the agents check again when they prepare. Each value
stays below MAX_RECORD_BYTES; a list that would not fit is cut and ``truncated`` says so, and what is missing
from a truncated list is unknown, not absent. No environment value and no label value enters a record.

Readers accept fields that a newer agent added, but neither another version nor a wrong type.
Pure: no clock, no randomness, no I/O.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from events.errors import SchemaError
from events.schema import PortBinding

RECORD_VERSION = 1
MAX_RECORD_BYTES = 60 * 1024
"""Under the 64 KiB that one value may have, with room for the store's own framing."""


class MountRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One data mount of a container."""

    kind: Literal["volume", "bind"]
    name: str
    """Volume name, or the bind's path on the host."""
    destination: str
    tree: str
    read_only: bool = False
    size_bytes: int | None = None
    """Space that the data occupies; None while it is unknown."""
    files: int | None = None
    """Directory entries, which is what takes inodes on the target; None while unknown."""
    shared_with: tuple[str, ...] = ()
    """Names of other running containers that use the same data."""
    file_system: str = ""
    """The kind of shared storage that it lies on (``nfs4``), which is attached, not copied; empty for data that moves."""


class ContainerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One container as its host's agent last saw it."""

    v: int = RECORD_VERSION
    id: str
    name: str
    image: str
    """What the image was called when the container was created."""
    image_id: str
    status: str = ""
    """Docker's word: running, paused, exited …"""
    running: bool
    paused: bool = False
    started_at: str = ""
    ports: tuple[PortBinding, ...] = ()
    mounts: tuple[MountRecord, ...] = ()
    network_mode: str = ""
    networks: tuple[str, ...] = ()
    restart_policy: str = "no"
    restarts: int = 0
    migration: str = ""
    """Name of the migration that made this container; empty for one that was not made by a migration."""
    warnings: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    """Why this container cannot be moved, in words; empty when nothing speaks against it."""
    truncated: bool = False


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One Docker host, as its agent registers it under a lease."""

    v: int = RECORD_VERSION
    host: str
    address: str
    """Where other hosts reach this one by SSH."""
    ssh_port: int = 22
    agent_version: str = ""
    boot_id: str = ""
    """Of the kernel: it changes with every reboot of the host."""
    boot: str = ""
    """Of the agent: it changes with every start of the process."""
    engine_version: str = ""
    api_version: str = ""
    storage_driver: str = ""
    kernel: str = ""
    architecture: str = ""
    capabilities: tuple[str, ...] = ()
    """Names of what this host can do, such as ``live-restore``."""
    free_bytes: int = 0
    """Where Docker keeps its volumes."""
    free_inodes: int = 0
    """0 also where the file system does not count them."""
    volumes: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    truncated: bool = False


class PlacementRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a container that a migration moved lives: the value of ``placements/<container>``."""

    v: int = RECORD_VERSION
    container: str
    container_id: str
    host: str
    address: str
    """Of the host: published ports answer there."""
    networks: dict[str, str] = {}
    """The container's own IPv4 addresses by network."""
    networks_ipv6: dict[str, str] = {}
    """The same for IPv6; a network without is not in it."""
    ports: tuple[PortBinding, ...] = ()
    migration: str
    """The migration that brought it there, or back."""


_encoder = msgspec.json.Encoder(order="deterministic")
_host_decoder = msgspec.json.Decoder(HostRecord)
_container_decoder = msgspec.json.Decoder(ContainerRecord)
_placement_decoder = msgspec.json.Decoder(PlacementRecord)

_HOST_LISTS = ("volumes", "networks", "capabilities")
_CONTAINER_LISTS = ("warnings", "refusals", "mounts", "ports", "networks")

_Record = TypeVar("_Record", HostRecord, ContainerRecord, PlacementRecord)


def encode_host(record: HostRecord) -> bytes:
    """``record`` as JSON, cut to MAX_RECORD_BYTES. Raises SchemaError when it cannot be made to fit."""
    return _bounded(record, _HOST_LISTS)


def encode_container(record: ContainerRecord) -> bytes:
    """``record`` as JSON, cut to MAX_RECORD_BYTES. Raises SchemaError when it cannot be made to fit."""
    return _bounded(record, _CONTAINER_LISTS)


def encode_placement(record: PlacementRecord) -> bytes:
    """``record`` as JSON. Raises SchemaError when it cannot be made to fit."""
    return _bounded(record, ())


def decode_placement(raw: bytes) -> PlacementRecord:
    """The record in a stored value. Raises SchemaError."""
    return _checked(_placement_decoder, raw, "a placement")


def decode_host(raw: bytes) -> HostRecord:
    """The record in a stored value. Raises SchemaError."""
    return _checked(_host_decoder, raw, "a host's record")


def decode_container(raw: bytes) -> ContainerRecord:
    """The record in a stored value. Raises SchemaError."""
    return _checked(_container_decoder, raw, "a container's record")


def _bounded(record: _Record, lists: tuple[str, ...]) -> bytes:
    """Halve the longest lists, one at a time, until the record fits."""
    raw = _encode(record)
    while len(raw) > MAX_RECORD_BYTES:
        if not lists:
            raise SchemaError(f"a record of {len(raw)} bytes is over the limit of {MAX_RECORD_BYTES}")
        longest = max(lists, key=lambda name: len(_encode(getattr(record, name))))
        items = getattr(record, longest)
        if not items:
            raise SchemaError(f"a record of {len(raw)} bytes cannot be cut to {MAX_RECORD_BYTES}")
        shorter: dict[str, Any] = {longest: items[: len(items) // 2], "truncated": True}
        record = msgspec.structs.replace(record, **shorter)
        raw = _encode(record)
    return raw


def _encode(value: Any) -> bytes:
    try:
        return _encoder.encode(value)
    except (UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise SchemaError(f"a record holds text that is not Unicode ({error})") from error


def _checked(decoder: msgspec.json.Decoder[_Record], raw: bytes, what: str) -> _Record:
    if len(raw) > MAX_RECORD_BYTES:
        raise SchemaError(f"{what} has {len(raw)} bytes, over the limit of {MAX_RECORD_BYTES}")
    try:
        record = decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise SchemaError(f"{what} cannot be read: {error}") from error
    if record.v != RECORD_VERSION:
        raise SchemaError(f"{what} has version {record.v}, which is not known here")
    return record
