"""Tell a container's neighbours where it is, once its interfaces are up.

Docker forwards published ports before the container can answer for its address. Whoever asks in between makes the host
look for the container's hardware address in vain, and the kernel repeats that only a second later, however soon the
container comes. A gratuitous ARP out of the container's own network namespace ends the wait, and lets go what waited.

It must never fail a start: without it a client waits a second longer, no more.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from hostd.namespaces import CLONE_NEWNET, enter, in_own_thread

SIOCGIFADDR, SIOCGIFHWADDR = 0x8915, 0x8927
ETHERNET_TYPE_ARP = 0x0806
BROADCAST = b"\xff" * 6
LOOPBACK = "lo"


def announce(pid: int) -> str:
    """Send a gratuitous ARP from every interface with an IPv4 address of the network namespace of ``pid``.

    Returns "", or why it could not be done.
    """
    try:
        in_own_thread(lambda: _announce(pid))
    except OSError as error:
        return str(error)
    return ""


def _announce(pid: int) -> None:
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(namespace).st_ino == os.stat("/proc/self/ns/net").st_ino:
            return  # the host's own network
        enter(namespace, CLONE_NEWNET)
    finally:
        os.close(namespace)
    for _, name in socket.if_nameindex():
        if name != LOOPBACK:
            _send(name)


def _send(name: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", os.fsencode(name)[:15])
        hardware = fcntl.ioctl(asking, SIOCGIFHWADDR, request)[18:24]
        try:
            address = fcntl.ioctl(asking, SIOCGIFADDR, request)[20:24]
        except OSError:
            return  # it has none
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sending:
        sending.bind((name, ETHERNET_TYPE_ARP))
        sending.send(frame(hardware, address))


def frame(hardware: bytes, address: bytes) -> bytes:
    """The gratuitous ARP request of who has ``hardware`` (6 bytes) and ``address`` (4 bytes, IPv4)."""
    ethernet = BROADCAST + hardware + struct.pack("!H", ETHERNET_TYPE_ARP)
    return ethernet + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + hardware + address + bytes(6) + address
