"""What runs on this host: builds the values of ``hosts/<host>`` and ``inventory/<host>/<container>``.

It only looks, through the engine and at the file system, and never changes anything. Measuring a tree means
visiting every file in it, so sizes come from a Sizer: a thread of low priority that measures rarely and
remembers; until it has measured, a size is None, which means unknown and never "nothing".
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from events.errors import PermanentError
from events.records import ContainerRecord, HostRecord, MountRecord
from events.schema import Mount, PortBinding
from hostd import mounts
from hostd.docker_json import ContainerView, VolumeView, view
from hostd.engine import ContainerSummary, Engine, EngineInfo
from hostd.entry import BLOCK_BYTES
from hostd.shared_storage import SHARED_FILE_SYSTEMS, find_shared
from hostd.spec import MIGRATION_LABEL, data_mounts, port_bindings
from hostd.spec_rules import source_findings

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
FILE_SYSTEMS = Path("/proc/filesystems")
REMEASURE_SECONDS = 600.0
"""At least so long between two measurements of one tree."""
REMEASURE_FACTOR = 2000.0
"""And at least so many times the last one's duration: 0.05 % of a core, of the 0.2 % that an idle agent may use."""
FORGET_SECONDS = 3600.0
"""A tree that nobody asked about for so long is not measured any more."""
LOWEST_PRIORITY = 19
BY_CONTAINER = "is taken by the container"
"""How ``port_problems`` says that a port will be free once that container stops."""


class TreeSize(NamedTuple):
    """What a tree takes where it is copied to."""

    size_bytes: int
    """Allocated space: sparse files count what they hold, hard links count once."""
    files: int
    """Entries of every kind, the root included."""


def measure_tree(tree: str, cancelled: Callable[[], bool] = lambda: False) -> TreeSize | None:
    """The size of ``tree``, without crossing into other file systems; None when it cannot be known.

    Entries that vanish meanwhile are left out. Symbolic links are counted, never followed: the walk holds
    descriptors of the directories, so a link that takes a directory's place leads nowhere.
    """
    root = os.path.realpath(os.fsencode(tree))
    try:
        top = os.lstat(root)
        if not stat.S_ISDIR(top.st_mode):
            return TreeSize(top.st_blocks * BLOCK_BYTES, 1)
        linked: set[int] = set()
        size_bytes, files = top.st_blocks * BLOCK_BYTES, 1
        for _path, folders, names, descriptor in os.fwalk(root, follow_symlinks=False):
            if cancelled():
                return None
            for name in (*folders, *names):
                with contextlib.suppress(FileNotFoundError):
                    found = os.lstat(name, dir_fd=descriptor)
                    folder = stat.S_ISDIR(found.st_mode)
                    if found.st_dev != top.st_dev:
                        if folder:
                            folders.remove(name)
                        continue
                    files += 1
                    if found.st_nlink > 1 and not folder:
                        if found.st_ino in linked:
                            continue
                        linked.add(found.st_ino)
                    size_bytes += found.st_blocks * BLOCK_BYTES
    except (OSError, RecursionError):
        return None
    return TreeSize(size_bytes, files)


class _Known(NamedTuple):
    size: TreeSize | None
    asked_at: float
    due_at: float


