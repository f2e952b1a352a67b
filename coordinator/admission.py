"""From a request key to ``requested`` or ``rejected``: everything that can be known to be impossible is
said at once, in words, before anything is changed.

Pure: what the world looks like comes in as a ``World``. The agents check again when they prepare; what
only they can know (or what changed since) ends in an abort, with the container untouched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

from events.keyspace import valid_container_name, valid_host_name, valid_migration_id
from events.records import ContainerRecord, HostRecord
from events.schema import Data, Rejected, Request, Requested, Strategy

MAX_REQUEST_BYTES = 16 * 1024
"""A request is a handful of fields; more is a mistake or an attack on the parser."""
MAX_SHOWN_CHARACTERS = 1000
MAX_REASONS = 100
MAX_REASONS_CHARACTERS = 8000
"""Of all reasons together: a character may take six bytes in an event, which may have 64 KiB."""
SPACE_PERCENT = 110
"""Free space that the target must have, in parts of the data: blocks, directories, rounding."""
STRATEGIES = get_args(Strategy)
MAX_DOWNTIME_BUDGET_SECONDS = 3600
MAX_WITHOUT = 50
MAX_NAME_CHARACTERS = 300


@dataclass(frozen=True)
class World:
    """What the coordinator knows of the fleet at the moment of a request."""

    hosts: Mapping[str, HostRecord] = field(default_factory=dict)
    """Hosts whose agents are registered now."""
    containers: Mapping[str, Mapping[str, ContainerRecord]] = field(default_factory=dict)
    """By host, then by container name. Only the hosts of the request need be there."""
    active: Mapping[str, str] = field(default_factory=dict)
    """Container id → id of the migration that is moving it."""
    federated_by: str = ""
    """The migration that brought the container to the source of the request, and that still keeps it on a union."""
    unreadable: tuple[str, ...] = ()
    """Records of the hosts concerned that could not be understood, in words."""


class _Field(NamedTuple):
    check: Callable[[Any], bool]
    words: str
    required: bool = False


def _is_int(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARACTERS and value.isprintable()


_FIELDS: dict[str, _Field] = {
    "container": _Field(
        lambda v: isinstance(v, str) and valid_container_name(v), "the name of a container", required=True
    ),
    "source": _Field(lambda v: isinstance(v, str) and valid_host_name(v), "the name of a host", required=True),
    "target": _Field(lambda v: isinstance(v, str) and valid_host_name(v), "the name of a host", required=True),
    "strategy": _Field(lambda v: v in STRATEGIES, "one of: " + ", ".join(STRATEGIES)),
    "max_rounds": _Field(_is_int(1, 50), "a number from 1 to 50"),
    "bwlimit_kib": _Field(_is_int(0, 2**31 - 1), "a number of KiB per second, 0 for no limit"),
    "downtime_budget_seconds": _Field(
        lambda v: type(v) in (int, float) and 0 <= v <= MAX_DOWNTIME_BUDGET_SECONDS,
        f"a number of seconds from 0 to {MAX_DOWNTIME_BUDGET_SECONDS}",
    ),
    "stop_timeout_seconds": _Field(lambda v: v is None or _is_int(0, 86400)(v), "a number of seconds from 0 to 86400"),
    "on_release": _Field(lambda v: v in ("keep", "remove"), "keep or remove"),
    "remote": _Field(lambda v: v in ("", "sshfs", "nfs"), "sshfs or nfs"),
    "without": _Field(
        lambda v: isinstance(v, list) and len(v) <= MAX_WITHOUT and all(map(_is_name, v)),
        f'a list of at most {MAX_WITHOUT} names such as "device:/dev/kvm"',
    ),
    "privileged": _Field(lambda v: type(v) is bool, "true or false"),
    "image": _Field(lambda v: v in ("transfer", "pull", "refuse"), "transfer, pull or refuse"),
    "start": _Field(lambda v: v in ("warm", "cold"), "warm or cold"),
    "rootfs": _Field(lambda v: type(v) is bool, "true or false"),
}


def examine(migration: str, raw: bytes, world: World) -> Data:
    """The event that answers the request ``raw`` put under the key ``migration``."""
    request, reasons = understand(migration, raw)
    container_id = ""
    if request is not None:
        container_id = _possible(request, world, reasons)
    if reasons or request is None:
        return Rejected(
            reasons=_within_an_event(reasons),
            request_key=_shown(migration, 200),
            request_text=_shown(raw[:4000].decode("utf-8", "backslashreplace"), MAX_SHOWN_CHARACTERS),
        )
    return Requested(
        request=request,
        container_id=container_id,
        target_address=world.hosts[request.target].address,
        source_address=world.hosts[request.source].address,
    )


def _within_an_event(reasons: list[str]) -> tuple[str, ...]:
    """``reasons``, as many as an event can hold: some come from agents, and may be of any number and length."""
    kept: list[str] = []
    left = MAX_REASONS_CHARACTERS
    for reason in reasons:
        if len(kept) == MAX_REASONS or left <= 0:
            return (*kept, f"and {len(reasons) - len(kept)} more reasons")
        kept.append(reason if len(reason) <= left else reason[:left] + "…")
        left -= len(reason)
    return tuple(kept)


def understand(migration: str, raw: bytes) -> tuple[Request | None, list[str]]:
    """The request in ``raw`` and what is wrong with it in itself; None when anything is."""
    reasons: list[str] = []
    if not valid_migration_id(migration):
        reasons.append(
            f"the id {_shown(migration, 100)} is not usable: "
            "take letters, digits, '.', '_' and '-', at most 64, beginning with a letter or digit"
        )
    fields = _parse(raw, reasons)
    request = None if fields is None else _build(fields, reasons)
    return (None if reasons else request), reasons


def _shown(text: str, limit: int) -> str:
    escaped = text.encode("unicode_escape", "surrogatepass").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[:limit] + "…"


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _DuplicateKeyError("a field is given twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse(raw: bytes, reasons: list[str]) -> dict[str, Any] | None:
    if len(raw) > MAX_REQUEST_BYTES:
        reasons.append(f"the request is {len(raw)} bytes long, the limit is {MAX_REQUEST_BYTES}")
        return None
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reasons.append(f"the request is not valid JSON: {str(error)[:200]}")
        return None
    if not isinstance(value, dict):
        reasons.append('the request is not a JSON object like {"container": …, "source": …, "target": …}')
        return None
    return value


def _build(fields: dict[str, Any], reasons: list[str]) -> Request | None:
    before = len(reasons)
    for name in fields:
        if name not in _FIELDS:
            reasons.append(f"{_shown(name, 60)!r} is not a known field (known: {', '.join(_FIELDS)})")
    for name, rule in _FIELDS.items():
        if name not in fields:
            if rule.required:
                reasons.append(f"{name!r} is missing: it must be {rule.words}")
            continue
        try:
            good = rule.check(fields[name])
        except TypeError:  # an unhashable or incomparable value
            good = False
        if not good:
            reasons.append(f"{name!r} is {_shown(repr(fields[name]), 80)}, it must be {rule.words}")
    if fields.get("source") == fields.get("target") and isinstance(fields.get("source"), str):
        reasons.append(f"source and target are both {_shown(fields['source'], 80)!r}; they must differ")
    if len(reasons) != before:
        return None
    if "without" in fields:
        fields = {**fields, "without": tuple(fields["without"])}
    return Request(**fields)


def _possible(request: Request, world: World, reasons: list[str]) -> str:
    """Add every reason why ``request`` cannot work; returns the container's id, if it is known."""
    reasons.extend(world.unreadable)
    known = ", ".join(sorted(world.hosts)) or "none"
    for role, host in (("source", request.source), ("target", request.target)):
        if host not in world.hosts:
            reasons.append(f"no agent is registered for the {role} {host!r} now (registered: {known})")
    container = world.containers.get(request.source, {}).get(request.container)
    if container is None:
        if request.source in world.hosts:
            reasons.append(f"there is no container {request.container!r} on {request.source}")
        return ""
    _check_source(request, container, world, reasons)
    if request.target in world.hosts:
        _check_target(request, container, world, reasons)
    return container.id


