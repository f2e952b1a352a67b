"""Runs *on a host*, by itself, with the standard library only: small-file work, and first touches.

    probe.py small DIRECTORY FILES                       create, stat, read, rename, unlink small files
    probe.py walk DIRECTORY                              stat and read everything in an existing tree
    probe.py touch KIND FILE…                            the first touch of each file, one after the other

Prints JSON: operations per second, or seconds for each file.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable

FILE_BYTES = 4096
FOLDERS = 50


def rate(paths: list[bytes], act: Callable[[bytes], object]) -> float:
    """How many a second."""
    began = time.perf_counter()
    for path in paths:
        act(path)
    return len(paths) / (time.perf_counter() - began)


def read(path: bytes) -> int:
    """The whole file, in pieces; its size."""
    total = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while piece := os.read(descriptor, 1 << 20):
            total += len(piece)
    finally:
        os.close(descriptor)
    return total


def small(directory: bytes, files: int) -> dict[str, float]:
    """A tree of small files from its making to its end."""
    block = os.urandom(FILE_BYTES)
    for folder in range(FOLDERS):
        os.makedirs(directory + b"/%02d" % folder)
    paths = [directory + b"/%02d/%06d" % (number % FOLDERS, number) for number in range(files)]

    def create(path: bytes) -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(descriptor, block)
        os.close(descriptor)

    found = {
        "create": rate(paths, create),
        "stat": rate(paths, os.stat),
        "read": rate(paths, read),
        "rename": rate(paths, lambda path: os.rename(path, path + b".moved")),
        "unlink": rate([path + b".moved" for path in paths], os.unlink),
    }
    for folder in range(FOLDERS):
        os.rmdir(directory + b"/%02d" % folder)
    os.rmdir(directory)
    return found


def walk(directory: bytes) -> dict[str, float]:
    """An existing tree: listed, looked at, read."""
    began = time.perf_counter()
    paths = [parent + b"/" + name for parent, _, names in os.walk(directory) for name in names]
    listed = len(paths) / (time.perf_counter() - began)
    return {"list": listed, "stat": rate(paths, os.stat), "read": rate(paths, read)}


def touch(kind: str, paths: Iterable[bytes]) -> list[float]:
    """Seconds of the first touch of each file: ``read`` of 4 KiB, ``all`` of it, ``write`` of one byte."""
    took = []
    for path in paths:
        began = time.perf_counter()
        if kind == "all":
            read(path)
        else:
            descriptor = os.open(path, os.O_RDONLY if kind == "read" else os.O_WRONLY)
            if kind == "read":
                os.read(descriptor, FILE_BYTES)
            else:
                os.pwrite(descriptor, b"x", 0)
            os.close(descriptor)
        took.append(time.perf_counter() - began)
    return took


def main(words: list[bytes]) -> None:
    """See the module."""
    verb, *rest = words
    if verb == b"small":
        print(json.dumps(small(rest[0], int(rest[1]))))
    elif verb == b"walk":
        print(json.dumps(walk(rest[0])))
    else:
        print(json.dumps(touch(rest[0].decode(), rest[1:])))


if __name__ == "__main__":
    main([os.fsencode(word) for word in sys.argv[1:]])
