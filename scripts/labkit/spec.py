"""What a lab is, as data: its name, subnet, hosts and every path and name derived from them.

Nothing here acts. A spec is written to ``<root>/lab.json`` when a lab is made, so that a later process
finds the same lab; losing that file loses no clean-up (see leftovers), because all names follow from the
lab's name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from labkit.errors import LabError

DEFAULT_BASE = Path("/var/lib/cargo-lab")
DEFAULT_NAME = "demo"
DEFAULT_SUBNET = "10.77.0"
CACHE = Path("/var/cache/cargo-lab")
"""Images survive ``down``: they are expensive and say nothing about any lab."""

REPOSITORY = Path(__file__).resolve().parents[2]

HOST_NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")

MAX_NAME = 9
"""``cargo-`` + name must fit an interface name of 15 characters."""
MAX_SOCKET_PATH = 100
"""A unix socket's path must stay under 108 bytes; docker needs a few of them."""

_NAME = re.compile(rf"[a-z][a-z0-9]{{0,{MAX_NAME - 1}}}")
_HOST = re.compile(r"[a-z][a-z0-9]{0,12}")
_SUBNET = re.compile(r"(\d{1,3})\.(\d{1,3})\.(\d{1,3})")
_ROOT = re.compile(r"/[A-Za-z0-9_./-]+")

OWN_ROOT = "/"
ROOT_TREES = ("debian13",)
"""Root trees that a host can have instead of the machine's own (labkit.roots makes them)."""
DOCKER_OPTIONS = ("containerd", "liverestore")

PRIVATE_DIRECTORIES = ("var", "run", "tmp", "srv", "mnt", "root", "etc/cargo", "etc/docker")
"""What each host has for itself, as plain directories under ``<root>/hosts/<host>/``.

``/etc`` as a whole is an overlay over the machine's, so that the other files there are private too.
"""


@dataclass(frozen=True)
class HostSpec:
    """One Docker host, described by data."""

    name: str
    address: str
    root: str = OWN_ROOT
    """The tree that the host boots from, one of ROOT_TREES; ``/`` is the machine's own. Private directories are on top."""
    containerd: bool = False
    """Whether its dockerd keeps images and layers in containerd's store; Docker's own (overlay2) otherwise."""
    liverestore: bool = False
    """Whether its containers outlive its dockerd."""

    def __post_init__(self) -> None:
        if self.root not in {OWN_ROOT, *ROOT_TREES}:
            raise LabError(f"there is no root tree {self.root!r}: choose from {', '.join(ROOT_TREES)}")
        if not _HOST.fullmatch(self.name) or self.name in {"etcd", "outside", "root", "br0", "lo"}:
            raise LabError(f"{self.name!r} is no name for a lab host: use up to 13 of a-z and 0-9")


def base_directory() -> Path:
    """Where all labs live: ``CARGO_LAB_ROOT``, or /var/lib/cargo-lab."""
    return Path(os.environ.get("CARGO_LAB_ROOT") or DEFAULT_BASE)


