"""The coordinator's configuration file, as frozen data."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.embedded import CLIENT_PORT, PEER_PORT
from events.keyspace import valid_host_name
from events.settings import ETCD_OPTIONS, LOG_OPTIONS, TRUST_OPTIONS, EtcdSettings, LogSettings, Reader, TrustSettings

KNOWN = {
    "coordinator": ("name", "data_dir", "client_port", "peer_port"),
    "etcd": ETCD_OPTIONS,
    "trust": TRUST_OPTIONS,
    "log": LOG_OPTIONS,
}


@dataclass(frozen=True)
class CoordinatorSettings:
    """Everything that a coordinator is told."""

    name: str
    data_dir: Path
    """Where the embedded etcd keeps its data, when no endpoint is configured."""
    client_port: int
    """On loopback, where the embedded etcd serves its clients."""
    peer_port: int
    """On loopback; the embedded etcd needs one, though it has no peers."""
    etcd: EtcdSettings
    log: LogSettings
    trust: TrustSettings = field(default_factory=TrustSettings)


def load(path: Path) -> CoordinatorSettings:
    """The settings in the file ``path``. Raises SettingsError with every mistake in it."""
    reader = Reader(path, KNOWN)
    name = reader.text("coordinator", "name", socket.gethostname().split(".")[0])
    settings = CoordinatorSettings(
        name=reader.valid("coordinator", "name", name, valid_host_name, "a valid name"),
        data_dir=reader.path("coordinator", "data_dir", "/var/lib/cargo/etcd") or Path("/var/lib/cargo/etcd"),
        client_port=reader.number("coordinator", "client_port", CLIENT_PORT, low=1, high=65535),
        peer_port=reader.number("coordinator", "peer_port", PEER_PORT, low=1, high=65535),
        etcd=reader.etcd(),
        log=reader.log(),
        trust=reader.trust(),
    )
    if settings.client_port == settings.peer_port:
        reader.problems.append("[coordinator] client_port and peer_port must differ")
    reader.finish()
    return settings
