"""From settings to a store: the one place where a process decides how it reaches the bus, and whom it believes there."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from events.errors import CargoError
from events.etcd import EtcdAccess, EtcdStore
from events.keyspace import Keyspace
from events.settings import EtcdSettings, SettingsError, TrustSettings


def connect(
    settings: EtcdSettings, endpoints: tuple[str, ...] | None = None, trust: TrustSettings | None = None
) -> EtcdStore:
    """A store on ``endpoints`` (default: those of ``settings``). Connects with the first call.

    With ``trust`` it signs what it appends, and proves what it reads. Raises SettingsError for endpoints, a prefix, TLS
    files or keys that cannot be meant.
    """
    addresses = endpoints if endpoints is not None else settings.endpoints
    try:
        access = EtcdAccess(ca=settings.ca, cert=settings.cert, key=settings.key)
        store = EtcdStore(addresses, Keyspace(settings.prefix), access=access)
    except ValueError as error:
        raise SettingsError(f"the [etcd] settings cannot be used: {error}") from error
    if trust is not None and trust.ca is not None:
        _secure(store, trust)
    return store


def _secure(store: EtcdStore, trust: TrustSettings) -> None:
    # Loaded only here: it is half of what an idle agent of a fleet that is not secured would take.
    from events.crypto import Authority, SigningKey  # noqa: PLC0415
    from events.trust import Trust  # noqa: PLC0415

    assert trust.ca is not None
    try:
        authority = Authority.load(trust.ca)
        own = SigningKey.load(trust.signing_key) if trust.signing_key is not None else None
    except CargoError as error:
        raise SettingsError(f"the [trust] settings cannot be used: {error}") from error
    store.trust = Trust(store.keys, store.range, authority, own)


def exposure(endpoints: Sequence[str], settings: EtcdSettings, trust: TrustSettings) -> str:
    """What is wrong with reaching the bus like that, in words for a log; empty when nothing is.

    Without TLS, and without signatures, anybody who reaches etcd can start, stop and move every container. That is
    for a bus on this machine's loopback, as the demo has it.
    """
    if all(_is_loopback(endpoint) for endpoint in endpoints):
        return ""
    missing = []
    if settings.cert is None:
        missing.append("without TLS and client certificates")
    if trust.ca is None:
        missing.append("without signed events ([trust] ca)")
    if not missing:
        return ""
    return (
        f"NOT SECURED: etcd at {', '.join(endpoints)} is used {' and '.join(missing)}. Whoever can reach it can start, "
        "stop and move every container of this fleet. docs/operators-guide.md says how to secure it"
    )


def _is_loopback(endpoint: str) -> bool:
    name = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