class Sizer:
    """Remembers how large trees are, and measures them in the background, one at a time.

    ``measure`` takes the tree and a function that says whether to give up; ``clock`` counts seconds; ``measured`` is told
    when a size has become another.
    """

    def __init__(
        self,
        measure: Callable[[str, Callable[[], bool]], TreeSize | None] = measure_tree,
        clock: Callable[[], float] = time.monotonic,
        measured: Callable[[], None] = lambda: None,
    ) -> None:
        self._measure = measure
        self._clock = clock
        self._measured = measured
        self._known: dict[str, _Known] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def size(self, tree: str) -> TreeSize | None:
        """What is known of ``tree``; asking has it measured, soon the first time and rarely afterwards."""
        now = self._clock()
        with self._changed:
            known = self._known.get(tree, _Known(None, now, now))
            self._known[tree] = known._replace(asked_at=now)
            self._changed.notify_all()
        return known.size

    def start(self) -> None:
        """Begin to measure in a thread of the lowest priority."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="sizer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, also in the middle of a measurement. Safe when it never ran."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def measure_due(self) -> str | None:
        """Measure the tree that has been due for longest; its name, or None when none is due."""
        tree = self._next_due()
        if tree is None:
            return None
        began = self._clock()
        size = self._measure(tree, self._stopping.is_set)
        ended = self._clock()
        pause = max(REMEASURE_SECONDS, REMEASURE_FACTOR * (ended - began))
        with self._changed:
            known = self._known.get(tree)
            if known is not None and not self._stopping.is_set():
                self._known[tree] = _Known(size, known.asked_at, ended + pause)
        if known is not None and known.size != size:
            self._measured()
        return tree

    def _next_due(self) -> str | None:
        now = self._clock()
        with self._changed:
            for tree, known in list(self._known.items()):
                if now - known.asked_at > FORGET_SECONDS:
                    del self._known[tree]
            due = [(known.due_at, tree) for tree, known in self._known.items() if known.due_at <= now]
        return min(due)[1] if due else None

    def _run(self) -> None:
        # Linux gives each thread a priority of its own, by its thread id.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        while not self._stopping.is_set():
            if self.measure_due() is None:
                self._wait()

    def _wait(self) -> None:
        with self._changed:
            if self._stopping.is_set():
                return
            now = self._clock()
            soonest = min((known.due_at for known in self._known.values()), default=None)
            if soonest is None or soonest > now:
                self._changed.wait(None if soonest is None else soonest - now)


# --- records -------------------------------------------------------------------------------------


def container_records(
    engine: Engine,
    sizer: Sizer,
    shared_kinds: frozenset[str] = SHARED_FILE_SYSTEMS,
    rows: Sequence[ContainerSummary] | None = None,
) -> list[ContainerRecord]:
    """One record for each container of this host. Raises TransientError.

    A container that Docker describes in a way unknown here gets a record that refuses to be moved. ``shared_kinds``:
    file systems whose data is attached on the target, not copied. ``rows``: the engine's list of them, if it was asked.
    """
    raws = engine.inspect_all(rows)
    volumes = {str(raw.get("Name")): raw for raw in engine.volumes()}
    used = _used_places(raws)
    shared = SharedKinds(shared_kinds, tuple(mounts.read_mountinfo()))
    others = _views(raws)
    return [
        container_record(raw, volumes=volumes, used=used, sizer=sizer, shared=shared, others=others) for raw in raws
    ]


class SharedKinds(NamedTuple):
    """What it takes to tell shared storage from data that moves."""

    kinds: frozenset[str] = SHARED_FILE_SYSTEMS
    table: tuple[mounts.MountRecord, ...] = ()
    """The host's mounts."""


class Place(NamedTuple):
    """Where a running container keeps data."""

    container: str
    name: str
    tree: str


def _views(raws: Iterable[Mapping[str, Any]]) -> list[ContainerView]:
    found = []
    for raw in raws:
        with contextlib.suppress(PermanentError):  # its own record says so
            found.append(view(ContainerView, raw, "a container"))
    return found


def _used_places(raws: Iterable[Mapping[str, Any]]) -> list[Place]:
    used: list[Place] = []
    for raw in raws:
        with contextlib.suppress(PermanentError):  # its own record says so
            container = view(ContainerView, raw, "a container")
            if container.state.running:
                name = container.name.removeprefix("/")
                used.extend(Place(name, mount.name, mount.tree) for mount in data_mounts(raw))
    return used


