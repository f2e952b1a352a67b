"""What is mounted where, and the few verbs that change it.

The adapter for the kernel's mount table: it reads ``/proc/self/mountinfo`` (never ``/etc/mtab``), mounts
through the ``mount`` tool, and unmounts with ``umount2``. It never unmounts lazily: a lazy unmount hides a
file system that somebody still uses, and whoever then changes its layers changes data under a running
container. Nor does it touch the inside of a mount point to learn whether it is mounted, because a dead FUSE
mount hangs whoever looks.

Stands below ``hostd/federation.py`` (the union) and ``hostd/transport.py`` (the remote view).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from events.errors import PermanentError, TransientError
from hostd.ending import is_of
from hostd.namespaces import in_own_thread, leave_shared_directory

MOUNT_TIMEOUT_SECONDS = 60
"""Long enough for a loaded machine; a local mount takes milliseconds."""
MAX_STACKED = 16
"""Nobody stacks more mounts than this on one point; more means that unmounting has no effect."""
MAX_HOLDERS_NAMED = 5

_SPECIAL = re.compile(rb"[ \t\n\\#]")
_OCTAL = re.compile(rb"\\([0-7]{3})")
_UMOUNT_NOFOLLOW = 8
_MS_BIND, _MS_REMOUNT = 4096, 32
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class MountRecord:
    """One line of mountinfo (proc_pid_mountinfo(5)), unescaped."""

    mount_id: int
    parent_id: int
    device: str
    """``major:minor`` of the file system, the same in every mount namespace."""
    root: bytes
    point: bytes
    kind: str
    source: bytes
    options: bytes
    """Options of the file system (super block), not of the mount."""


def resolved(path: Path | bytes) -> bytes:
    """The absolute path with symlinks resolved in all but the last component.

    The last component is the possible mount point, which may be dead and must not be touched.
    """
    raw = os.path.abspath(os.fsencode(path))
    parent, name = os.path.split(raw)
    return os.path.join(os.path.realpath(parent), name) if name else raw


def read_mountinfo(pid: int | str = "self", *, mentioning: bytes = b"") -> list[MountRecord]:
    """All mounts of a process's mount namespace, in the kernel's order (later covers earlier).

    ``mentioning``: those whose line may hold these words, and perhaps others. A host may have thousands of mounts, and
    the stop window is no time to take them all apart. Raises FileNotFoundError or ProcessLookupError when that
    process is gone.
    """
    # The kernel writes some characters as octal numbers, not the same ones everywhere.
    words = max(_SPECIAL.split(mentioning), key=len)
    file = Path(f"/proc/{pid}/mountinfo")
    data = file.read_bytes()
    for _ in range(5):
        # The kernel hands the table out page by page, so a change in between may show a mix: read until
        # it stands still.
        again = file.read_bytes()
        if again == data:
            break
        data = again
    if words not in data:
        return []
    lines = [line for line in data.split(b"\n") if words in line]
    return [record for line in lines if (record := parse_mountinfo_line(line)) is not None]


def parse_mountinfo_line(line: bytes) -> MountRecord | None:
    """One record; None for an empty line or one that does not have the documented shape."""
    fields = line.split(b" ")
    try:
        separator = fields.index(b"-", 6)
        kind, source = fields[separator + 1], fields[separator + 2]
        options = fields[separator + 3] if len(fields) > separator + 3 else b""
        return MountRecord(
            mount_id=int(fields[0]),
            parent_id=int(fields[1]),
            device=fields[2].decode("ascii"),
            root=_unescape(fields[3]),
            point=_unescape(fields[4]),
            kind=kind.decode("ascii", "replace"),
            source=_unescape(source),
            options=options,
        )
    except (ValueError, IndexError):
        return None


def _unescape(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes([int(match.group(1), 8) & 0xFF]), field)


def mount_at(path: Path | bytes) -> MountRecord | None:
    """The topmost mount whose mount point is exactly this path, or None."""
    wanted = resolved(path)
    found = None
    for record in read_mountinfo(mentioning=wanted):
        if record.point == wanted:
            found = record
    return found


def is_mounted(path: Path | bytes) -> bool:
    """Whether something is mounted exactly on this path."""
    return mount_at(path) is not None


def mounts_below(path: Path | bytes) -> list[MountRecord]:
    """Every mount on this path or anywhere below it."""
    wanted = resolved(path)
    prefix = wanted.rstrip(b"/") + b"/"
    return [r for r in read_mountinfo() if r.point == wanted or r.point.startswith(prefix)]


def mounted_elsewhere(source: bytes) -> list[tuple[int, MountRecord]]:
    """Mounts of a file system of this source name in other mount namespaces, with a process of each.

    A container keeps a file system alive in its own namespace after the host has unmounted it.
    """
    seen = {namespace("self")}
    found = []
    for pid in _process_ids():
        try:
            found_in = namespace(pid)
            if found_in in seen:
                continue
            seen.add(found_in)
            found += [(pid, record) for record in read_mountinfo(pid, mentioning=source) if record.source == source]
        except OSError:
            continue  # the process ended while we looked
    return found


def namespace(pid: int | str) -> str:
    """The mount namespace of a process, by a name of the kernel's. Raises OSError."""
    return os.readlink(f"/proc/{pid}/ns/mnt")


def process_of(pid: int, container_id: str) -> bool:
    """Whether a process is one of that container's, whatever namespaces it has made itself; one that has ended counts as such."""
    try:
        return is_of(container_id, pid)
    except OSError:
        return True


