"""Put a finished tree into the mount namespace of a container that waits at its gate.

Docker bound the mount's place into the container when the start began; by now the union lies there, and the container
still holds what was beneath. So a clone of the union's mount is moved over it. A process whose working directory is in
there would keep the old one: it is asked to change into the same path again, which the kernel lets a tracer do.

Nothing is believed: at the end each destination, and the working directory, must *be* the tree, by device and inode.
It must never follow a symlink of the container's. Every failure is a GraftError, after which the gate is shut and the
container starts cold; nothing is lost by it but time.

x86-64 only as far as the working directory goes. Raw system calls, as no library in reach has them.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from events.errors import TransientError
from hostd.mounts import read_mountinfo
from hostd.namespaces import CLONE_NEWNS, enter, in_own_thread

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_OPENAT2, SYS_MOUNT_SETATTR = 428, 429, 437, 442
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
AT_EMPTY_PATH, AT_FDCWD = 0x1000, -100
MOUNT_ATTR_RDONLY = 0x1
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 0x02, 0x04, 0x10
WALL = 0x40000000
PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_SINGLESTEP, PTRACE_DETACH = 12, 13, 9, 17
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
REGISTERS = [
    "r15",
    "r14",
    "r13",
    "r12",
    "rbp",
    "rbx",
    "r11",
    "r10",
    "r9",
    "r8",
    "rax",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "orig_rax",
    "rip",
    "cs",
    "eflags",
    "rsp",
    "ss",
    "fs",
    "gs",
    "ds",
    "es",
    "f",
    "g",
]
X64_OPENAT, X64_MMAP, X64_MUNMAP, X64_CHDIR = 257, 9, 11, 80
SYSCALL_INSTRUCTION = b"\x0f\x05"
PAGE = 4096
SHARED_PROPAGATION = frozenset({"shared", "rshared", "slave", "rslave"})


class GraftError(TransientError):
    """The tree could not be put in; the container must not run with what it sees."""


class OciMount(msgspec.Struct, frozen=True):
    """One mount of an OCI bundle's config.json."""

    destination: str
    options: tuple[str, ...] = ()


class OciProcess(msgspec.Struct, frozen=True):
    """What the container will run."""

    cwd: str = "/"


class OciConfig(msgspec.Struct, frozen=True):
    """The parts of an OCI bundle's config.json that matter here."""

    process: OciProcess
    mounts: tuple[OciMount, ...] = ()


@dataclass(frozen=True)
class Graft:
    """A tree at ``place`` on this host, to be seen at ``destination`` in the container."""

    place: Path
    destination: str


def read_config(bundle: Path) -> OciConfig:
    """The configuration that the runtime was given. Raises GraftError."""
    try:
        return msgspec.json.decode((bundle / "config.json").read_bytes(), type=OciConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise GraftError(f"the container's OCI configuration cannot be read: {error}") from error


def why_not(config: OciConfig, destinations: Sequence[str], machine: str = "") -> str:
    """Why trees cannot be put in at ``destinations`` after the container was made; "" when they can."""
    by_destination = {mount.destination.rstrip("/"): mount for mount in config.mounts}
    for destination in (name.rstrip("/") for name in destinations):
        mount = by_destination.get(destination)
        if mount is None:
            return f"the container has no mount at {destination}"
        if SHARED_PROPAGATION & set(mount.options):
            return f"mounts propagate into {destination}"
        if inside := [other for other in by_destination if other.startswith(f"{destination}/")]:
            return f"{inside[0]} is mounted inside {destination}"
        if (machine or platform.machine()) != "x86_64" and _within(config.process.cwd, destination):
            return f"the working directory is in {destination}"
    return ""


def graft(pid: int, grafts: Sequence[Graft], config: OciConfig) -> None:
    """Put each tree in, and the process's working directory on it. Raises GraftError."""
    options = {mount.destination.rstrip("/"): mount.options for mount in config.mounts}
    root = _open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY)
    try:
        for one in grafts:
            read_only = "ro" in options.get(one.destination.rstrip("/"), ())
            # A named volume's mount is a slave of the host's, so the union has come there by itself; writable, though.
            if read_only or _identity_in(root, one.destination) != _identity(os.stat(one.place)):
                _put(pid, root, one, read_only=read_only)
        if any(_within(config.process.cwd, one.destination) for one in grafts):
            in_own_thread(lambda: _change_directory(pid, os.fsencode(config.process.cwd)))
            if _identity(os.stat(f"/proc/{pid}/cwd")) != _identity_in(root, config.process.cwd):
                raise GraftError("the process's working directory is not on the tree")
    except OSError as error:
        raise GraftError(f"the container's mounts could not be completed: {error}") from error
    finally:
        os.close(root)