def container_record(
    raw: Mapping[str, Any],
    *,
    volumes: Mapping[str, Mapping[str, Any]],
    used: Iterable[Place],
    sizer: Sizer,
    shared: SharedKinds = SharedKinds(),  # noqa: B008 - immutable
    others: Sequence[ContainerView] = (),
) -> ContainerRecord:
    """The record of one inspected container; ``volumes`` of the host by name, ``used`` by whom, ``others`` there."""
    try:
        return _record(raw, volumes, list(used), sizer, shared, others)
    except PermanentError as error:
        return ContainerRecord(
            id=str(raw.get("Id", "")),
            name=str(raw.get("Name", "")).removeprefix("/"),
            image="",
            image_id="",
            running=False,
            refusals=(str(error),),
        )


def _record(
    raw: Mapping[str, Any],
    volumes: Mapping[str, Mapping[str, Any]],
    used: list[Place],
    sizer: Sizer,
    shared: SharedKinds,
    others: Sequence[ContainerView],
) -> ContainerRecord:
    container = view(ContainerView, raw, "the container")
    name = container.name.removeprefix("/")
    found_mounts = data_mounts(raw)
    mine = {
        mount.name: view(VolumeView, volumes[mount.name], f"the volume {mount.name!r}")
        for mount in found_mounts
        if mount.name in volumes
    }
    attached = find_shared(found_mounts, mine, shared.table, shared.kinds)
    found = source_findings(container, mine, attached, others)
    records = tuple(
        # A share is never measured: walking it takes its server's time, and may hang.
        _mount_record(mount, file_system=attached[mount.destination].file_system)
        if mount.destination in attached
        else _mount_record(mount, **_measured(mount, name, used, sizer))
        for mount in found_mounts
    )
    policy = container.host_config.restart_policy
    return ContainerRecord(
        id=container.id,
        name=name,
        image=container.config.image or "",
        image_id=container.image,
        status=container.state.status,
        running=container.state.running and not container.state.restarting,
        paused=container.state.paused,
        started_at=container.state.started_at,
        ports=port_bindings(raw),
        mounts=records,
        network_mode=container.host_config.network_mode or "default",
        networks=tuple(sorted(container.network_settings.networks or {})),
        restart_policy=(policy.name if policy else None) or "no",
        restarts=container.restart_count,
        migration=(container.config.labels or {}).get(MIGRATION_LABEL, ""),
        warnings=tuple(found.warnings),
        refusals=tuple(found.refusals),
    )


def _mount_record(mount: Mount, **known: Any) -> MountRecord:
    return MountRecord(
        kind="bind" if mount.kind == "bind" else "volume",
        name=mount.name,
        destination=mount.destination,
        tree=mount.tree,
        read_only=mount.read_only,
        **known,
    )


def _measured(mount: Mount, container: str, used: list[Place], sizer: Sizer) -> dict[str, Any]:
    size = sizer.size(mount.tree)
    return {
        "size_bytes": size.size_bytes if size is not None else None,
        "files": size.files if size is not None else None,
        "shared_with": sharers(mount, container, used),
    }


def sharers(mount: Mount, container: str, used: Iterable[Place]) -> tuple[str, ...]:
    """Names of other running containers whose data lies in, around or at ``mount``'s."""
    return tuple(
        sorted(
            {
                place.container
                for place in used
                if place.container != container and _one_within_other(mount.tree, place.tree)
            }
        )
    )


def sharers_on(engine: Engine, data: Iterable[Mount], container: str) -> dict[str, tuple[str, ...]]:
    """By destination, the other running containers that use a mount's data now. Raises TransientError."""
    used = _used_places(engine.inspect_all())
    found = {mount.destination: sharers(mount, container, used) for mount in data}
    return {destination: names for destination, names in found.items() if names}


def _one_within_other(one: str, other: str) -> bool:
    first, second = one.rstrip("/") + "/", other.rstrip("/") + "/"
    return first.startswith(second) or second.startswith(first)


