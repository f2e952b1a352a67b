"""Work that must not slow down what the container waits for: less processor time, and the disk after everybody else.

Priorities belong to threads in Linux, and whatever a thread starts inherits them: rsync and its ssh, too. So the work
gets a thread of its own, which ends with it, and nothing has to be put back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

NICENESS = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
"""System call numbers of ioprio_set(2), which the C library has no function for."""
_ONE_THREAD = 1
_LOWEST_BEST_EFFORT = (2 << 13) | 7
"""Not the idle class: on a disk that never rests that would mean never."""
_libc = ctypes.CDLL(None, use_errno=True)


def in_background(work: Callable[[], Result]) -> Result:
    """Do ``work`` at low priority and return, or raise, what it does. The caller waits for it."""
    with background_threads(1) as pool:
        return pool.submit(work).result()


def background_threads(count: int) -> ThreadPoolExecutor:
    """So many threads that work at low priority. Leaving the pool's context waits for them."""
    return ThreadPoolExecutor(count, thread_name_prefix=threading.current_thread().name, initializer=_step_back)


def _step_back() -> None:
    me = threading.get_native_id()
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, me, max(NICENESS, os.getpriority(os.PRIO_PROCESS, me)))
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        _libc.syscall(number, _ONE_THREAD, me, _LOWEST_BEST_EFFORT)