@dataclass(frozen=True)
class LabSpec:
    """One lab. Raises LabError for names and addresses that could not work."""

    name: str
    subnet: str
    """The first three numbers of a /24."""
    root: Path
    hosts: tuple[HostSpec, ...]
    agents: bool = True
    """Whether coordinator and hostd belong to it."""
    etcd_members: int = 1
    etcd_loopback: bool = False
    """Whether etcd also listens on 127.0.0.1, if that port is free, for etcdctl without options."""
    secure: bool = False
    """Whether etcd asks for certificates and roles, events are signed, and hosts join by tokens."""
    visible: tuple[str, ...] = field(default=())
    """More directories that hosts must see although they lie under a private one."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LabError(f"{self.name!r} is no name for a lab: use up to {MAX_NAME} of a-z and 0-9")
        match = _SUBNET.fullmatch(self.subnet)
        if match is None or any(int(part) > 255 for part in match.groups()):
            raise LabError(f"{self.subnet!r} is no subnet: give three numbers, such as {DEFAULT_SUBNET}")
        if not self.hosts or len({host.name for host in self.hosts}) != len(self.hosts):
            raise LabError("a lab needs at least one host, and each name once")
        if not _ROOT.fullmatch(str(self.root)) or ".." in self.root.parts:
            raise LabError(f"the lab's directory {str(self.root)!r} must be absolute and of plain characters")
        if len(str(self.root)) + len("/hosts/") + 13 + len("/run/docker.sock") > MAX_SOCKET_PATH:
            raise LabError(f"the lab's directory {str(self.root)!r} is too long for unix sockets below it")
        if self.etcd_members not in {1, 3, 5}:
            raise LabError("etcd has 1, 3 or 5 members")

    @property
    def prefix(self) -> str:
        """Name of the interface, the cgroup and whatever else the lab makes outside of its directory."""
        return f"cargo-{self.name}"

    @property
    def gateway(self) -> str:
        """The lab's address in the machine's own network namespace; etcd listens there."""
        return f"{self.subnet}.1"

    @property
    def state_file(self) -> Path:
        return self.root / "lab.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def records(self) -> Path:
        """One small file per started process: its pid and start time."""
        return self.root / "processes"

    def host_directory(self, host: str) -> Path:
        return self.root / "hosts" / host

    def cgroup(self, host: str) -> str:
        """The parent of all cgroups of the host's containers, below the mount point of a hierarchy."""
        return f"/{self.prefix}/{host}"

    def client_ports(self) -> tuple[int, ...]:
        """Of the members of etcd, each on the gateway address; the peer port is the next number."""
        return tuple(2379 + 10 * number for number in range(self.etcd_members))

    @property
    def endpoints(self) -> str:
        return ",".join(f"{self.gateway}:{port}" for port in self.client_ports())

    @property
    def fleet_directory(self) -> Path:
        """The operator's: the authority and certificates, if it is secure."""
        return self.root / "fleet"

    @property
    def operator_config(self) -> Path:
        """For ``cargoctl -c``, in a secure lab."""
        return self.root / "operator.cfg"

    def health_ports(self) -> tuple[int, ...]:
        """Where each member of etcd says over plain HTTP whether it is well."""
        return tuple(port + 2 if self.secure else port for port in self.client_ports())

    def save(self) -> None:
        """Write the state file, atomically."""
        record = asdict(self) | {"root": str(self.root)}
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(self.state_file)


def make_hosts(words: Sequence[str], subnet: str) -> tuple[HostSpec, ...]:
    """Hosts with addresses counted from ``<subnet>.2``. Each is a name, or ``gamma=debian13,containerd``."""
    return tuple(_host(word, f"{subnet}.{number}") for number, word in enumerate(words, start=2))


def _host(words: str, address: str) -> HostSpec:
    name, _, rest = words.partition("=")
    options = [option for option in rest.split(",") if option]
    for option in options:
        if option not in {*ROOT_TREES, *DOCKER_OPTIONS}:
            known = ", ".join((*ROOT_TREES, *DOCKER_OPTIONS))
            raise LabError(f"{option!r} is no option of a lab host: choose from {known}")
    roots = [option for option in options if option in ROOT_TREES] or [OWN_ROOT]
    return HostSpec(name, address, roots[-1], **{option: option in options for option in DOCKER_OPTIONS})


def with_described(names: Sequence[str], described: Sequence[str]) -> list[str]:
    """``names``, those of them in ``described`` (``gamma=debian13``) with what is said there, the others appended."""
    said = {word.partition("=")[0]: word for word in described}
    return [said.pop(name, name) for name in names] + list(said.values())


def load_spec(root: Path) -> LabSpec | None:
    """The spec of the lab at ``root``; None when there is none, or none that can be read."""
    try:
        record: dict[str, Any] = json.loads((root / "lab.json").read_text())
        record["root"] = Path(record["root"])
        record["hosts"] = tuple(HostSpec(**host) for host in record["hosts"])
        record["visible"] = tuple(record["visible"])
        return LabSpec(**record)
    except (OSError, ValueError, KeyError, TypeError, LabError):
        return None
