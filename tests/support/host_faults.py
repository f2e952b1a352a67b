"""Faults from outside of the product: what happens to hosts, daemons and links, and how it ends again.

Each fault is a context: inside it the fault is in force. ``PHASES`` are the places of a migration at which the matrix
lets them strike. Stands between ``Fleet`` and ``tests/e2e/test_fault_matrix.py``; knows the lab only, not the product.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit import Host
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until
from tests.support.fleet import Fleet

SHORT_SECONDS = 4.0
"""Of an outage that is over before any lease has run out."""
LEASE_SECONDS = 40.0
"""Within this time the lease of a host that is cut off has run out, also on a busy machine."""
HOLD_SECONDS = 4.0
"""How long an agent waits at the point of a phase, so that the fault is in force when it goes on."""


@dataclass(frozen=True)
class Phase:
    """A place in a migration: the point at which the agent of ``host`` waits ``HOLD_SECONDS`` and goes on."""

    name: str
    host: str
    point: str
    rolling_back: bool = False

    def __str__(self) -> str:
        return self.name


PHASES = (
    Phase("prepare", "beta", "target.create_container:before_effect"),
    Phase("pre_copy", "beta", "target.pull_round:before_effect"),
    Phase("disarmed", "alpha", "source.stop_container:before_effect"),
    Phase("stopped", "beta", "target.apply_dirty:before_effect"),
    Phase("claimed", "beta", "target.start_container:before_effect"),
    Phase("fill", "beta", "target.fill_replica:before_effect"),
    Phase("verify", "beta", "target.verify_trees:before_effect"),
    Phase("release", "alpha", "source.retire_container:before_effect"),
    Phase("carry", "alpha", "source.carry_back:before_effect", rolling_back=True),
)

Fault = Callable[[Fleet], contextlib.AbstractContextManager[None]]


def last(seconds: float) -> None:
    """Let a fault be in force for so long: its duration is a part of it."""
    threading.Event().wait(seconds)


def _lease_gone(fleet: Fleet, host: str) -> None:
    wait_until(lambda: fleet.store.get(fleet.keys.host(host)) is None, f"{host} is still listed", LEASE_SECONDS)


def etcd_killed() -> Fault:
    """The bus is gone, and comes back with its data."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        fleet.lab.etcd.kill()
        last(SHORT_SECONDS)
        fleet.lab.etcd.start()
        yield

    return fault


def etcd_frozen() -> Fault:
    """The bus answers nobody for longer than a call is waited for, and then answers all of it."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        fleet.lab.etcd.freeze()
        last(7.0)
        fleet.lab.etcd.thaw()
        yield

    return fault


def power_cut(name: str) -> Fault:
    """All that runs on the host ends at once; it boots again from its disks."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        host = fleet.lab.host(name)
        host.power_cut()
        fleet.oracle.lost_power(name)
        host.boot()
        fleet.oracle.resume(name)
        yield

    return fault


def sshd_killed(name: str) -> Fault:
    """No new connection, and all that there are end."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        host = fleet.lab.host(name)
        host.sshd.kill()
        for pid in _processes(host, "sshd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        last(SHORT_SECONDS)
        host.sshd.start()
        yield

    return fault


def dockerd_killed(name: str, *, live_restore: bool) -> Fault:
    """Docker dies and is started again. Without live-restore it then ends the containers that ran."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        host = fleet.lab.host(name)
        with _live_restore(fleet, host) if live_restore else contextlib.nullcontext():
            host.dockerd.kill()
            last(1.0)
            host.dockerd.start()
            fleet.oracle.resume(name)
            yield

    return fault


def dockerd_restarted(name: str) -> Fault:
    """Docker is stopped in good order, and stops all containers first (A12)."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        host = fleet.lab.host(name)
        host.dockerd.stop()
        host.dockerd.start()
        fleet.oracle.resume(name)
        yield

    return fault


@contextlib.contextmanager
def _live_restore(fleet: Fleet, host: Host) -> Iterator[None]:
    """``live-restore`` on, without a restart, and off again."""
    file = host.directory / "etc/docker/daemon.json"
    before = file.read_text()
    client = fleet.docker[host.spec.name]

    def switch(on: bool) -> None:
        # Spelt out either way: dockerd leaves alone at a reload what the file does not name.
        file.write_text(json.dumps(json.loads(before) | {"live-restore": on}))
        host.dockerd.signal(signal.SIGHUP)
        wait_until(lambda: bool(client.info()["LiveRestoreEnabled"]) == on, "live-restore does not change", 10)

    switch(True)
    try:
        yield
    finally:
        switch(False)
        file.write_text(before)


def cut(name: str, peer: str, *, one_way: bool = False, until_lease_gone: bool = False) -> Fault:
    """Nothing passes between the two; with ``one_way`` nothing that ``name`` sends."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        host = fleet.lab.host(name)
        host.cut(peer, one_way=one_way)
        if until_lease_gone:
            _lease_gone(fleet, name)
        last(SHORT_SECONDS + HOLD_SECONDS)
        host.heal(peer)
        yield

    return fault


