"""A lab with one container that is moved: by Cargo, or by hand as people do it without.

``home`` is the host where the container runs. Whatever moves it changes ``home``, and leaves nothing of it behind, so
that ways of moving can take turns. Nothing is asserted here; what a case cannot do is a LabError.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchkit.services import REDIS, Service
from coordinator.narrate import size
from events.connecting import connect
from events.schema import TERMINAL_PHASES, Event, Requested, SourceReleased
from events.settings import EtcdSettings
from labkit.errors import LabError
from labkit.host import Host
from labkit.images import share
from labkit.lab import Lab
from labkit.network import BRIDGE, command
from labkit.trust import OPERATOR_IDENTITY
from labkit.waiting import wait_until
from labkit.witness import wait_until_answering

PORT = REDIS.port
CONTAINER = "bench"
VOLUME = "benchdata"
VOLUMES = "/var/lib/docker/volumes"
TREE = f"{VOLUMES}/{VOLUME}/_data"
IDLE_COMMAND = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.05; done"]
"""A container that does nothing and stops within 50 ms."""
TICKING_COMMAND = ["sh", "-c", "trap 'exit 0' TERM; while :; do date > /data/tick; sleep 0.05; done"]
"""The same, and writes one small file all the time, so that something is always stale at the cut-over."""
END_SECONDS = 900.0
FOLD_SECONDS = 180.0
MEASURED_SECONDS = 120.0
DIRECTORIES = 100
FORWARDER = Path(__file__).with_name("distance.py")


@dataclass(frozen=True)
class Load:
    """A data set beside the container's own: so many bytes in so many files of one size."""

    bytes: int
    files: int

    @property
    def label(self) -> str:
        """For tables."""
        return f"{size(self.bytes)} in {self.files:,} files"


