"""From settings to a store: the one place where a process decides how it reaches the bus."""

from __future__ import annotations

from events.etcd import EtcdAccess, EtcdStore
from events.keyspace import Keyspace
from events.settings import EtcdSettings, SettingsError


def connect(settings: EtcdSettings, endpoints: tuple[str, ...] | None = None) -> EtcdStore:
    """A store on ``endpoints`` (default: those of ``settings``). Connects with the first call.

    Raises SettingsError for endpoints, a prefix or TLS files that cannot be meant.
    """
    addresses = endpoints if endpoints is not None else settings.endpoints
    try:
        access = EtcdAccess(ca=settings.ca, cert=settings.cert, key=settings.key)
        return EtcdStore(addresses, Keyspace(settings.prefix), access=access)
    except ValueError as error:
        raise SettingsError(f"the [etcd] settings cannot be used: {error}") from error
