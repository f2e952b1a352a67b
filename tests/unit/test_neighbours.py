"""Gratuitous ARP: its frame, and that it leaves a network namespace."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hostd.neighbours import announce, frame


def test_the_frame_tells_everybody_who_has_the_address() -> None:
    hardware, address = bytes.fromhex("0242ac110002"), bytes([172, 17, 0, 2])
    made = frame(hardware, address)
    assert made[:6] == b"\xff" * 6
    assert made[6:12] == hardware
    assert made[12:14] == b"\x08\x06"
    assert (made[22:28], made[28:32], made[38:42]) == (hardware, address, address)
    assert len(made) == 42


def test_a_process_in_the_hosts_own_network_needs_none() -> None:
    assert announce(os.getpid()) == ""


def test_a_process_that_is_gone_is_said_and_no_more() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert announce(gone.pid) != ""


@pytest.mark.root
def test_an_interface_of_another_namespace_announces_its_address() -> None:
    script = (
        "ip link add v0 type veth peer name v1 && ip addr add 192.0.2.7/24 dev v0 && ip link set v0 up && "
        "ip link set v1 up && echo up && exec sleep 60"
    )
    inside = subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert inside.stdout is not None
        assert inside.stdout.readline() == "up\n"
        before = sent_packets(inside.pid, "v0")
        assert announce(inside.pid) == ""
        assert sent_packets(inside.pid, "v0") > before
    finally:
        inside.kill()
        inside.wait()


def sent_packets(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[9]) for line in lines if line.strip().startswith(f"{name}:"))
