"""The coordinator's configuration file, as frozen data."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from events.keyspace import valid_host_name
from events.settings import ETCD_OPTIONS, LOG_OPTIONS, EtcdSettings, LogSettings, Reader

KNOWN = {
    "coordinator": ("name", "data_dir"),
    "etcd": ETCD_OPTIONS,
    "log": LOG_OPTIONS,
}


@dataclass(frozen=True)
class CoordinatorSettings:
    """Everything that a coordinator is told."""

    name: str
    data_dir: Path
    """Where the embedded etcd keeps its data, when no endpoint is configured."""
    etcd: EtcdSettings
    log: LogSettings


def load(path: Path) -> CoordinatorSettings:
    """The settings in the file ``path``. Raises SettingsError with every mistake in it."""
    reader = Reader(path, KNOWN)
    name = reader.text("coordinator", "name", socket.gethostname().split(".")[0])
    settings = CoordinatorSettings(
        name=reader.valid("coordinator", "name", name, valid_host_name, "a valid name"),
        data_dir=reader.path("coordinator", "data_dir", "/var/lib/cargo/etcd") or Path("/var/lib/cargo/etcd"),
        etcd=reader.etcd(),
        log=reader.log(),
    )
    reader.finish()
    return settings
