"""Act in a container's namespaces without leaving one's own: in a thread that ends there.

A thread that has entered another mount or network namespace must never do anything else afterwards, so it is made for
the one act and ends with it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

CLONE_FS, CLONE_NEWNS, CLONE_NEWNET = 0x200, 0x20000, 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def in_own_thread(act: Callable[[], None]) -> None:
    """Run ``act`` in a thread that ends with it, and raise here what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="own-thread")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def leave_shared_directory() -> None:
    """From here on the calling thread has a working directory of its own. Raises OSError."""
    _require(_libc.unshare(CLONE_FS))


def enter(namespace: int, kind: int) -> None:
    """Move the calling thread, for good, into the namespace behind the descriptor. Raises OSError."""
    if kind == CLONE_NEWNS:  # the kernel refuses a thread that shares its working directory with others
        leave_shared_directory()
    _require(_libc.setns(namespace, kind))


def _require(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"entering the container's namespace: {os.strerror(number)}")
