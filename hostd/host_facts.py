"""What ``cargo-hostd check`` looks at on this host, as plain data. Judged by ``hostd/checkup.py``.

What it must never do: change anything that stays, or fail: what cannot be found out is a fact, too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from events.errors import CargoError, RefusedError
from hostd import mounts
from hostd.engine import Engine
from hostd.engine_calls import EngineInfo
from hostd.federation import Union
from hostd.process import environment
from hostd.settings import HostSettings
from hostd.space import room_at
from hostd.visibility import engine_pid

TOOLS = ("rsync", "ssh", "sshfs", "fusermount3", "mount", "setpriv", "modprobe", "stat", "sync", "ip")
"""Commands that the agent runs."""
PROBES: dict[str, tuple[str, ...]] = {
    "rsync": ("rsync", "--secluded-args", "--files-from=/dev/null", "--from0", "-HAXS", "--version"),
    "sshfs": ("sshfs", "--version"),
    "ssh": ("ssh", "-V"),
}
"""Tools of which more than their presence matters: rsync built without what we call it with refuses these options."""
PROBE_SECONDS = 10.0
CONNECT_SECONDS = 5.0
NFS_SERVER = "ganesha.nfsd"


@dataclass(frozen=True)
class Tool:
    """One command. ``said`` is the first line of its version, or of its complaint."""

    path: str = ""
    works: bool = True
    said: str = ""


@dataclass(frozen=True)
class Place:
    """A directory whose file system will hold data."""

    path: str
    free_bytes: int
    free_share: float
    free_inodes: int
    inode_share: float


@dataclass(frozen=True)
class Neighbour:
    """Another host of the fleet, as it is registered."""

    name: str
    address: str
    port: int
    pinned: bool
    """Its key stands in our known_hosts, under its name."""
    trouble: str
    """Why its sshd is not reached; empty when it is."""


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """Everything that is looked at; the bus apart (``events/bus_check.py``)."""

    kernel: str = ""
    file_systems: frozenset[str] = frozenset()
    fuse_trouble: str = ""
    watches: int = 0
    tools: dict[str, Tool] = field(default_factory=dict)
    engine: EngineInfo | None = None
    engine_trouble: str = ""
    sees_same_mounts: bool | None = None
    """Whether dockerd and this process are in one mount namespace; None when that is not known."""
    union_trouble: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()
    sshd_trouble: str = ""
    identity_trouble: str = ""
    known_hosts_trouble: str = ""
    nfs_server: bool = False
    apparmor_parser: bool = True


def gather(settings: HostSettings) -> HostFacts:
    """Look at this host. Takes seconds at most for each thing that does not answer."""
    info, trouble = _engine(settings)
    data_root = Path(info.data_root) if info is not None and info.data_root else None
    places = [settings.state_dir, *([data_root] if data_root is not None else [])]
    return HostFacts(
        kernel=os.uname().release,
        file_systems=_file_systems(),
        fuse_trouble=_fuse_trouble(),
        watches=_number(Path("/proc/sys/fs/inotify/max_user_watches")),
        tools={name: _tool(name) for name in TOOLS},
        engine=info,
        engine_trouble=trouble,
        sees_same_mounts=_sees_same_mounts(settings.docker_socket) if info is not None else None,
        union_trouble=_union_trouble(data_root) if data_root is not None else (),
        places=tuple(_place(path) for path in places),
        sshd_trouble=ssh_trouble(settings.address, settings.ssh_port),
        identity_trouble=_identity_trouble(settings.ssh_identity),
        known_hosts_trouble="" if settings.ssh_known_hosts.is_file() else f"there is no {settings.ssh_known_hosts}",
        nfs_server=shutil.which(NFS_SERVER) is not None,
        apparmor_parser=shutil.which("apparmor_parser") is not None,
    )


def neighbours(settings: HostSettings, registered: Iterable[tuple[str, str, int]]) -> list[Neighbour]:
    """The other hosts of the fleet, each with what this host knows of it and how far it gets."""
    return [
        Neighbour(name, address, port, _is_pinned(name, settings.ssh_known_hosts), ssh_trouble(address, port))
        for name, address, port in registered
        if name != settings.name
    ]


def ssh_trouble(address: str, port: int) -> str:
    """Why no SSH server answers there; empty when one does."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
            greeting = connection.recv(64)
    except OSError as error:
        return error.strerror or str(error)
    return "" if greeting.startswith(b"SSH-2.0") else "what answers there is no SSH server"


def _is_pinned(name: str, known_hosts: Path) -> bool:
    done = _run(("ssh-keygen", "-F", name, "-f", str(known_hosts)))
    return done is not None and done.returncode == 0 and bool(done.stdout)


def _engine(settings: HostSettings) -> tuple[EngineInfo | None, str]:
    engine = Engine(str(settings.docker_socket), timeout_seconds=PROBE_SECONDS)
    try:
        return engine.info(), ""
    except CargoError as error:
        return None, str(error)
    finally:
        engine.close()


def _tool(name: str) -> Tool:
    path = shutil.which(name)
    if path is None:
        return Tool()
    if name not in PROBES:
        return Tool(path)
    done = _run(PROBES[name])
    if done is None:
        return Tool(path, works=False, said="it does not run")
    lines = (done.stdout + done.stderr).decode("utf-8", "replace").strip().splitlines()
    return Tool(path, works=done.returncode == 0, said=lines[0] if lines else "")


def _run(argv: tuple[str, ...]) -> subprocess.CompletedProcess[bytes] | None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=PROBE_SECONDS, check=False, env=environment()
        )
    return None


def _file_systems() -> frozenset[str]:
    """Those that the kernel knows; modules that are there are loaded, as the agent's own mounts would."""
    for name in ("overlay", "fuse", "nfsv4"):
        _run(("modprobe", "--quiet", name))
    lines = Path("/proc/filesystems").read_text(encoding="utf-8").splitlines()
    return frozenset(line.split()[-1] for line in lines if line.strip())


def _fuse_trouble() -> str:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _number(file: Path) -> int:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _sees_same_mounts(docker_socket: Path) -> bool | None:
    """O13: a mount that Docker cannot see gives the container an empty place."""
    try:
        return mounts.namespace(engine_pid(docker_socket)) == mounts.namespace("self")
    except (CargoError, OSError):
        return None


def _union_trouble(data_root: Path) -> tuple[str, ...]:
    """Try a tiny union where volumes lie. Leaves nothing."""
    try:
        with tempfile.TemporaryDirectory(prefix="cargo-check-", dir=data_root) as directory:
            union = Union(Path(directory) / "stage", Path(directory) / "place")
            try:
                union.create()
            finally:
                union.remove(abandon=True, place_too=True)
    except RefusedError as error:
        return tuple(error.reasons)
    except (CargoError, OSError) as error:
        return (str(error),)
    return ()


def _place(path: Path) -> Place:
    room = room_at(path)
    whole = os.statvfs(room.shown_as)
    return Place(
        str(path),
        room.free_bytes,
        whole.f_bavail / whole.f_blocks if whole.f_blocks else 1.0,
        room.free_inodes,
        whole.f_favail / whole.f_files if whole.f_files else 1.0,
    )


def _identity_trouble(identity: Path) -> str:
    try:
        found = identity.stat()
    except OSError:
        return f"there is no {identity}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"others than its owner may read {identity}, so ssh will not use it"
    return ""
