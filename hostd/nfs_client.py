"""Looking at the source's trees by NFS: the kernel's client, mounted read-only, as an alternative to sshfs.

What waits for a source that does not answer is the lower layer (``hostd/lower_contents.py``), for as long as the
configured patience, whichever transport is below it; so the mount itself is ``soft``: a call that the server leaves
unanswered ends in an error after some seconds, the lower layer asks again, and no task hangs that cannot be ended. With
``hard`` its threads would. On a read-only view that costs no data: an error is never taken for contents.

Nothing is remembered (``actimeo=0``, ``lookupcache=none``), because the view is opened before the source stops and read
after it. Stands below ``hostd/transport.py``; the other side is ``hostd/nfs_server.py``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from events.errors import PermanentError, RefusedError, TransientError
from hostd import mounts
from hostd.process import run

KINDS = ("nfs4", "nfs")
FILE_SYSTEMS = Path("/proc/filesystems")
ANSWER_DECISECONDS = 50
"""``timeo``: how long a call waits before it is sent again."""
RESENDS = 2
"""``retrans``: after so many a call has failed."""
MOUNT_TIMEOUT_SECONDS = 60
FORCE_PAUSE_SECONDS = 0.05
_MNT_FORCE = 1
_FSOPEN, _FSOPEN_CLOEXEC = 430, 1
"""fsopen(2): the same number on every architecture."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Export:
    """A tree that the source serves to this host."""

    address: str
    port: int
    share: str
    """Its name at the server."""

    @property
    def source(self) -> str:
        """As the mount table shows it."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.share}"


def client_problem(file_systems: Path = FILE_SYSTEMS) -> str:
    """Why this host cannot mount by NFS, in words; empty when it can."""
    if _known(file_systems):
        return ""
    _ask_for_it()
    if _known(file_systems):
        return ""
    return "this host's kernel has no NFS client (module nfsv4); install a kernel that has one, or ask for remote sshfs"


def _ask_for_it() -> None:
    """Have the kernel load its client, as a mount would: the agent's own confinement lets it load no module itself."""
    descriptor = _libc.syscall(_FSOPEN, KINDS[0].encode(), _FSOPEN_CLOEXEC)
    if descriptor >= 0:
        os.close(descriptor)


def _known(file_systems: Path) -> bool:
    return any(line.split()[-1:] == ["nfs4"] for line in file_systems.read_text().splitlines())


def mount_export(export: Export, mountpoint: Path) -> None:
    """Mount it read-only. Raises TransientError when the server does not answer, PermanentError when it refuses."""
    if problem := client_problem():
        raise RefusedError([problem])
    address = ip_address(export.address)
    options = (
        f"ro,nodev,nosuid,noexec,vers=4.2,proto=tcp{'6' if address.version == 6 else ''},addr={address},port={export.port},"
        f"soft,timeo={ANSWER_DECISECONDS},retrans={RESENDS},actimeo=0,lookupcache=none,nosharecache"
    )
    # -i: the kernel itself understands this; no helper of the nfs-common package is needed.
    command = ["mount", "-i", "-t", "nfs4", "-o", options, "--", export.source, str(mountpoint)]
    done = run(command, timeout_seconds=MOUNT_TIMEOUT_SECONDS)
    where = f"the source's tree {export.share} at {export.address} port {export.port}"
    if done is None:
        raise TransientError(f"{where} could not be mounted by NFS within {MOUNT_TIMEOUT_SECONDS} s")
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip() or f"exit code {done.returncode}"
        if any(mark in words.lower() for mark in ("permission denied", "access denied", "no such file", "not exist")):
            raise PermanentError(f"{where} is not exported to this host: {words}")
        raise TransientError(f"{where} could not be mounted by NFS: {words}")


def try_export(export: Export, mountpoint: Path) -> str:
    """Mount it once and let go of it: why that does not work, in words, or nothing."""
    mountpoint.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        mount_export(export, mountpoint)
    except (PermanentError, TransientError) as error:
        return f"{error}. See that no firewall is in between, or ask for remote sshfs"
    finally:
        force_unmount(mountpoint, timeout_seconds=MOUNT_TIMEOUT_SECONDS)
        mountpoint.rmdir()
    return ""


def force_unmount(mountpoint: Path, *, timeout_seconds: float) -> None:
    """Unmount it although its server may be away: calls under way end in errors, so that whoever waits lets go.

    Harmless when nothing is mounted. Raises TransientError, naming who holds it, while it is in use.
    """
    deadline = time.monotonic() + timeout_seconds
    point = mounts.resolved(mountpoint)
    while (record := mounts.mount_at(point)) is not None and record.kind in KINDS:
        if _libc.umount2(point, _MNT_FORCE) == 0:
            continue
        code = ctypes.get_errno()
        if code != errno.EBUSY:
            raise PermanentError(f"{os.fsdecode(point)} could not be unmounted: {os.strerror(code)}")
        if time.monotonic() >= deadline:
            mounts.unmount(point)  # says who holds it
        time.sleep(FORCE_PAUSE_SECONDS)