class Stage:
    """The lab, the bus, and the container."""

    def __init__(self, lab: Lab, names: tuple[str, str] = ("alpha", "beta")) -> None:
        self.lab = lab
        self.store = connect(EtcdSettings(endpoints=tuple(lab.etcd.endpoints.split(","))))
        self.hosts = [lab.host(name) for name in names]
        self.home = self.hosts[0]
        self._images: dict[str, str] = {}
        self._number = 0
        self._records = 0

    def close(self) -> None:
        """Let go of the bus."""
        self.store.close()

    @property
    def away(self) -> Host:
        """Where the container goes next."""
        return self.hosts[1] if self.home is self.hosts[0] else self.hosts[0]

    @property
    def addresses(self) -> list[str]:
        """Of all hosts, for the client."""
        return [host.spec.address for host in self.hosts]

    def first_record(self) -> int:
        """Where the next client begins to number its records: no number is ever written by two."""
        self._records += 10**8
        return self._records

    # --- the container -------------------------------------------------------------------------

    def image(self, name: str) -> str:
        """The tag of an image that both hosts have."""
        if name not in self._images:
            self._images[name] = share(name, self.hosts)
        return self._images[name]

    def fill(self, load: Load, host: Host | None = None) -> None:
        """Put ``load`` into the volume; the contents do not compress."""
        host = host or self.home
        host.docker_client().volumes.create(VOLUME)
        write_load(host.path(TREE) / "load", load)

    def run_service(self, service: Service = REDIS) -> None:
        """Start one of the benchmark's services, on its volume; it fsyncs every write."""
        self.create(self.home, service).start()
        service.wait_until_answering(self.home.spec.address)
        self.wait_listed()

    def run_idle(self, *, ticking: bool = False) -> None:
        """Start a container that only holds the volume."""
        self.home.docker_client().volumes.create(VOLUME)
        self.home.docker_client().containers.run(
            self.image("busybox"),
            TICKING_COMMAND if ticking else IDLE_COMMAND,
            name=CONTAINER,
            detach=True,
            volumes={VOLUME: {"bind": "/data"}},
        )
        self.wait_listed()

    def create(self, host: Host, service: Service = REDIS, **options: Any) -> Any:
        """The service's container, not started. ``options`` are the docker SDK's, in the place of the usual ones."""
        usual = {
            "image": options.pop("image", None) or self.image(service.image),
            "name": CONTAINER,
            "ports": {f"{service.port}/tcp": service.port},
            "volumes": {VOLUME: {"bind": "/data"}},
            "restart_policy": {"Name": "always"},
        }
        return host.docker_client().containers.create(**{**usual, **service.options, **options})

    def wait_listed(self) -> None:
        """Until Cargo knows that the container runs here."""
        key = self.store.keys.inventory_item(self.home.spec.name, CONTAINER)

        def listed() -> bool:
            found = self.store.get(key)
            return found is not None and bool(json.loads(found.value).get("running"))

        wait_until(listed, f"{self.home.spec.name} does not list the container", 30)

    def wait_measured(self) -> None:
        """Until the agent here has measured how large the container's data is, as it does once when it first sees it."""
        key = self.store.keys.inventory_item(self.home.spec.name, CONTAINER)

        def measured() -> bool:
            found = self.store.get(key)
            return found is not None and all(mount["files"] is not None for mount in json.loads(found.value)["mounts"])

        wait_until(measured, f"{self.home.spec.name} does not measure the container's data", MEASURED_SECONDS)

    def clear(self) -> None:
        """Remove whatever a case left, and begin on the first host again."""
        for host in self.hosts:
            for container in host.docker_client().containers.list(all=True):
                container.remove(force=True)
        for migration, head in self.store.heads().heads.items():
            if head.phase == "completed":
                self.wait(migration, {"finalised"}, 60)
        for host in self.hosts:
            for volume in host.docker_client().volumes.list():
                volume.remove(force=True)
        self.home = self.hosts[0]

    # --- Cargo ---------------------------------------------------------------------------------

    def ask(self, **request: Any) -> str:
        """Put a request to move the container; returns the migration's name."""
        self.wait_listed()
        self._number += 1
        name = f"bench-{self._number}"
        body = {
            "container": CONTAINER,
            "source": self.home.spec.name,
            "target": self.away.spec.name,
            **request,
        }
        self.store.put(self.store.keys.request(name), json.dumps(body).encode())
        return name

    def control(self, migration: str, wish: str | dict[str, Any]) -> None:
        """Put a control; returns once it was taken."""
        key = self.store.keys.control(migration)
        self.store.put(key, (wish if isinstance(wish, str) else json.dumps(wish)).encode())
        wait_until(lambda: self.store.get(key) is None, f"nobody took the control {wish!r}", 30)

    def wait(self, migration: str, types: set[str], timeout_seconds: float = END_SECONDS) -> list[Event]:
        """The history as soon as it holds one of ``types``. Raises LabError when it ends otherwise."""
        events: list[Event] = []
        deadline = time.monotonic() + timeout_seconds
        with self.store.follow(self.store.keys.migration(migration), tick_seconds=1.0) as follower:
            for _ in follower:
                events += self.store.read(migration, after=events[-1] if events else None)
                if any(event.type in types for event in events):
                    return events
                if events and events[-1].type in TERMINAL_PHASES - {"completed"}:
                    raise LabError(f"{migration} ended with {events[-1].type}: {events[-1].data}")
                if time.monotonic() > deadline:
                    break
        raise LabError(f"{migration} did not reach {', '.join(sorted(types))} in {timeout_seconds:.0f} s")

    def arrived(self) -> None:
        """The container has moved: what was away is home."""
        self.home = self.away

    def fold(self, migration: str) -> None:
        """Have the union folded at once, so that whatever comes next finds a plain volume, and nothing where it was."""
        key = self.store.keys.control(migration)
        self.store.put_if_absent(key, b"finalise")
        events = self.wait(migration, {"finalised"}, FOLD_SECONDS)
        wait_until(lambda: self.store.get(key) is None, "nobody took the control to finalise", 30)
        self._remove_kept(events)

    def _remove_kept(self, events: list[Event]) -> None:
        """The source's copy, which a migration keeps as ``rsync -a`` does: removed when nothing is measured."""
        requested, released = events[0].data, next(event.data for event in events if event.type == "source_released")
        assert isinstance(requested, Requested) and isinstance(released, SourceReleased) and released.kept_as
        host = self.lab.host(requested.request.source)
        docker = host.docker_client()
        kept = docker.containers.get(released.kept_as)
        volumes = [mount["Name"] for mount in kept.attrs["Mounts"] if mount["Type"] == "volume"]
        kept.remove(force=True)
        for name in volumes:
            docker.volumes.get(name).remove()
        host.run(["sync", "-f", VOLUMES], timeout_seconds=END_SECONDS)

    def migrate(self, **request: Any) -> list[Event]:
        """One migration through to a plain volume on the other host; the history up to ``completed``."""
        name = self.ask(**request)
        events = self.wait(name, {"completed"})
        self.arrived()
        self.fold(name)
        return events

    # --- by hand -------------------------------------------------------------------------------

    def restart(self) -> None:
        """``docker restart`` of the container."""
        self.home.run(["docker", "restart", CONTAINER])

    def ssh_line(self) -> list[str]:
        """ssh from the other host to this one, with a person's key: the agents' opens no shell."""
        directory = "/etc/cargo/ssh"
        options = [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={directory}/known_hosts",
            f"HostKeyAlias={self.home.spec.name}",
        ]
        return ["ssh", "-i", OPERATOR_IDENTITY, *(word for option in options for word in ("-o", option))]

    def rsync(self, into: str, *options: str) -> None:
        """``rsync -a --delete`` of the volume from home, run on the other host, down to its disk."""
        source = f"root@{self.home.spec.address}:{TREE}/"
        line = ["rsync", "-a", "--delete", *options, "-e", " ".join(self.ssh_line()), source, into]
        self.away.run(line, timeout_seconds=END_SECONDS)
        self.away.run(["sync", "-f", into], timeout_seconds=END_SECONDS)

    def rsync_seconds(self, compared: list[float] | None = None) -> float:
        """How long one rsync of the tree takes; the copy is removed again.

        To ``compared`` is added how long it takes together with a second one, which compares all contents by checksum.
        """
        scratch = "/var/lib/docker/benchcopy"
        self.away.run(["mkdir", "-p", scratch])
        began = time.monotonic()
        self.rsync(scratch)
        took = time.monotonic() - began
        if compared is not None:
            self.rsync(scratch, "--checksum", "--dry-run")
            compared.append(time.monotonic() - began)
        self.away.run(["rm", "-rf", scratch], timeout_seconds=END_SECONDS)
        return took

    def by_hand(self, *, first_copy: bool = False) -> float:
        """stop, rsync, start; with ``first_copy`` an rsync before the stop. Returns seconds in all.

        The container on the other host has been created before, as a careful person would.
        """
        self.away.docker_client().volumes.create(VOLUME)
        self.create(self.away)
        began = time.monotonic()
        if first_copy:
            self.rsync(TREE)
        self.home.run(["docker", "stop", CONTAINER])
        self.rsync(TREE)
        self.away.run(["docker", "start", CONTAINER])
        return self.handed_over(began)

    def commit_save_load(self) -> float:
        """``docker commit``, ``save``, ``load``, and the volume by tar: all while stopped. Returns seconds in all."""
        moved = "moved:latest"
        away, ssh = self.away, self.ssh_line()
        peer = f"root@{self.home.spec.address}"
        away.docker_client().volumes.create(VOLUME)
        began = time.monotonic()
        self.home.run(["docker", "stop", CONTAINER])
        self.home.run(["docker", "commit", CONTAINER, moved])
        piped(away, [*ssh, peer, "docker", "save", moved], ["docker", "load", "-q"])
        piped(away, [*ssh, peer, "tar", "-C", TREE, "-cf", "-", "."], ["tar", "-C", TREE, "-xpf", "-"])
        self.create(away, image=moved).start()
        took = self.handed_over(began)
        for host in self.hosts:
            with contextlib.suppress(Exception):
                host.docker_client().images.remove(moved, force=True)
        return took

    def handed_over(self, began: float) -> float:
        """The service answers on the other host: remove it here. Returns seconds since ``began`` until it did."""
        wait_until_answering(self.away.spec.address, PORT)
        took = time.monotonic() - began
        docker = self.home.docker_client()
        docker.containers.get(CONTAINER).remove(force=True)
        docker.volumes.get(VOLUME).remove(force=True)
        self.arrived()
        self.wait_listed()
        return took

    # --- the link ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def limited_link(self, megabits: int) -> Iterator[None]:
        """Every host's cable carries at most so much, in both directions, while this lasts."""
        inside = ["nsenter", "-t", str(self.lab._hub.pid), "-n", "tc", "qdisc"]
        names = [host.spec.name for host in self.hosts]
        try:
            for name in names:
                limit = ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
                command([*inside, "add", "dev", name, "root", "tbf", *limit])
            yield
        finally:
            for name in names:
                with contextlib.suppress(LabError):
                    command([*inside, "del", "dev", name, "root"])

    @contextlib.contextmanager
    def distant(self, milliseconds: float) -> Iterator[None]:
        """The first host is so far away from everything else, there and back, while this lasts. Raises LabError."""
        inside = ["nsenter", "-t", str(self.lab._hub.pid), "-n"]
        ip = [*inside, "ip", "link"]
        port, near, far = self.hosts[0].spec.name, "near0", "far0"
        forward = [*inside, sys.executable, "-I", str(FORWARDER), port, near, str(milliseconds / 2)]
        carrier: subprocess.Popen[bytes] | None = None
        try:
            command([*ip, "add", near, "type", "veth", "peer", "name", far])
            for end in (near, far):
                command([*ip, "set", end, "up"])
            carrier = subprocess.Popen(forward, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            assert carrier.stdout is not None
            if carrier.stdout.readline().strip() != b"ready":
                raise LabError("the process that is to make distance did not start")
            command([*ip, "set", port, "nomaster"])
            command([*ip, "set", far, "master", BRIDGE])
            yield
        finally:
            if carrier is not None:
                carrier.kill()
                carrier.wait()
            for line in (["del", near], ["set", port, "master", BRIDGE]):
                with contextlib.suppress(LabError):
                    command([*ip, *line])

    def sent_bytes(self, host: Host) -> int:
        """What the host has sent on its cable so far."""
        line = ["nsenter", "-t", str(host.pid), "-n", "ip", "-s", "-json", "link", "show", "dev", "eth0"]
        return int(json.loads(command(line))[0]["stats64"]["tx"]["bytes"])

    # --- logs ----------------------------------------------------------------------------------

    def log_lines(self, migration: str) -> list[dict[str, Any]]:
        """What the agents' logs say of a migration, by time."""
        found = []
        for host in self.hosts:
            for line in host.hostd.log.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry.get("migration") == migration:
                        found.append(entry)
        return sorted(found, key=lambda entry: str(entry["timestamp"]))


def piped(host: Host, first: list[str], second: list[str]) -> None:
    """``first | second`` on the host."""
    left = host.popen(first, stdout=subprocess.PIPE)
    right = host.popen(second, stdin=left.stdout, stdout=subprocess.DEVNULL)
    assert left.stdout is not None
    left.stdout.close()
    for process, line in ((right, second), (left, first)):
        if process.wait(END_SECONDS) != 0:
            raise LabError(f"{line[0]} failed on {host.spec.name}")


def write_load(place: Path, load: Load) -> None:
    """``load`` in ``place``, in directories of their own."""
    each = load.bytes // load.files
    block = random.Random(load.files).randbytes(min(max(each, 1), 1 << 20))
    for number in range(min(DIRECTORIES, load.files)):
        (place / f"{number:02d}").mkdir(parents=True, exist_ok=True)
    for number in range(load.files):
        with (place / f"{number % DIRECTORIES:02d}" / f"{number:06d}").open("wb") as file:
            file.write(number.to_bytes(8, "little")[:each])
            for start in range(min(8, each), each, len(block)):
                file.write(block[: each - start])
    os.sync()


def clock(text: str) -> float:
    """A time of an event or a log line, in seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


def moment(events: list[Event], kind: str) -> float:
    """When the newest event of that type was made."""
    return clock([event for event in events if event.type == kind][-1].at)