def host_record(
    engine: Engine, info: EngineInfo, *, host: str, address: str, ssh_port: int, agent_version: str, boot: str
) -> HostRecord:
    """The record of this host, whose engine said ``info``. Raises TransientError."""
    free = engine.disk_free(info.data_root)
    capabilities = {
        "live-restore": info.live_restore,
        "containerd-snapshotter": info.containerd_snapshotter,
        "userns-remap": info.userns_remap,
        f"cgroup-v{info.cgroup_version}": True,
        **dict.fromkeys(_file_systems() & {"overlay", "fuse", "nfs4"}, True),
    }
    return HostRecord(
        host=host,
        address=address,
        ssh_port=ssh_port,
        agent_version=agent_version,
        boot_id=kernel_boot_id(),
        boot=boot,
        engine_version=info.engine_version,
        api_version=info.api_version,
        storage_driver=info.storage_driver,
        kernel=info.kernel,
        architecture=info.architecture,
        capabilities=tuple(sorted(name for name, there in capabilities.items() if there)),
        free_bytes=free.free_bytes,
        free_inodes=free.free_inodes,
        volumes=tuple(sorted(str(raw.get("Name")) for raw in engine.volumes())),
        networks=tuple(sorted(engine.networks())),
    )


def kernel_boot_id() -> str:
    """Changes with every reboot of this host."""
    return BOOT_ID.read_text().strip()


def _file_systems() -> set[str]:
    return {line.split()[-1] for line in FILE_SYSTEMS.read_text().splitlines() if line.strip()}


# --- ports ---------------------------------------------------------------------------------------

_SOCKET_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def port_problems(engine: Engine, wanted: Iterable[PortBinding]) -> list[str]:
    """F7: why the ports could not be published here now, in words; empty when they can.

    Docker knows ports that nothing listens on (without its userland proxy), and a trial bind finds what
    Docker does not know, so both are asked. The trial holds a port for an instant only.
    Raises TransientError.
    """
    published = engine.published_ports()
    problems: list[str] = []
    for port in wanted:
        protocol = port.container_port.rpartition("/")[2]
        label = f"{port.host_port}/{protocol}"
        owners = sorted(
            name
            for name, ports in published.items()
            for other in ports
            if other.host_port == port.host_port
            and other.container_port.rpartition("/")[2] == protocol
            and _addresses_meet(other.host_ip, port.host_ip)
        )
        if owners:
            problems.append(f"port {label} {BY_CONTAINER} {owners[0]!r}")
            continue
        trouble = _trial_bind(port, protocol)
        if trouble == errno.EADDRINUSE:
            problems.append(f"port {label} is taken by a program on this host")
        elif trouble == errno.EADDRNOTAVAIL:
            problems.append(f"port {label} is wanted on the address {port.host_ip}, which this host lacks")
        elif trouble not in (0, errno.EAFNOSUPPORT):
            problems.append(f"port {label} cannot be had: {os.strerror(trouble)}")
    return list(dict.fromkeys(problems))


def _addresses_meet(one: str, other: str) -> bool:
    def is_any(address: str) -> bool:
        return address in ("", "0.0.0.0", "::")  # noqa: S104 - compared, never bound

    if ":" in one and ":" not in other and other:
        return False
    if ":" in other and ":" not in one and one:
        return False
    return one == other or is_any(one) or is_any(other)


def _trial_bind(port: PortBinding, protocol: str) -> int:
    """0, or the number of the error that binding the port gives."""
    kind = _SOCKET_KINDS.get(protocol)
    if kind is None:
        return 0  # SCTP: the kernel may lack it, Docker will tell
    family = socket.AF_INET6 if ":" in port.host_ip else socket.AF_INET
    try:
        with socket.socket(family, kind) as trial:
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if kind == socket.SOCK_STREAM:
                # Connections that linger from an earlier owner are no obstacle to Docker either.
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((port.host_ip, port.host_port))
    except OSError as error:
        return error.errno or errno.EIO
    return 0
