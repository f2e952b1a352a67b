"""A file system of the benchmark's own, for its lab: a sparse image, a loop device, an ext4 with a journal.

What a machine's own file system does is not what is measured, and may be strange: an ext4 without a journal, say,
passes over inodes that were freed in the last minutes, so that whoever makes 100,000 files after 100,000 were removed
is several times slower, by chance. Must never touch anything but its own directory, and leaves nothing behind; what
a run that was killed has left, the next one of that name removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from labkit import leftovers
from labkit.errors import LabError
from labkit.lab import Lab
from labkit.launch import mount_points
from labkit.network import command
from labkit.spec import load_spec

PLACE = Path("/var/lib/cargo-bench")
SIZE_BYTES = 40 << 30
"""The largest data set is 10 GB, on two hosts, with a copy beside it."""
SPARE_BYTES = 2 << 30
"""What is left to the machine when it has less room than that."""
FORMAT = ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard")
OPTIONS = "noinit_itable,discard"
"""Nothing is initialised in the background of a measurement; what is removed costs no room in the image, nor a later
turn less than the first."""


@contextlib.contextmanager
def disk(name: str, say: Callable[[str], None], place: Path = PLACE) -> Iterator[Path]:
    """An empty directory for the lab ``name``, on a file system of its own, or else on the machine's, which is said.

    The lab in it must be down when this ends. Raises LabError when another run has it, or when something resists.
    """
    home = place / name
    with _held(home):
        _remove(home, name)
        try:
            yield _mounted(home, say)
        finally:
            _remove(home, name)
            home.rmdir()
            with contextlib.suppress(OSError):
                place.rmdir()  # as long as no other run has its own there


@contextlib.contextmanager
def _held(home: Path) -> Iterator[None]:
    """One run of a name at a time. The lock is on the directory: it ends with the process."""
    while True:
        home.mkdir(parents=True, exist_ok=True)
        fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LabError(f"another scripts/bench works in {home}; wait for it, or choose another --lab") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), home.stat()):
                break
        os.close(fd)  # its last user removed it meanwhile
    try:
        yield
    finally:
        os.close(fd)


def _mounted(home: Path, say: Callable[[str], None]) -> Path:
    point, image = home / "disk", home / "image"
    point.mkdir()
    free = os.statvfs(home)
    try:
        with image.open("xb") as file:
            file.truncate(min(SIZE_BYTES, free.f_bavail * free.f_frsize - SPARE_BYTES))
        command([*FORMAT, str(image)])
        device = command(["losetup", "--find", "--show", "--direct-io=on", str(image)]).strip()
        command(["mount", "-t", "ext4", "-o", OPTIONS, device, str(point)])
        command(["losetup", "--detach", device])  # which happens when it is unmounted
    except (LabError, OSError) as error:
        say(f"no file system of its own for the lab, so its figures depend on the machine's: {error}")
        _release(home)
    return point


def _remove(home: Path, name: str) -> None:
    """What is in ``home``, with the lab of a run that was killed."""
    point = home / "disk"
    if load_spec(point / name) is not None:  # it is written before anything else of a lab is made
        Lab(name, base=point).down()
    _release(home)
    leftovers.remove_tree(point)


def _release(home: Path) -> None:
    """Unmount, and let go of device and image."""
    point, image = home / "disk", home / "image"
    while str(point) in mount_points():
        command(["umount", "--", str(point)])
    if image.exists():
        for line in command(["losetup", "--noheadings", "--output", "NAME", "--associated", str(image)]).split():
            with contextlib.suppress(LabError):  # it goes by itself, once nobody has it mounted
                command(["losetup", "--detach", line])
        image.unlink()
