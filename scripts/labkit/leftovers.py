"""Find and remove everything that a lab may have left, by its mark and its names, not by its memory.

Works after a crash in the middle, after a half-made ``up``, and without a state file. The order matters:
processes first, since namespaces, cables and mounts live exactly as long as they do; then cgroups, interface
and directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

from labkit.errors import LabError
from labkit.launch import detach, is_below, mount_points
from labkit.network import interface_exists, remove_interface
from labkit.process import MARK, started_ticks
from labkit.spec import DEFAULT_BASE
from labkit.waiting import wait_until

CGROUPS = Path("/sys/fs/cgroup")
KILL_SECONDS = 30


def marked_processes(root: Path) -> list[int]:
    """Processes that carry the mark of the lab at ``root``; never ourselves or our ancestors."""
    mark = f"{MARK}={root}".encode()
    spared = set(_ancestors())
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0") and started_ticks(int(entry.name)):
                found.append(int(entry.name))
    return found


def _ancestors() -> Iterator[int]:
    pid = os.getpid()
    while pid > 0:
        yield pid
        try:
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return
        pid = int(text[text.rindex(")") + 2 :].split()[1])


def processes_rooted_in(pid_namespaces: set[str]) -> list[int]:
    """Live processes in any of these PID namespaces (as ``pid:[…]``)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                inside = str((entry / "ns/pid").readlink()) in pid_namespaces
                if inside and started_ticks(int(entry.name)) is not None:
                    found.append(int(entry.name))
    return found


def kill_processes(root: Path) -> int:
    """SIGKILL every marked process, and with a host's first process all that run there.

    Returns how many were marked. Raises LabError when something survives.
    """
    own = str(Path("/proc/self/ns/pid").readlink())
    total = 0
    namespaces: set[str] = set()

    def none_left() -> bool:
        nonlocal total
        pids = marked_processes(root)
        for pid in pids:
            with contextlib.suppress(OSError):
                namespaces.add(str(Path(f"/proc/{pid}/ns/pid").readlink()))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        total = max(total, len(pids))
        namespaces.discard(own)
        return not pids and not processes_rooted_in(namespaces)

    try:
        wait_until(none_left, "processes of the lab survive SIGKILL", KILL_SECONDS)
    except LabError as error:
        raise LabError(f"{error}: pids {marked_processes(root)}; look at /proc/<pid>/stack") from None
    return total


def cgroup_directories(name: str) -> list[Path]:
    """The directories of that name at the top of every cgroup hierarchy (v1: several; v2: one)."""
    places = [CGROUPS]
    with contextlib.suppress(OSError):
        places += [entry for entry in CGROUPS.iterdir() if entry.is_dir() and not entry.is_symlink()]
    return [place / name for place in places if (place / name).is_dir()]


def remove_cgroups(name: str, timeout_seconds: float = 10) -> None:
    """Remove ``name`` (``cargo-demo/alpha``, say) in every hierarchy. Raises LabError if it is busy."""

    def gone() -> bool:
        for top in cgroup_directories(name):
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # busy while its last process is ending: again in a moment
                    Path(directory).rmdir()
        return not cgroup_directories(name)

    wait_until(gone, f"cgroups of {name} are busy", timeout_seconds)


def unmount_below(root: Path) -> None:
    """Unmount, deepest first, whatever somebody mounted below the lab's directory in our namespace."""
    for point in mount_points():
        if is_below(point, str(root)):
            with contextlib.suppress(OSError):
                detach(point)
    remaining = [point for point in mount_points() if is_below(point, str(root))]
    if remaining:
        raise LabError(f"cannot unmount {', '.join(remaining)}; nothing below was deleted")


def remove_tree(root: Path) -> None:
    """Delete the lab's directory. Never follows a symlink; never runs while something is mounted below it."""
    unmount_below(root)
    try:
        kind = root.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(kind):
        raise LabError(f"{root} is no directory; look at it and remove it yourself")
    shutil.rmtree(root)


def remove_base(base: Path) -> None:
    """The directory of all labs goes with the last one, unless a person chose it."""
    if base == DEFAULT_BASE:
        with contextlib.suppress(OSError):
            base.rmdir()


def describe(root: Path, prefix: str) -> list[str]:
    """What there is of a lab, in words, for ``status`` and for tests; empty when it is gone."""
    found = [f"process {pid}" for pid in marked_processes(root)]
    found += [f"cgroup {path}" for path in cgroup_directories(prefix)]
    found += [f"interface {prefix}"] if interface_exists(prefix) else []
    found += [f"mount {point}" for point in mount_points() if is_below(point, str(root))]
    found += [f"directory {root}"] if root.exists() else []
    return found


def remove_all(root: Path, prefix: str) -> list[str]:
    """Everything above, in order. Returns what had been there; empty when there was nothing."""
    found = describe(root, prefix)
    kill_processes(root)
    remove_cgroups(prefix)
    remove_interface(prefix)
    remove_tree(root)
    return found