def _within(path: str, directory: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{directory.rstrip('/')}/")


# --- mounts --------------------------------------------------------------------------------------


def _put(pid: int, root: int, one: Graft, *, read_only: bool) -> None:
    tree = _syscall(
        SYS_OPEN_TREE,
        AT_FDCWD,
        os.fsencode(one.place),
        OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC,
        what="cloning the union's mount",
    )
    try:
        attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY if read_only else 0, 0, MS_PRIVATE, 0)
        _syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, len(attributes), what="setting up the mount")
        namespace = _open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        covering = _mounts_at(pid, one.destination)
        try:
            in_own_thread(lambda: _replace(namespace, root, one.destination, covering, tree))
        finally:
            os.close(namespace)
        if _identity_in(root, one.destination) != _identity(os.stat(one.place)):
            raise GraftError(f"{one.destination} of the container is not the tree that belongs there")
    finally:
        os.close(tree)


def _mounts_at(pid: int, destination: str) -> int:
    """How many mounts lie upon each other there, as the process sees it."""
    wanted = os.fsencode(destination.rstrip("/"))
    return sum(record.point == wanted for record in read_mountinfo(pid))


def _replace(namespace: int, root: int, destination: str, covering: int, tree: int) -> None:
    """In a thread of its own, which never comes back from the container's mount namespace.

    What Docker mounted is taken away, not covered: it is the directory that was the mount's place before the tree took
    it, and when that is removed on the host, the kernel takes away whatever any namespace has mounted on it.
    """
    enter(namespace, CLONE_NEWNS)
    for _ in range(covering):
        where = _resolve(root, destination)
        try:
            os.fchdir(where)
        finally:
            os.close(where)
        _check(_libc.umount2(b".", MNT_DETACH), "taking away what Docker mounted")
    os.chdir("/")
    where = _resolve(root, destination)
    try:
        flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
        _syscall(SYS_MOVE_MOUNT, tree, b"", where, b"", flags, what="moving the mount into the container")
    finally:
        os.close(where)


def _resolve(root: int, path: str) -> int:
    how = struct.pack("QQQ", os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
    return _syscall(SYS_OPENAT2, root, os.fsencode(path), how, len(how), what=f"looking for {path} in the container")


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _identity_in(root: int, path: str) -> tuple[int, int]:
    fd = _resolve(root, path)
    try:
        return _identity(os.fstat(fd))
    finally:
        os.close(fd)


# --- the working directory -----------------------------------------------------------------------


def _change_directory(pid: int, path: bytes) -> None:
    """Have the waiting process call chdir(2), in the thread that sleeps in open(2) of the runtime's FIFO."""
    thread = _sleeping_thread(pid)
    _ptrace(PTRACE_SEIZE, thread, 0)
    try:
        _ptrace(PTRACE_INTERRUPT, thread, 0)
        os.waitpid(thread, WALL)
        before = _registers(thread)
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(before["rip"] - 2)
            if memory.read(2) != SYSCALL_INSTRUCTION:
                raise GraftError("the waiting process is not in a system call")
            try:
                page = _call(thread, before, X64_MMAP, 0, PAGE, 3, 0x22, 2**64 - 1, 0)
                if page > 2**63:
                    raise GraftError("the waiting process got no memory")
                memory.seek(page)
                memory.write(path + b"\0")
                result = _call(thread, before, X64_CHDIR, page)
                _call(thread, before, X64_MUNMAP, page, PAGE)
            finally:
                _set_registers(thread, before)
        if result != 0:
            raise GraftError("the waiting process cannot enter its working directory")
    finally:
        _libc.ptrace(PTRACE_DETACH, thread, None, None)


def _sleeping_thread(pid: int) -> int:
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "syscall").read_text().split()[0] == str(X64_OPENAT):
            return int(task.name)
    raise GraftError("the container's first process does not wait where it should")


def _call(thread: int, before: dict[str, int], number: int, *arguments: int) -> int:
    names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
    registers = {**before, **dict(zip(names, arguments, strict=False))}
    registers.update(rax=number, orig_rax=2**64 - 1, rip=before["rip"] - 2)
    _set_registers(thread, registers)
    _ptrace(PTRACE_SINGLESTEP, thread, 0)
    _, status = os.waitpid(thread, WALL)
    if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
        raise GraftError("the waiting process did not do as it was asked")
    return _registers(thread)["rax"]


def _registers(thread: int) -> dict[str, int]:
    space = (ctypes.c_uint64 * len(REGISTERS))()
    _ptrace(PTRACE_GETREGS, thread, ctypes.addressof(space))
    return dict(zip(REGISTERS, space, strict=True))


def _set_registers(thread: int, registers: dict[str, int]) -> None:
    space = (ctypes.c_uint64 * len(REGISTERS))(*(registers[name] for name in REGISTERS))
    _ptrace(PTRACE_SETREGS, thread, ctypes.addressof(space))


def _ptrace(request: int, thread: int, data: int) -> None:
    _check(_libc.ptrace(request, thread, None, data), "asking the waiting process")


# --- system calls --------------------------------------------------------------------------------


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def _syscall(number: int, *arguments: int | bytes, what: str) -> int:
    words = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    _check(result, what)
    return result


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise GraftError(f"{what}: {os.strerror(number)}")
