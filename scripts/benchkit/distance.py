"""Distance between two interfaces, for kernels without netem: carries every frame across, so many milliseconds later.

    distance.py ONE OTHER MILLISECONDS                    runs until it is killed; prints ``ready`` once it carries

Runs in the network namespace of both, on the standard library alone. Frames keep what the kernel knows of them (PACKET_VNET_HDR), so the
large ones that veth passes on whole stay whole, and a handful of system calls carries 64 KB.
"""

import socket
import sys
import threading
import time
from collections import deque

ETH_P_ALL = 3
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 1, 15, 23
PACKET_MR_PROMISC = 1
"""linux/if_packet.h; the socket module does not name them all."""
LARGEST_FRAME = 70_000
BUFFER_BYTES = 8 << 20


def opened(interface: str) -> socket.socket:
    """All frames that arrive at the interface, whoever they are for; what is sent leaves by it."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    made.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    for kind in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        made.setsockopt(socket.SOL_SOCKET, kind, BUFFER_BYTES)
    made.bind((interface, ETH_P_ALL))
    index = socket.if_nametoindex(interface)
    member = index.to_bytes(4, sys.byteorder) + PACKET_MR_PROMISC.to_bytes(2, sys.byteorder) + bytes(10)
    made.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, member)
    return made


class Way:
    """One direction: a thread that takes frames, and one that passes them on when they are due."""

    def __init__(self, taken: socket.socket, given: socket.socket, seconds: float) -> None:
        self._taken, self._given, self._seconds = taken, given, seconds
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._some = threading.Semaphore(0)
        for act in (self._take, self._give):
            threading.Thread(target=act, daemon=True).start()

    def _take(self) -> None:
        while True:
            frame = self._taken.recv(LARGEST_FRAME)
            self._under_way.append((time.monotonic() + self._seconds, frame))
            self._some.release()

    def _give(self) -> None:
        while True:
            self._some.acquire()
            due, frame = self._under_way.popleft()
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            try:
                self._given.send(frame)
            except OSError:  # a full queue or an interface that is going away: the frame is lost, as on any cable
                continue


def main(one: str, other: str, milliseconds: str) -> None:
    """See the module."""
    ends = opened(one), opened(other)
    for taken, given in (ends, ends[::-1]):
        Way(taken, given, float(milliseconds) / 1000)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