def _check_source(request: Request, container: ContainerRecord, world: World, reasons: list[str]) -> None:
    if not container.running:
        reasons.append(f"the container {request.container!r} is not running on {request.source}")
    if container.paused:
        reasons.append(f"the container {request.container!r} is paused; unpause it first")
    if container.id in world.active:
        reasons.append(
            f"the container {request.container!r} is being moved already, by migration {world.active[container.id]}"
        )
    if world.federated_by:
        # At the container's next stop that migration folds its union, which would be this one's stop: the frozen source
        # would be changed while it is read.
        reasons.append(
            f"the container {request.container!r} still belongs to the migration {world.federated_by}, which brought it "
            f"to {request.source} and has not been finalised: put the control `finalise` for {world.federated_by} "
            "first, which restarts the container once, and then ask again under another name"
        )
    reasons.extend(container.refusals)
    reasons.extend(
        f"{mount.name} is also used by the running container {other!r}; "
        "its writes would be lost, so stop that one first"
        for mount in container.mounts
        for other in mount.shared_with[:MAX_REASONS]
        if not mount.file_system
    )


def _check_target(request: Request, container: ContainerRecord, world: World, reasons: list[str]) -> None:
    there = world.containers.get(request.target, {})
    host = world.hosts[request.target]
    if request.container in there:
        reasons.append(f"there is a container {request.container!r} on {request.target} already")
    for other in there.values():
        if not other.running:
            continue
        taken = {(port.host_ip, port.host_port, port.container_port.split("/")[-1]) for port in other.ports}
        for port in container.ports:
            protocol = port.container_port.split("/")[-1]
            if any(
                number == port.host_port and proto == protocol and _overlap(address, port.host_ip)
                for address, number, proto in taken
            ):
                said = f"port {port.host_port}/{protocol} on {request.target} is taken by the container {other.name!r}"
                reasons += [said] * (said not in reasons)  # once for IPv4 and IPv6
    volumes = set(host.volumes)
    for mount in container.mounts:
        # A share that the target has already is just what it needs; it looks whether it is the same.
        if mount.kind == "volume" and mount.name in volumes and not mount.file_system:
            reasons.append(
                f"there is a volume {mount.name!r} on {request.target} already; "
                "it may hold somebody's data, so remove or rename it first"
            )
    # Whole numbers: what an agent writes may be larger than any fraction.
    needed = sum(mount.size_bytes or 0 for mount in container.mounts) * SPACE_PERCENT // 100
    if needed > host.free_bytes:
        reasons.append(f"{request.target} has {host.free_bytes} bytes free, the data needs {needed}")


_ANY_ADDRESS = {"", "0.0.0.0", "::"}  # noqa: S104 - compared, never bound


def _overlap(one: str, other: str) -> bool:
    return one == other or one in _ANY_ADDRESS or other in _ANY_ADDRESS
