"""Start a process in new or existing namespaces, detached, and say its pid as the machine sees it.

A script of its own (``python -I -S launch.py '<order as JSON>'``), because entering a PID or mount namespace
needs a process with one thread, which a test runner is not. It answers with one JSON line: ``{"pid": …}`` or
``{"error": …}``. Standard library only; imports nothing of labkit.

Two kinds of order. ``boot`` makes namespaces, builds the host's view of the file system and becomes its first
process. ``start`` runs a daemon, in the namespaces of a given process or where we are. In both the caller's
process tree is left: the parent is the first process of the (PID) namespace, which reaps.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

CLONE_FLAGS = {
    "mnt": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 0x20, 0x1000, 0x4000, 0x40000, 0x100000
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError that names both ends."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _check(result, f"cannot mount {source or kind} on {target}")


def detach(target: str) -> None:
    """umount2(2), lazily. Somebody else's copy of the mount is not affected in a private namespace."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"cannot unmount {target}")


def mount_points() -> list[str]:
    """Of this mount namespace, deepest first, newest first."""
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    fields = [line.split(" ")[4] for line in text.splitlines()]
    points = [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point) for point in fields]
    ordered = sorted(enumerate(points), key=lambda item: (item[1].count("/"), item[0]), reverse=True)
    return [point for _, point in ordered]


def is_below(path: str, directory: str) -> bool:
    """Whether ``path`` is ``directory`` or lies in it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _build_view(order: dict[str, Any]) -> None:
    """Give the new mount namespace the host's private directories, in front of the machine's tree or of its own."""
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    home: str = order["directory"]
    private: dict[str, str] = order["private"]
    layers: list[str] = order["root"]
    # A tree of its own shows nothing of the machine's by itself; the machine's own shows all that is not private.
    keep = [path for path in order["visible"] if layers or any(is_below(path, place) for place in private)]
    # Other people's mounts would be pinned by our copies of them (a container's root, say). AppArmor's
    # control files go too: the lab's dockerd must not load profiles into the machine's kernel.
    for point in mount_points():
        stray = any(is_below(point, place) for place in private) or point == "/sys/kernel/security"
        if stray and not any(is_below(path, point) for path in [home, *keep, *layers]):
            detach(point)
    # Sources are opened before anything is covered: the lab itself lies below /var.
    sources = {place: os.open(source, os.O_PATH | os.O_DIRECTORY) for place, source in private.items()}
    kept = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in keep}
    top = _mount_root(layers, home) if layers else ""
    etc = f"{layers[-1]}/etc" if layers else "/etc"
    mount("overlay", f"{top}/etc", "overlay", 0, f"lowerdir={etc},upperdir={home}/etc.upper,workdir={home}/etc.work")
    for places, flags in ((sources, MS_BIND), (kept, MS_BIND | MS_REC)):
        for place, fd in places.items():
            Path(top + place).mkdir(parents=True, exist_ok=True)
            mount(f"/proc/self/fd/{fd}", top + place, flags=flags)
            os.close(fd)
    if top:
        _enter_root(top)
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # dockerd raises the limit of kernel keys, which is the machine's; it carries on when it cannot.
    keys = "/proc/sys/kernel/keys"
    if Path(keys).is_dir():
        mount(keys, keys, flags=MS_BIND)
        mount("", keys, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("", "/", flags=MS_REC | MS_SHARED)  # as systemd leaves it on a real host


def _mount_root(layers: list[str], home: str) -> str:
    """Put the host's own root together at ``<home>/root.point``; returns that path."""
    point = f"{home}/root.point"
    upper = f"upperdir={home}/root.upper,workdir={home}/root.work"
    mount("overlay", point, "overlay", 0, f"lowerdir={':'.join(layers)},{upper}")
    for place in ("/dev", "/sys"):
        mount(place, point + place, flags=MS_BIND | MS_REC)
    return point


def _enter_root(top: str) -> None:
    """Make ``top`` the root of this mount namespace and let go of the machine's."""
    before = f"{top}/.machine"
    Path(before).mkdir(exist_ok=True)
    _check(_libc.pivot_root(top.encode(), before.encode()), f"cannot make {top} the root")
    os.chdir("/")
    detach("/.machine")
    Path("/.machine").rmdir()


def _become(order: dict[str, Any], answer: socket.socket) -> NoReturn:
    """Tell our pid, prepare, and exec. The answer ends at exec, so silence after the pid means success."""
    answer.send(b"pid")
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        if order["kind"] == "boot" and "mnt" in order["namespaces"]:
            socket.sethostname(order["hostname"])
            _build_view(order)
        nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for number, fd in enumerate((nothing, log, log)):
            os.dup2(fd, number)
        os.chdir(order.get("cwd", "/"))
        os.umask(0o022)
        for number in (
            signal.SIGPIPE,
            signal.SIGXFSZ,
        ):  # Python ignores these, and a child would inherit that
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(order["argv"][0], order["argv"], order["env"])
    except BaseException as error:
        detail = f"{error}" if isinstance(error, OSError) else traceback.format_exc()
        answer.send(b"error " + detail.encode(errors="replace")[:4000])
    os._exit(127)


def _log_before_entering(order: dict[str, Any]) -> None:
    """Open the log where we are, and pass it on by descriptor: the host does not see the lab's directory."""
    fd = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    order["log"] = f"/proc/self/fd/{fd}"


def _fork_into(order: dict[str, Any], answer: socket.socket) -> NoReturn:
    """The first child: leave the caller's session, enter or make namespaces, leave the last child behind."""
    try:
        os.setsid()
        if order["kind"] == "boot":
            flags = 0
            for name in order["namespaces"]:
                flags |= CLONE_FLAGS[name]
            _check(_libc.unshare(flags), "cannot make namespaces")
        elif order.get("inside"):
            _log_before_entering(order)
            names = ("ipc", "uts", "net", "pid", "mnt")  # mnt last: it changes what a path means
            fds = {name: os.open(f"/proc/{order['inside']}/ns/{name}", os.O_RDONLY) for name in names}
            for name in names:
                _check(_libc.setns(fds[name], CLONE_FLAGS[name]), f"cannot enter the {name} namespace")
        if os.fork() != 0:
            os._exit(0)
        # In an entered PID namespace one more generation is needed to become the child of its first process.
        if order["kind"] == "start" and os.fork() != 0:
            os._exit(0)
        os.setsid()
    except OSError as error:
        answer.send(b"error " + str(error).encode())
        os._exit(1)
    _become(order, answer)


def launch(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out an order. The pid comes from the kernel (SCM_CREDENTIALS), translated to our namespace."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    child = os.fork()
    if child == 0:
        ours.close()
        _fork_into(order, theirs)
    theirs.close()
    pid = None
    error = "it ended before it began"
    while True:
        message, ancillary, _, _ = ours.recvmsg(8192, socket.CMSG_SPACE(12))
        if not message:
            break
        if message.startswith(b"error "):
            error = message[6:].decode(errors="replace")
            pid = None
            break
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid = struct.unpack("3i", data)[0]
    os.waitpid(child, 0)
    return {"error": error} if pid is None else {"pid": pid}


if __name__ == "__main__":
    print(json.dumps(launch(json.loads(sys.argv[1]))), flush=True)