def processes_of(container_id: str) -> list[int]:
    """Every process of the container that lives."""
    found = []
    for pid in _process_ids():
        try:
            if is_of(container_id, pid) and _alive(pid):
                found.append(pid)
        except (OSError, UnicodeDecodeError):  # it has ended, or is in a group that no engine has named
            continue
    return found


def mount(kind: str, source: str, target: Path | str, options: str, *, working_directory: Path | None = None) -> None:
    """Mount a file system with the ``mount`` tool.

    ``working_directory`` lets options and target be short relative names, so that no character of a long
    path needs escaping in an option string (O10). Raises PermanentError with the kernel's words.
    """
    if working_directory is not None and _mounted_directly(kind, source, target, options, working_directory):
        return
    # Slower, and with words of its own where it fails.
    command = ["mount", "-t", kind, "-o", options, "--", source, str(target)]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=working_directory,
            env=environment,
            capture_output=True,
            timeout=MOUNT_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TransientError(f"mounting {kind} on {target} did not end within {MOUNT_TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip()
        raise PermanentError(f"{kind} could not be mounted on {target}: {words or f'exit code {done.returncode}'}")


def _mounted_directly(kind: str, source: str, target: Path | str, options: str, directory: Path) -> bool:
    """Whether mount(2) itself did it: a tool takes some milliseconds of the stop window to start."""
    done: list[int] = []

    def act() -> None:
        leave_shared_directory()
        os.chdir(directory)
        words = (os.fsencode(source), os.fsencode(target), kind.encode())
        done.append(_libc.mount(*words, ctypes.c_ulong(0), os.fsencode(options)))

    try:
        in_own_thread(act)
    except OSError:
        return False
    return done == [0]


def bind(source: Path, target: Path) -> None:
    """Bind-mount a directory or file onto another. Raises PermanentError with the kernel's reason."""
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None) != 0:
        code = ctypes.get_errno()
        raise PermanentError(f"{source} could not be bound to {target}: {os.strerror(code)}")


def remount(target: Path) -> None:
    """Mount what is mounted there once more, with nothing changed. Raises PermanentError."""
    if _libc.mount(None, os.fsencode(target), None, ctypes.c_ulong(_MS_REMOUNT), None) != 0:
        code = ctypes.get_errno()
        raise PermanentError(f"what is mounted on {target} could not be mounted once more: {os.strerror(code)}")


def unmount(path: Path | bytes) -> None:
    """Unmount everything that is mounted on exactly this path; does nothing when nothing is.

    Raises TransientError, naming who holds it, while it is in use; PermanentError for anything else.
    """
    point = resolved(path)
    for _ in range(MAX_STACKED):
        if not is_mounted(point):
            return
        if _libc.umount2(point, _UMOUNT_NOFOLLOW) == 0:
            continue
        code = ctypes.get_errno()
        shown = os.fsdecode(point)
        if code in {errno.EINVAL, errno.ENOENT} and not is_mounted(point):
            return
        if code == errno.EBUSY:
            held_by = ", ".join(holders(point)) or "a process or a mount that cannot be seen from here"
            raise TransientError(f"{shown} is still in use by {held_by}; nothing was unmounted, it can be tried again")
        raise PermanentError(f"{shown} could not be unmounted: {os.strerror(code)}")
    raise PermanentError(f"{os.fsdecode(point)} is still mounted after {MAX_STACKED} unmounts")


def holders(path: bytes) -> list[str]:
    """Processes with a working directory, root or open file on or below this path, as ``pid 12 (name)``."""
    found: list[str] = []
    below = path + b"/"
    for pid in _process_ids():
        links = [b"/proc/%d/cwd" % pid, b"/proc/%d/root" % pid]
        links += [b"/proc/%d/fd/%s" % (pid, name) for name in _names(b"/proc/%d/fd" % pid)]
        for link in links:
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target == path or target.startswith(below):
                found.append(f"pid {pid} ({process_name(pid)})")
                break
        if len(found) >= MAX_HOLDERS_NAMED:
            break
    return found


def open_below(pid: int, path: bytes) -> list[bytes]:
    """The files that a process has open below a path, relative to it, sorted."""
    below = path + b"/"
    found = set()
    for name in _names(b"/proc/%d/fd" % pid):
        try:
            target = os.readlink(b"/proc/%d/fd/%s" % (pid, name))
        except OSError:
            continue
        if target.startswith(below):
            found.add(target[len(below) :].removesuffix(b" (deleted)"))
    return sorted(found)


def processes_with_argument(argument: bytes, *, program: bytes) -> list[int]:
    """Living processes whose program's name is ``program`` and one of whose arguments contains ``argument``.

    A process that has ended and only waits to be collected does not count.
    """
    found = []
    for pid in _process_ids():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.path.basename(words[0]) == program and any(argument in word for word in words[1:]):
            found.append(pid)
    return found


def wait_until_gone(pids: list[int], *, timeout_seconds: float) -> list[int]:
    """Wait for processes to end (a collected or uncollected end alike); returns those that still live."""
    deadline = time.monotonic() + timeout_seconds
    alive = [pid for pid in pids if _alive(pid)]
    while alive and time.monotonic() < deadline:
        time.sleep(0.005)
        alive = [pid for pid in alive if _alive(pid)]
    return alive


def process_name(pid: int) -> str:
    """The process's short name, or ``?``."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    # The state follows the name in parentheses, and a name may itself hold parentheses.
    return status.rpartition(b")")[2].split()[:1] not in ([b"Z"], [b"X"])


def _process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _names(directory: bytes) -> list[bytes]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
