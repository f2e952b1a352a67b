"""Confine one program to a few trees, read-only, and become it. The last thing that ``hostd/ssh_gate.py`` does.

What the program sees is a root of its own: an empty read-only tmpfs, the admitted trees at their own paths (each a
clone of exactly that tree, MS_RDONLY, NOSUID, NODEV, NOEXEC), and the few files that the program itself needs to
start. Symlinks cannot lead out of what is not there. It has no network, keeps the one or two capabilities that reading
other users' files needs, and its system calls that make mounts, open files by handle, start processes or speak to the
kernel's other doors are refused: rsync has had errors that a peer could use to run code of its own in the sender.

What it must never do: start the program when any of that could not be had. Standard library only: it is started
anew for each channel of an SSH connection, and a part of an outage may wait for it.

Needs Linux 5.12 (``mount_setattr``), and root.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

TREE, FILE, TOOL = "tree", "file", "tool"
NULL_DEVICE = b"/dev/null"
PASSWORD_FILE = b"root:x:0:0:root:/:/usr/sbin/nologin\n"
"""sftp-server gives up when its user has no name."""

CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN = 2, 21
"""To read every file whoever owns it; to see attributes in ``trusted.*``, which rsync carries."""

_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_CLONE_NEWNS, _CLONE_NEWNET, _CLONE_NEWIPC = 0x00020000, 0x40000000, 0x08000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_REC, _MS_SLAVE = 0x20, 0x4000, 0x80000
_MNT_DETACH = 2
_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS = 0x02, 0x04
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 24, 38, 22
_LAST_CAPABILITY = 63
_EINVAL = 22

_libc = ctypes.CDLL(None, use_errno=True)


class JailError(Exception):
    """The confinement could not be had; nothing was started."""


def become(
    root: bytes, holdings: list[tuple[bytes, bytes, str]], program: list[bytes], *, capabilities: tuple[int, ...]
) -> None:
    """Confine this process to ``holdings`` and exec ``program``. Does not return.

    ``root`` is an empty directory to mount on. A holding is (where it lies, where the program sees it, TREE, FILE or
    TOOL); of a TREE or FILE no part of the first may be a symlink. A TREE or FILE that is not there is left out, so
    that the program says so in its own words.

    Raises JailError.
    """
    try:
        _enter(root, holdings)
        _give_up(capabilities)
        libraries = {os.path.dirname(place) for _, place, kind in holdings if kind == TOOL}
        environment = {b"PATH": b"/usr/bin", b"LC_ALL": b"C", b"LD_LIBRARY_PATH": b":".join(sorted(libraries))}
        os.execve(program[0], program, environment)  # noqa: S606 - a shell is what there must never be
    except OSError as error:
        raise JailError(f"{error.strerror or error} ({os.fsdecode(error.filename or b'')})") from error


# --- its root ----------------------------------------------------------------------------------------


def _enter(root: bytes, holdings: list[tuple[bytes, bytes, str]]) -> None:
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC), b"namespaces")
    # As a slave: what the host unmounts goes here too, and is not kept alive by us.
    _mount(None, b"/", None, _MS_REC | _MS_SLAVE)
    clones: list[tuple[bytes, int, bool]] = []
    for origin, place, kind in sorted([*holdings, (NULL_DEVICE, NULL_DEVICE, TOOL)], key=lambda holding: holding[1]):
        if any(_lies_in(place, other) for other, _, of_tree in clones if of_tree):
            continue  # the tree above shows it already
        clone = _clone(origin, kind)
        if clone is not None:
            clones.append((place, *clone))
    _mount(b"cargo-gate", root, b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=755,size=256k")
    os.chdir(root)
    os.mkdir(b"etc", 0o755)
    _write(b"etc/passwd", PASSWORD_FILE)
    for place, clone_fd, is_directory in clones:
        relative = place.lstrip(b"/")
        os.makedirs(relative if is_directory else os.path.dirname(relative) or b".", 0o755, exist_ok=True)
        if not is_directory and not os.path.lexists(relative):
            _write(relative, b"")
        moved = _libc.syscall(_MOVE_MOUNT, clone_fd, b"", _AT_FDCWD, relative, _MOVE_MOUNT_F_EMPTY_PATH)
        _check(moved, place)
        os.close(clone_fd)
    _mount(None, root, None, _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    _check(_libc.syscall(_numbers()["pivot_root"], b".", b"."), b"pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), b"umount")
    os.chdir(b"/")


def _lies_in(place: bytes, tree: bytes) -> bool:
    return place == tree or place.startswith(tree.rstrip(b"/") + b"/")


def _clone(origin: bytes, kind: str) -> tuple[int, bool] | None:
    """A mount of its own of ``origin``, attached nowhere yet, and whether that is a directory; None if there is none."""
    try:
        place = os.open(origin, os.O_PATH | os.O_CLOEXEC) if kind == TOOL else _open_without_symlinks(origin)
    except FileNotFoundError:
        if kind == TOOL:
            raise
        return None
    try:
        mode = os.fstat(place).st_mode
        if kind != TOOL and not (stat.S_ISDIR(mode) if kind == TREE else stat.S_ISREG(mode)):
            raise OSError(0, "it is not what was admitted", origin)
        flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE
        clone = _libc.syscall(_OPEN_TREE, place, b"", flags)
        _check(min(clone, 0), origin)
    finally:
        os.close(place)
    attributes = _MS_RDONLY | _MS_NOSUID | (0 if origin == NULL_DEVICE else _MS_NODEV)
    attributes |= 0 if kind == TOOL else _MS_NOEXEC
    asked = struct.pack("=QQQQ", attributes, 0, 0, 0)
    _check(_libc.syscall(_MOUNT_SETATTR, clone, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, asked, len(asked)), origin)
    return int(clone), stat.S_ISDIR(mode)


def _open_without_symlinks(path: bytes) -> int:
    how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
    descriptor = _libc.syscall(_OPENAT2, _AT_FDCWD, path, how, len(how))
    _check(min(descriptor, 0), path)
    return int(descriptor)


def _mount(source: bytes | None, place: bytes, kind: bytes | None, flags: int, options: bytes | None = None) -> None:
    _check(_libc.mount(source, place, kind, ctypes.c_ulong(flags), options), place)


def _write(path: bytes, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    os.write(descriptor, content)
    os.close(descriptor)


def _check(result: int, what: bytes) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


# --- what it may do there ----------------------------------------------------------------------------


def _give_up(capabilities: tuple[int, ...]) -> None:
    for number in range(_LAST_CAPABILITY + 1):
        if number in capabilities:
            continue
        if _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            if ctypes.get_errno() == _EINVAL:
                break  # the kernel knows no more
            _check(-1, b"capabilities")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), b"no_new_privs")
    program = _filter()
    instructions = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, fprog, 0, 0), b"seccomp")


_SAME_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 435, 438, 442, 443)
"""io_uring_*, open_tree, move_mount, fs*, clone3, pidfd_getfd, mount_setattr, quotactl_fd."""
_X86_64 = {
    "socket": 41, "clone": 56, "fork": 57, "vfork": 58, "ptrace": 101, "mknod": 133, "pivot_root": 155, "chroot": 161,
    "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
    "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
    "quotactl": 179, "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
    "mknodat": 259, "unshare": 272, "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313,
    "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323,
}  # fmt: skip
_ARM64 = {
    "mknodat": 33, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60, "acct": 89,
    "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112, "ptrace": 117, "reboot": 142,
    "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "socket": 198, "add_key": 217, "request_key": 218,
    "keyctl": 219, "clone": 220, "swapon": 224, "swapoff": 225, "unshare": 97, "perf_event_open": 241,
    "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270,
    "process_vm_writev": 271, "finit_module": 273, "bpf": 280, "execveat": 281, "userfaultfd": 282,
    "kexec_file_load": 294,
}  # fmt: skip
_ARCHITECTURES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _ARM64)}
"""AUDIT_ARCH_* of linux/audit.h, and the numbers of asm/unistd.h, of those calls that are refused with EPERM."""
_X32_BIT = 0x40000000


def _numbers() -> dict[str, int]:
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(0, f"the system calls of {machine!r} are not known here", b"")
    return _ARCHITECTURES[machine][1]


def _filter() -> bytes:
    """The seccomp program: another architecture ends the process, a refused call gets EPERM, everything else passes."""
    audit, numbers = _ARCHITECTURES[os.uname().machine]
    refused = sorted({*numbers.values(), *_SAME_EVERYWHERE})
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    checks = [(at_least, _X32_BIT), *((equal, number) for number in refused)]
    code += [(kind, len(checks) - index, 0, value) for index, (kind, value) in enumerate(checks)]
    code += [(answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050000 | 1)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