def agent_frozen(name: str) -> Fault:
    """The agent stands still until nobody lists its host any more, and then goes on as if nothing had been (P9)."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        hostd = fleet.lab.host(name).hostd
        hostd.freeze()
        _lease_gone(fleet, name)
        hostd.thaw()
        yield

    return fault


def coordinator_frozen() -> Fault:
    """The leader stands still, another one takes over and leads; the first wakes up late and believes to lead."""

    @contextlib.contextmanager
    def fault(fleet: Fleet) -> Iterator[None]:
        first = fleet.lab.coordinator
        log = fleet.lab.root / "second.log"
        with second_coordinator(fleet, log):
            first.freeze()
            since = log.stat().st_size
            wait_until(lambda: b'"leading"' in log.read_bytes()[since:], "nobody takes over", LEASE_SECONDS)
            first.thaw()
            yield

    return fault


@contextlib.contextmanager
def second_coordinator(fleet: Fleet, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A coordinator ``c2`` beside the lab's, waiting for its turn; killed at the end."""
    config = log.with_suffix(".cfg")
    endpoints = fleet.lab.etcd.endpoints
    config.write_text(f"[coordinator]\nname = c2\n[etcd]\nendpoints = {endpoints}\n[log]\nformat = json\n")
    line = [sys.executable, "-m", "coordinator.main", "-c", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with log.open("wb") as file:
        child = subprocess.Popen(line, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: "campaigning" in log.read_text(), "the second coordinator does not campaign", 30)
        yield child
    finally:
        child.kill()
        child.wait()


def _processes(host: Host, program: str) -> list[int]:
    """Pids, as the machine sees them, of all processes of that program on the host."""
    namespace = os.readlink(f"/proc/{host.pid}/ns/pid")
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(place / "ns" / "pid") == namespace:
                words = (place / "cmdline").read_bytes().split(b"\0")
                name = os.path.basename(words[0].split(b":")[0]).decode(errors="replace")
                if name == program or program.encode() in words:
                    found.append(int(place.name))
    return found


def kill_helpers(fleet: Fleet, host: str, program: str, timeout_seconds: float = 20) -> None:
    """SIGKILL the processes of a program (``rsync``, ``sshfs``, ``hostd.lower``) on the host, once there are any."""
    where = fleet.lab.host(host)
    wait_until(lambda: bool(_processes(where, program)), f"no {program} runs on {host}", timeout_seconds)
    for pid in _processes(where, program):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


EVERYWHERE: dict[str, Fault] = {
    "etcd killed": etcd_killed(),
    "source without power": power_cut("alpha"),
    "target without power": power_cut("beta"),
    "source's dockerd killed": dockerd_killed("alpha", live_restore=False),
    "target's dockerd killed": dockerd_killed("beta", live_restore=False),
    "source and target cut": cut("alpha", "beta"),
    "source and etcd cut, leases expire": cut("alpha", "etcd", until_lease_gone=True),
    "target and etcd cut, leases expire": cut("beta", "etcd", until_lease_gone=True),
    "source's agent frozen": agent_frozen("alpha"),
    "target's agent frozen": agent_frozen("beta"),
    "coordinator frozen, another takes over": coordinator_frozen(),
}
"""Faults that strike at every phase."""
AROUND_THE_STOP: dict[str, Fault] = {
    "etcd frozen": etcd_frozen(),
    "source's sshd killed": sshd_killed("alpha"),
    "source's dockerd restarted": dockerd_restarted("alpha"),
    "target's dockerd restarted": dockerd_restarted("beta"),
    "source's dockerd killed, live-restore": dockerd_killed("alpha", live_restore=True),
    "target's dockerd killed, live-restore": dockerd_killed("beta", live_restore=True),
    "source not heard by target": cut("alpha", "beta", one_way=True),
    "target not heard by source": cut("beta", "alpha", one_way=True),
    "source not heard by etcd": cut("alpha", "etcd", one_way=True),
    "target not heard by etcd": cut("beta", "etcd", one_way=True),
}
"""Variations, which strike at the phases of ``VARIED``."""
VARIED = ("pre_copy", "disarmed", "stopped", "fill")
