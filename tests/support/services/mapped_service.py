"""A store in many mapped files, each written through a shared mapping whose descriptor was closed at once.

A container's program: Python alone. Each line ``put N`` writes one slot of file ``N % FILES``, waits for ``msync``, and is
answered by ``ok N``; ``all`` is answered by all numbers whose slots are whole. A slot is the number, and its digest.
Every record is also counted in the first page of *each* of a few other files, so that pages far apart change together.
"""

import hashlib
import mmap
import os
import signal
import socketserver
import struct
import threading

FILES = 300
SLOTS = 2048
SLOT = struct.Struct("<Q24s")
HEADER = 4096
maps: list[mmap.mmap] = []
writing = threading.Lock()


def path_of(number: int) -> str:
    return f"/data/maps/{number % 16:02d}/{number:04d}.map"


def slot_of(number: int) -> bytes:
    return SLOT.pack(number, hashlib.sha256(b"%d" % number).digest()[:24])


def put(number: int) -> None:
    place = number // FILES % SLOTS
    view = maps[number % FILES]
    start = HEADER + place * SLOT.size
    with writing:
        view[start : start + SLOT.size] = slot_of(number)
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        view.flush(page, min(2 * mmap.PAGESIZE, len(view) - page))
        other = maps[number * 31 % FILES]
        (count,) = struct.unpack_from("<Q", other, 0)
        struct.pack_into("<Q", other, 0, count + 1)
        other.flush(0, mmap.PAGESIZE)


def numbers() -> list[int]:
    found = []
    for view in maps:
        for number, digest in SLOT.iter_unpack(view[HEADER:]):
            if number:
                assert slot_of(number) == SLOT.pack(number, digest), number
                found.append(number)
    return sorted(found)


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            words = line.split()
            if words[:1] == [b"put"]:
                put(int(words[1]))
                self.wfile.write(b"ok %d\n" % int(words[1]))
            elif words[:1] == [b"count"]:
                total = sum(struct.unpack_from("<Q", view, 0)[0] for view in maps)
                self.wfile.write(b"%d\n" % total)
            else:
                self.wfile.write(b" ".join(b"%d" % number for number in numbers()) + b"\n")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    for number in range(FILES):
        place = path_of(number)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(descriptor).st_size == 0:
            os.ftruncate(descriptor, HEADER + SLOTS * SLOT.size)
        maps.append(mmap.mmap(descriptor, 0, mmap.MAP_SHARED))
        os.close(descriptor)
    server = Server(("", 7000), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.02)


main()
