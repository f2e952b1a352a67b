"""The agent's configuration file, as frozen data."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from events.keyspace import valid_host_name
from events.settings import ETCD_OPTIONS, LOG_OPTIONS, TRUST_OPTIONS, EtcdSettings, LogSettings, Reader, TrustSettings
from hostd.moves import Moves
from hostd.shared_storage import SHARED_FILE_SYSTEMS

PATIENCE_SECONDS = 600
DEFAULT_PORT = 20490
"""For NFS, beside the usual 2049, which the host's own exports may have."""

KNOWN = {
    "host": (
        "name",
        "address",
        "state_dir",
        "run_dir",
        "read_patience_seconds",
        "shared_file_systems",
        "remote",
        "nfs_port",
    ),
    "etcd": ETCD_OPTIONS,
    "docker": ("socket",),
    "moves": (
        "containers",
        "not_containers",
        "volumes",
        "not_volumes",
        "binds",
        "not_binds",
        "privileged",
    ),
    "ssh": ("user", "port", "identity", "known_hosts", "authorized_keys"),
    "trust": TRUST_OPTIONS,
    "log": LOG_OPTIONS,
}


@dataclass(frozen=True)
class HostSettings:
    """Everything that an agent is told."""

    name: str
    address: str
    """Where other hosts' data planes reach this one by SSH."""
    state_dir: Path
    run_dir: Path
    etcd: EtcdSettings
    docker_socket: Path
    ssh_user: str
    ssh_port: int
    ssh_identity: Path
    ssh_known_hosts: Path
    log: LogSettings
    read_patience_seconds: int = PATIENCE_SECONDS
    """How long the container's reads of what has not arrived wait for a source that does not answer."""
    shared_file_systems: frozenset[str] = SHARED_FILE_SYSTEMS
    """Kinds of file systems whose data is not copied but attached on the target."""
    remote: str = "sshfs"
    """How targets look at this host's data, where the request does not say."""
    nfs_port: int = DEFAULT_PORT
    """First of those on which data is served by NFS, one for each migration."""
    moves: Moves = field(default_factory=Moves)
    """What may be moved from here and to here at all."""
    ssh_authorized_keys: Path = Path("/etc/cargo/ssh/authorized_keys")
    """Kept by the agent in a secured fleet, as ssh_known_hosts is."""
    trust: TrustSettings = field(default_factory=TrustSettings)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_remote(text: str) -> bool:
    return text in ("sshfs", "nfs")


def _moves(reader: Reader) -> Moves:
    usual = Moves()
    lists = {
        name: reader.items("moves", name, " ".join(getattr(usual, name)))
        for name in KNOWN["moves"]
        if name != "privileged"
    }
    for name in ("binds", "not_binds"):
        for pattern in lists[name]:
            reader.valid("moves", name, pattern, lambda text: text.startswith("/"), "a list of absolute paths")
    said = reader.text("moves", "privileged", usual.privileged)
    reader.valid("moves", "privileged", said, lambda text: text in ("ask", "never"), "ask or never")
    return Moves(**lists, privileged="ask" if said == "ask" else "never")


def load(path: Path) -> HostSettings:
    """The settings in the file ``path``. Raises SettingsError with every mistake in it."""
    reader = Reader(path, KNOWN)
    name = reader.valid("host", "name", reader.text("host", "name"), valid_host_name, "a valid host name")
    address = reader.valid("host", "address", reader.text("host", "address"), _is_address, "an IP address")
    settings = HostSettings(
        name=name,
        address=address,
        state_dir=reader.path("host", "state_dir", "/var/lib/cargo") or Path("/var/lib/cargo"),
        run_dir=reader.path("host", "run_dir", "/run/cargo") or Path("/run/cargo"),
        etcd=reader.etcd(),
        docker_socket=reader.path("docker", "socket", "/run/docker.sock") or Path("/run/docker.sock"),
        ssh_user=reader.text("ssh", "user", "root"),
        ssh_port=reader.number("ssh", "port", 22, low=1, high=65535),
        ssh_identity=reader.path("ssh", "identity", "/etc/cargo/ssh/id_ed25519") or Path("/etc/cargo/ssh/id_ed25519"),
        ssh_known_hosts=reader.path("ssh", "known_hosts", "/etc/cargo/ssh/known_hosts")
        or Path("/etc/cargo/ssh/known_hosts"),
        ssh_authorized_keys=reader.path("ssh", "authorized_keys", "/etc/cargo/ssh/authorized_keys")
        or Path("/etc/cargo/ssh/authorized_keys"),
        log=reader.log(),
        trust=reader.trust(),
        read_patience_seconds=reader.number(
            "host", "read_patience_seconds", PATIENCE_SECONDS, low=1, high=7 * 24 * 3600
        ),
        remote=reader.valid("host", "remote", reader.text("host", "remote", "sshfs"), _is_remote, "sshfs or nfs"),
        nfs_port=reader.number("host", "nfs_port", DEFAULT_PORT, low=1, high=65535),
        moves=_moves(reader),
        shared_file_systems=frozenset(
            reader.text("host", "shared_file_systems", " ".join(SHARED_FILE_SYSTEMS)).replace(",", " ").split()
        ),
    )
    if not settings.etcd.endpoints:
        reader.problems.append("[etcd] endpoints is missing: the agent needs the bus, such as 10.0.0.1:2379")
    reader.finish()
    return settings
