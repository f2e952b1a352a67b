"""``cargo-hostd check``: what this host lacks before containers can be moved from and to it, in words.

Looking is done by ``hostd/host_facts.py`` and ``events/bus_check.py``; here it is judged. Everything but ``check`` is
pure. Run it before the agent is started, after an upgrade, and when something is odd: it disturbs no migration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from events import bus_check, certificates
from events.checkup import Finding, advice, ok, problem, report
from events.connecting import connect
from events.errors import CargoError
from events.records import decode_host
from events.store import Store
from hostd import host_facts
from hostd.engine_calls import EngineInfo
from hostd.fidelity import apparmor_problem
from hostd.gate import RUNTIME
from hostd.host_facts import HostFacts, Neighbour, Place, Tool
from hostd.settings import HostSettings

OLDEST_KERNEL = (5, 6)
"""pidfd_getfd, by which the agent keeps a lower layer alive whose server dies; overlayfs with metacopy is older."""
OLDEST_ENGINE = (20, 10)
FEW_WATCHES = 65_536
"""One for each directory of the data; with fewer than needed, changes are found by comparing instead."""
TIGHT_BYTES, TIGHT_SHARE = 1 << 30, 0.10
FULL_BYTES = 64 << 20
"""Below this not even manifests and records of a migration have room."""

PACKAGES = {
    "rsync": "rsync",
    "ssh": "openssh-client",
    "sshfs": "sshfs",
    "fusermount3": "fuse3",
    "mount": "mount",
    "setpriv": "util-linux",
    "modprobe": "kmod",
    "stat": "coreutils",
    "sync": "coreutils",
    "ip": "iproute2",
}
"""Of Debian."""


def check(settings: HostSettings, *, as_json: bool) -> int:
    """Look, and say. Returns the exit code."""
    findings = host_findings(settings, host_facts.gather(settings))
    answers = bus_check.look(settings.etcd, settings.etcd.endpoints)
    findings += bus_check.judge(answers) + certificates.findings(settings.etcd)
    if not all(answer.trouble for answer in answers):
        findings += _bus(settings)
    return report(f"host {settings.name}", findings, as_json=as_json)


def _bus(settings: HostSettings) -> list[Finding]:
    try:
        store = connect(settings.etcd, trust=settings.trust)
    except CargoError as error:
        return [problem("etcd-access", str(error), "correct the [etcd] section")]
    try:
        keys = store.keys
        found = bus_check.permissions(store, reads=keys.inbox(settings.name), writes=keys.host(settings.name))
        return found + neighbour_findings(host_facts.neighbours(settings, _registered(store)), settings)
    finally:
        store.close()


def _registered(store: Store) -> list[tuple[str, str, int]]:
    try:
        records = [decode_host(item.value) for item in store.range(store.keys.hosts)]
    except CargoError:
        return []  # said already, by ``permissions``, or an agent's newer record, which is no fault of this host
    return [(record.host, record.address, record.ssh_port) for record in records]


def host_findings(settings: HostSettings, facts: HostFacts) -> list[Finding]:
    """Everything about the host itself."""
    return [
        *kernel_findings(facts),
        *tool_findings(facts.tools),
        *engine_findings(facts),
        *(place_finding(place) for place in facts.places),
        *ssh_findings(settings, facts),
        nfs_finding(settings, facts),
    ]


# --- kernel and tools ------------------------------------------------------------------------------


def kernel_findings(facts: HostFacts) -> list[Finding]:
    """Version, FUSE, overlayfs, inotify."""
    found = []
    if _numbers(facts.kernel) < OLDEST_KERNEL:
        found.append(
            problem("kernel", f"Linux {facts.kernel} is older than 5.6", "use the kernel of Debian 12 or newer")
        )
    else:
        found.append(ok("kernel", f"Linux {facts.kernel}"))
    for name, use in (("overlay", "Docker and the union"), ("fuse", "sshfs and the union")):
        if name not in facts.file_systems:
            remedy = f"use a kernel with the module {name}, such as Debian's; see `modprobe {name}`"
            found.append(problem(name, f"this kernel has no {name} file system, which {use} need", remedy))
    if facts.fuse_trouble:
        remedy = "modprobe fuse; in a container or virtual machine, pass the device in"
        found.append(problem("dev-fuse", f"/dev/fuse cannot be opened: {facts.fuse_trouble}", remedy))
    if 0 < facts.watches < FEW_WATCHES:
        found.append(
            advice(
                "inotify",
                f"only {facts.watches} directories can be watched: larger trees are compared as a whole at the stop, "
                "which takes longer",
                "sysctl -w fs.inotify.max_user_watches=1048576, and the same in /etc/sysctl.d/",
            )
        )
    return found


def tool_findings(tools: dict[str, Tool]) -> list[Finding]:
    """Each command: is it there, and can it do what it is called for?"""
    found = []
    for name, tool in tools.items():
        install = f"apt install {PACKAGES[name]}"
        if not tool.path:
            found.append(problem(name, f"the command {name} is missing", install))
        elif not tool.works:
            found.append(problem(name, f"{tool.path} cannot do what Cargo asks of it: {tool.said}", install))
        elif tool.said:
            found.append(ok(name, tool.said))
    return found


# --- Docker ----------------------------------------------------------------------------------------


def engine_findings(facts: HostFacts) -> list[Finding]:
    """Docker: reach, version, store, settings, and whether it sees our mounts."""
    if facts.engine is None:
        remedy = "apt install docker.io, see `systemctl status docker`, and that [docker] socket is right"
        return [problem("docker", facts.engine_trouble or "Docker does not answer", remedy)]
    engine = facts.engine
    found = [_engine_version(engine), _store(engine)]
    if "rootless" in engine.security:
        remedy = "use a Docker that runs as root; the data of a rootless one lies in namespaces of its user"
        found.append(problem("docker-rootless", "this Docker runs without root", remedy))
    if words := apparmor_problem(engine.security, has_parser=facts.apparmor_parser):
        found.append(problem("docker-apparmor", words, "apt install apparmor"))
    if not engine.live_restore:
        found.append(
            advice(
                "docker-live-restore",
                "without live-restore every restart of dockerd stops all containers, those on a union too",
                '"live-restore": true in /etc/docker/daemon.json, then systemctl reload docker',
            )
        )
    if RUNTIME not in engine.runtimes:
        found.append(
            advice(
                "docker-runtime",
                "containers start cold here: the runtime of warm starts is not installed",
                "cargo-hostd-runtime install; no container is restarted",
            )
        )
    if facts.sees_same_mounts is False:
        found.append(
            problem(
                "mount-namespace",
                "Docker and this process have different mount namespaces: containers would not see what is mounted "
                "for them",
                "run cargo-hostd as its unit does, without PrivateTmp=, ProtectSystem= and the like; no snap's Docker",
            )
        )
    elif facts.sees_same_mounts:
        found.append(ok("mount-namespace", "Docker sees what the agent mounts"))
    for reason in facts.union_trouble:
        remedy = "put Docker's data root on ext4, xfs with ftype=1, or btrfs"
        found.append(problem("union", f"below {engine.data_root}: {reason}", remedy))
    if not facts.union_trouble:
        found.append(ok("union", f"the file system of {engine.data_root} carries one"))
    return found


def _engine_version(engine: EngineInfo) -> Finding:
    words = f"Docker {engine.engine_version}, API {engine.api_version}"
    if _numbers(engine.engine_version) < OLDEST_ENGINE:
        return problem("docker", f"{words}, is older than 20.10", "upgrade it: apt install docker.io")
    return ok("docker", words)


def _store(engine: EngineInfo) -> Finding:
    if engine.storage_driver in ("overlay2", "overlayfs"):
        return ok("docker-storage", engine.storage_driver)
    return advice(
        "docker-storage",
        f"of the store {engine.storage_driver!r} no writable layer can be moved: such requests need rootfs: false",
        '"storage-driver": "overlay2" in /etc/docker/daemon.json; containers and images of the old store are not shown then',
    )


# --- space -----------------------------------------------------------------------------------------


def place_finding(place: Place) -> Finding:
    """Room for data and records."""
    free = f"{place.path} has {place.free_bytes / (1 << 30):.1f} GiB free ({place.free_share:.0%})"
    if place.free_bytes < FULL_BYTES:
        return problem("space", free, "make room; a full disk holds up every migration, and loses none")
    if place.free_inodes and place.inode_share < TIGHT_SHARE:
        return advice(
            "space",
            f"{place.path} has {place.free_inodes} inodes free ({place.inode_share:.0%})",
            "remove what is not needed: each file of a migration takes one",
        )
    if place.free_bytes < TIGHT_BYTES or place.free_share < TIGHT_SHARE:
        return advice("space", free, "make room: a container is only taken where its data fits, with a tenth more")
    return ok("space", free)


# --- reaching and being reached ----------------------------------------------------------------------


def ssh_findings(settings: HostSettings, facts: HostFacts) -> list[Finding]:
    """Our sshd, our key, and whom we know."""
    where = f"{settings.address} port {settings.ssh_port}"
    found = []
    if facts.sshd_trouble:
        found.append(
            problem(
                "sshd",
                f"no SSH server answers on {where}, where other hosts look for this one: {facts.sshd_trouble}",
                "apt install openssh-server, systemctl enable --now ssh; see [host] address and [ssh] port",
            )
        )
    else:
        found.append(ok("sshd", f"answers on {where}"))
    secured = settings.trust.ca is not None
    key = f"make this host's key: ssh-keygen -t ed25519 -N '' -f {settings.ssh_identity}"
    if secured:
        key = "bring this host's key back, or remove the host from the fleet and join again (`cargo-hostd join`)"
    if facts.identity_trouble.startswith("there is no"):
        found.append(problem("ssh-key", facts.identity_trouble, key))
    elif facts.identity_trouble:
        found.append(problem("ssh-key", facts.identity_trouble, f"chmod 600 {settings.ssh_identity}"))
    else:
        found.append(ok("ssh-key", str(settings.ssh_identity)))
    if facts.known_hosts_trouble and not secured:  # there the agent writes it, from the members' records
        remedy = f"put the other hosts' keys there, each under its name in Cargo: name ssh-ed25519 AAAA… (file {settings.ssh_known_hosts})"
        found.append(problem("known-hosts", facts.known_hosts_trouble, remedy))
    return found


def neighbour_findings(neighbours: Iterable[Neighbour], settings: HostSettings) -> list[Finding]:
    """The other hosts of the fleet. What lacks there does not make this host unfit: it may move from and to the rest."""
    found = []
    for other in neighbours:
        where = f"{other.name} ({other.address} port {other.port})"
        if other.trouble:
            remedy = "see that its sshd runs, and that no firewall is in between"
            found.append(advice("peer", f"{where} is not reached by SSH: {other.trouble}", remedy))
        if not other.pinned:
            remedy = f"add the line `{other.name} <its ssh_host_ed25519_key.pub>` to {settings.ssh_known_hosts}"
            if settings.trust.ca is not None:
                remedy = "this host's agent writes it within seconds, if it runs and the other one is a member"
            found.append(advice("peer", f"the host key of {other.name} is not known here", remedy))
        if other.pinned and not other.trouble:
            found.append(ok("peer", f"{where} is reached, and its key is known"))
    return found


def nfs_finding(settings: HostSettings, facts: HostFacts) -> Finding:
    """Only those who ask for NFS need it."""
    lacking = []
    if not facts.nfs_server:
        lacking.append("cannot serve (no ganesha.nfsd)")
    if "nfs4" not in facts.file_systems:
        lacking.append("cannot mount (this kernel has no NFS client)")
    if not lacking:
        return ok("nfs", "can be served and mounted")
    words = f"requests with remote: nfs: this host {' and '.join(lacking)}"
    remedy = "apt install nfs-ganesha nfs-ganesha-vfs, and a kernel with the module nfsv4; or leave it at sshfs"
    if settings.remote == "nfs" and not facts.nfs_server:
        return problem("nfs", f"{words}, and its configuration says remote = nfs", remedy)
    return advice("nfs", words, remedy)


def _numbers(version: str) -> tuple[int, ...]:
    """``(6, 1)`` of ``6.1.0-13-amd64``; ``(0,)`` of what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else (0,)
