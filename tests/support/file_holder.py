"""A process that holds files open, maps them and writes to them as it is told: one command a line, one answer each.

Commands: ``open NAME``, ``look NAME`` (read-only), ``write NAME TEXT``, ``map NAME``, ``map_to_read NAME``, ``poke NAME TEXT`` (through the mapping), ``unmap NAME``,
``close NAME`` (the descriptor), ``submit NAME TEXT`` (Linux's native asynchronous I/O). NAME is a path. At the end
of its input the process leaves, as a container's does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path

IO_SETUP, IO_GETEVENTS, IO_SUBMIT = 206, 208, 209
"""System call numbers of x86-64."""
IOCB_CMD_PWRITE = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)


class Holder:
    """The process, as a test uses it: ``with Holder() as holder: holder("open", file)``."""

    def __init__(self, *prefix: str) -> None:
        """``prefix`` is a command that ends by executing the words after it."""
        self._process = subprocess.Popen(
            [*prefix, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __call__(self, verb: str, file: Path, text: str = "") -> None:
        """Have one command done; returns when it is."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(verb, file, text, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().strip()
        assert answer == "done", answer

    def end(self) -> None:
        """End the process; harmless when repeated."""
        self._process.communicate()


def _submit(descriptor: int, data: bytes) -> None:
    """Write at offset 0 by io_submit(2), which makes no inotify event."""
    context = ctypes.c_ulong(0)
    _check(_libc.syscall(IO_SETUP, 1, ctypes.byref(context)))
    buffer = ctypes.create_string_buffer(data)
    block = struct.pack(
        "QIIHhIQQqQII", 0, 0, 0, IOCB_CMD_PWRITE, 0, descriptor, ctypes.addressof(buffer), len(data), 0, 0, 0, 0
    )
    held = ctypes.create_string_buffer(block)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(held))
    _check(_libc.syscall(IO_SUBMIT, context, ctypes.c_long(1), pointers))
    event = ctypes.create_string_buffer(32)
    _check(_libc.syscall(IO_GETEVENTS, context, ctypes.c_long(1), ctypes.c_long(1), event, None))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    """Obey until standard input ends."""
    descriptors: dict[str, int] = {}
    maps: dict[str, int] = {}
    for line in sys.stdin:
        verb, name, *text = line.split()
        data = text[0].encode() if text else b""
        if verb == "open":
            descriptors[name] = os.open(name, os.O_RDWR)
        elif verb == "look":
            descriptors[name] = os.open(name, os.O_RDONLY)
        elif verb == "write":
            os.pwrite(descriptors[name], data, 0)
        elif verb == "submit":
            _submit(descriptors[name], data)
        elif verb == "map":
            maps[name] = _map(descriptors[name], mmap.PROT_READ | mmap.PROT_WRITE)
        elif verb == "map_to_read":
            maps[name] = _map(descriptors[name], mmap.PROT_READ)
        elif verb == "poke":
            ctypes.memmove(maps[name], data, len(data))
        elif verb == "unmap":
            _check(_libc.munmap(ctypes.c_void_p(maps.pop(name)), mmap.PAGESIZE))
        elif verb == "close":
            os.close(descriptors.pop(name))
        print("done", flush=True)
    os._exit(0)


def _map(descriptor: int, protection: int) -> int:
    """The first page, shared. Python's own mmap would keep a descriptor of its own open."""
    address = _libc.mmap(None, mmap.PAGESIZE, protection, mmap.MAP_SHARED, descriptor, 0)
    _check(-1 if address == ctypes.c_void_p(-1).value else 0)
    return int(address)


if __name__ == "__main__":
    main()
