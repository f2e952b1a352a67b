"""Two Docker hosts with the whole product on them, and what tests do with it: ask, watch, look, clean up.

Stands between the lab (``scripts/labkit``) and the end-to-end tests. It speaks to the product only as a person
does: through etcd keys and ``cargoctl``; and looks at the hosts only from outside: Docker, mounts, processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import docker
import docker.errors
import docker.models.containers
import docker.types

from coordinator import lifecycle
from events import schema
from events.connecting import connect
from events.schema import TERMINAL_PHASES, Event
from events.settings import EtcdSettings, TrustSettings
from hostd import source, target
from hostd.manifest import Difference, Entry, compare, read_manifest
from labkit import Lab, Process
from labkit.images import share
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until
from tests.support.oracle import LABEL, Oracle

Container = docker.models.containers.Container

VOLUMES = "/var/lib/docker/volumes"
EVENT_SECONDS = 45.0
END_SECONDS = 60.0
INBOX_SECONDS = 10.0
TOOLS = ("sshfs", "rsync", "ganesha.nfsd")
STRAIGHT = (
    "requested",
    "prepare_ordered",
    "source_prepared",
    "target_prepared",
    "brace_ordered",
    "target_braced",
    "cutover_ordered",
    "source_stopped",
    "target_claimed",
    "target_started",
    "fill_finished",
    "verified",
    "release_ordered",
    "source_released",
    "completed",
)
"""A migration without incident, but for the rounds and ``source_digested``, which has no fixed place."""

ON_A_UNION: Mapping[str, Any] = {"bwlimit_kib": 10_000_000}
"""Asked for with this, a container starts on a union also when little is stale: a limit, if only one that is never reached, has the
target ask nothing of the view of the source in the stop window."""

_DUMP = """if 1:
    import sys
    from pathlib import Path
    from hostd.layer import layer_entry
    from hostd.manifest import walk, write_manifest
    for number, tree in enumerate(sys.argv[2:]):
        found = walk(Path(tree), digest=True)
        if tree.endswith(("/diff", "/fs")):
            found = map(layer_entry, found)
        write_manifest(Path(sys.argv[1]) / str(number), found)
"""


class Fleet:
    """One test's view of the lab. ``alpha`` and ``beta`` are the hosts, ``store`` is the bus."""

    def __init__(self, lab: Lab, images: Mapping[str, str]) -> None:
        self.lab = lab
        self.images = images
        self.alpha, self.beta = lab.host("alpha"), lab.host("beta")
        endpoints = tuple(lab.etcd.endpoints.split(","))
        self.store = connect(EtcdSettings(endpoints))
        if lab.spec.secure:
            ca, own = lab.spec.fleet_directory / "ca.crt", lab.spec.fleet_directory / "operator"
            settings = EtcdSettings(endpoints, ca=ca, cert=own.with_suffix(".crt"), key=own.with_suffix(".key"))
            self.store = connect(settings, trust=TrustSettings(ca=ca))
        self.keys = self.store.keys
        self.docker = {host.spec.name: host.docker_client() for host in lab.hosts}
        self.oracle = Oracle(lab.hosts)
        self.spoilt = False
        """The test failed: what it left may not be seen from here."""
        self._migrations: list[str] = []
        self._closing: list[Callable[[], None]] = []

    # --- containers ------------------------------------------------------------------------------

    def run(self, name: str, *, host: str = "alpha", image: str = "busybox", **options: Any) -> Container:
        """Start a container under the oracle's eyes. Returns once the fleet knows of it."""
        options["labels"] = {LABEL: name, **options.get("labels", {})}
        made: Container = self.docker[host].containers.run(self.images[image], name=name, detach=True, **options)
        self.wait_listed(host, name)
        return made

    def sleeper(self, name: str, *, host: str = "alpha", **options: Any) -> Container:
        """A container that does nothing and stops at once."""
        return self.run(name, host=host, command=["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"], **options)

    def wait_listed(self, host: str, name: str, **facts: Any) -> None:
        """Until the inventory lists the container, running, and with these fields."""

        def listed() -> bool:
            found = self.store.get(self.keys.inventory_item(host, name))
            record = json.loads(found.value) if found else {}
            return bool(record.get("running")) and all(record.get(key) == value for key, value in facts.items())

        wait_until(listed, f"{host} does not list {name}", 15)

    def container(self, host: str, name: str) -> Container | None:
        """A fresh look at a container by name; None when there is none."""
        try:
            return self.docker[host].containers.get(name)
        except docker.errors.NotFound:
            return None

    def present(self, host: str, name: str) -> Container:
        """As ``container``, which must be there."""
        found = self.container(host, name)
        assert found is not None, f"there is no container {name} on {host}"
        return found

    def running(self, host: str, name: str) -> bool:
        """Whether a container of that name runs there."""
        found = self.container(host, name)
        return found is not None and found.status == "running"

    def listed_as_running(self, host: str, name: str) -> bool:
        """As ``running``, by Docker's list: it answers also while the container waits at its gate, where a look at it alone does not."""
        found = self.docker[host].api.containers(filters={"name": f"^/{name}$", "status": "running"})
        return bool(found)

    def wait_running(self, host: str, name: str, timeout_seconds: float = 20) -> None:
        """Until it runs there."""
        wait_until(lambda: self.running(host, name), f"{name} does not run on {host}", timeout_seconds)

    def execute(self, host: str, name: str, script: str) -> str:
        """What a shell in the container says. Fails when the script does."""
        code, output = self.present(host, name).exec_run(["sh", "-ec", script])
        assert code == 0, output.decode(errors="replace")
        return str(output.decode(errors="replace"))

    def policy(self, host: str, name: str) -> str:
        """The restart policy's name."""
        return str(self.present(host, name).attrs["HostConfig"]["RestartPolicy"]["Name"] or "no")

    def wait_policy(self, host: str, name: str, policy: str) -> None:
        """Until the container has it: an agent returns it right after the event, or in its next life."""
        wait_until(lambda: self.policy(host, name) == policy, f"the policy of {name} does not come back", 20)

    def registry(self, host: str) -> str:
        """Run an image registry on the host until the test ends; returns its address, for names of images."""
        where, port = self.lab.host(host), 5000
        configuration = where.path("/tmp/registry.yml")
        lines = ("version: 0.1", "storage: {filesystem: {rootdirectory: /tmp/registry}}", f"http: {{addr: ':{port}'}}")
        configuration.write_text("\n".join(lines) + "\n")

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection((where.spec.address, port), timeout=1):
                return True
            return False

        line = ["docker-registry", "serve", "/tmp/registry.yml"]
        daemon = where.spawn("registry", line, ready=answers)
        self.at_end(lambda: where.run(["rm", "-rf", "/tmp/registry", "/tmp/registry.yml"]) and None)
        self.at_end(daemon.kill)
        return f"{where.spec.address}:{port}"

    # --- data --------------------------------------------------------------------------------------

    def volume_path(self, host: str, volume: str, inside: str = "") -> Path:
        """Where a volume's data lies, as seen from outside (mounts of the host do not show)."""
        return self.lab.host(host).path(f"{VOLUMES}/{volume}/_data") / inside

    def volume(self, host: str, name: str) -> Path:
        """Create a volume; returns where its data lies."""
        self.docker[host].volumes.create(name)
        return self.volume_path(host, name)

    def has_volume(self, host: str, name: str) -> bool:
        """Whether there is a volume of that name."""
        return any(known.name == name for known in self.docker[host].volumes.list())

    def describe(self, host: str, *trees: str, timeout_seconds: float = 120) -> list[list[Entry]]:
        """Complete descriptions of ``trees`` as seen on the host, digests of contents included."""
        where = self.lab.host(host)
        directory = f"/tmp/trees-{os.getpid()}-{time.monotonic_ns()}"
        outside = where.path(directory)
        outside.mkdir()
        try:
            line = [where.python, "-c", _DUMP, directory, *trees]
            where.run(line, env={"PYTHONPATH": where.python_path}, timeout_seconds=timeout_seconds)
            return [list(read_manifest(outside / str(number))) for number in range(len(trees))]
        finally:
            shutil.rmtree(outside)

    def describe_seen(
        self, host: str, name: str, *destinations: str, timeout_seconds: float = 120
    ) -> list[list[Entry]]:
        """The same, of what the running container sees there: through its own mounts."""
        pid = self.present(host, name).attrs["State"]["Pid"]
        trees = [f"/proc/{pid}/root{destination}" for destination in destinations]
        return self.describe(host, *trees, timeout_seconds=timeout_seconds)

    def forget_network(self, name: str) -> None:
        """In the end, remove whatever has this name on any host, whoever is still in it."""

        def forget() -> None:
            for client in self.docker.values():
                for known in client.networks.list(names=[name]):
                    known.reload()
                    for container in known.containers:
                        known.disconnect(container, force=True)
                    known.remove()

        self.at_end(forget)

    # --- asking -------------------------------------------------------------------------------------

    def etcdctl(self, *arguments: str, given: bytes | None = None) -> str:
        """etcdctl, as a person uses it."""
        environment = {**os.environ, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": self.lab.etcd.endpoints}
        if self.lab.spec.secure:
            files = self.lab.spec.fleet_directory
            environment |= {
                "ETCDCTL_CACERT": f"{files}/ca.crt",
                "ETCDCTL_CERT": f"{files}/operator.crt",
                "ETCDCTL_KEY": f"{files}/operator.key",
            }
        line = ["etcdctl", *arguments]
        done = subprocess.run(line, input=given, capture_output=True, env=environment, check=True, timeout=30)
        return done.stdout.decode(errors="replace")

    def put_request(self, migration: str, value: str | bytes) -> None:
        """Put a request's key with etcdctl; the value goes by standard input, so it may hold any byte."""
        raw = value.encode() if isinstance(value, str) else value
        empty = [] if raw else [""]
        self.etcdctl("put", "--", self.keys.requests + migration, *empty, given=raw)

    def request(self, migration: str, container: str, source: str = "alpha", target: str = "beta", **more: Any) -> None:
        """Ask for a migration, once both hosts are known. A history stays, so each test needs names of its own."""
        assert self.store.head(migration) is None, f"{migration} is the name of an earlier migration in this lab"
        self._migrations.append(migration)
        hosts = [self.keys.host(host) for host in (source, target)]
        wait_until(lambda: all(map(self.store.get, hosts)), f"{source} or {target} is not known", 20)
        self.put_request(migration, json.dumps({"container": container, "source": source, "target": target, **more}))

    def adopt(self, migration: str) -> None:
        """Clean up after this migration too, which was asked for by other means."""
        self._migrations.append(migration)

    def control(self, migration: str, wish: str | bytes | Mapping[str, Any]) -> None:
        """Put a control; returns once the coordinator has taken it."""
        key = self.keys.controls + migration
        raw = wish if isinstance(wish, bytes) else (wish if isinstance(wish, str) else json.dumps(wish)).encode()
        self.etcdctl("put", key, given=raw)
        wait_until(lambda: self.store.get(key) is None, f"nobody took the control {wish!r}", 20)

    def failpoints(self, process: str, text: str) -> None:
        """Set the faults of ``hostd/<host>`` by key; returns once its agent has taken them.

        Agents follow faults and orders by different watches, between which no order is promised.
        """
        key = self.keys.failpoints(process)
        log = f"{process.rpartition('/')[2]}.hostd"
        since = self.log_size(log)
        if not text:
            self.store.delete(key)
            return
        self.etcdctl("put", key, given=text.encode())
        self.wait_step(log, f'"failpoints": {json.dumps(text[:200])}', since)

    def cargoctl(self, *arguments: str, timeout_seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """cargoctl, as a person uses it."""
        config = ["-c", str(self.lab.spec.operator_config)] if self.lab.spec.secure else []
        line = [sys.executable, "-m", "coordinator.cargoctl", *config, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CARGO_ETCD": self.lab.etcd.endpoints}
        with tempfile.TemporaryDirectory() as empty:
            return subprocess.run(
                line, capture_output=True, text=True, env=environment, cwd=empty, timeout=timeout_seconds, check=False
            )

    # --- watching ------------------------------------------------------------------------------------

    def events(self, migration: str) -> list[Event]:
        """The history so far."""
        return self.store.read(migration)

    def types(self, migration: str) -> list[str]:
        """The types of the history's events."""
        return [event.type for event in self.events(migration)]

    def wait_for(self, migration: str, *types: str, timeout_seconds: float = EVENT_SECONDS) -> Event:
        """The first event of one of these types; fails early when the migration ends without."""
        events: list[Event] = []
        deadline = time.monotonic() + timeout_seconds
        with self.store.follow(self.keys.migration(migration), tick_seconds=0.5) as follower:
            for _ in follower:
                events += self.store.read(migration, after=events[-1] if events else None)
                for event in events:
                    if event.type in types:
                        return event
                assert not (events and events[-1].type in TERMINAL_PHASES - {"completed"}), told(events)
                assert time.monotonic() < deadline, f"{migration} waits for {types}:\n{told(events)}"
        raise AssertionError("the follower ended")

    def wait_end(self, migration: str, end: str, timeout_seconds: float = END_SECONDS) -> list[Event]:
        """The whole history once it ended with ``end``. Fails when it ends otherwise."""
        self.wait_for(migration, end, timeout_seconds=timeout_seconds)
        return self.events(migration)

    def migrate(self, migration: str, container: str, **more: Any) -> list[Event]:
        """Ask for a migration and wait until it is completed."""
        self.request(migration, container, **more)
        return self.wait_end(migration, "completed")

    def wait_step(self, process: str, text: str, since: int, timeout_seconds: float = 20) -> None:
        """Until the log of ``alpha.hostd``, ``beta.hostd`` or ``coordinator`` says ``text`` after byte ``since``."""
        log = self.lab.spec.logs / f"{process}.log"
        wait_until(lambda: text.encode() in log.read_bytes()[since:], f"{process} never said {text}", timeout_seconds)

    def log_size(self, process: str) -> int:
        """Where the log of a daemon ends now."""
        log = self.lab.spec.logs / f"{process}.log"
        return log.stat().st_size if log.exists() else 0

    # --- looking ------------------------------------------------------------------------------------

    def gates(self, host: str) -> list[str]:
        """The containers that have a gate on the host."""
        return sorted(path.name for path in (self.lab.host(host).directory / "run/cargo/gates").glob("*"))

    def at_gate(self, host: str) -> list[str]:
        """Those of them whose start has come to it, and waits."""
        return sorted(
            path.parent.name for path in (self.lab.host(host).directory / "run/cargo/gates").glob("*/waiting")
        )

    def mounts(self, host: str) -> list[str]:
        """Mounts of the product in the host's namespace, as ``point (kind)``."""
        where = self.lab.host(host)
        found = []
        for line in Path(f"/proc/{where.pid}/mountinfo").read_text(errors="surrogateescape").splitlines():
            left, _, right = line.partition(" - ")
            point, kind, origin = left.split(" ")[4], right.split(" ")[0], right.split(" ")[1]
            if "cargo-union" in origin or kind in ("fuse.sshfs", "fuse.cargo", "nfs4") or "/.cargo-" in point:
                found.append(f"{point} ({kind})")
        return found

    def tools(self, host: str) -> list[str]:
        """Command lines of the product's helpers that run on the host."""
        where = self.lab.host(host)
        namespace = os.readlink(f"/proc/{where.pid}/ns/pid")
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(place / "ns" / "pid") == namespace:
                    words = (place / "cmdline").read_bytes().split(b"\0")
                    if os.path.basename(words[0]).decode(errors="replace") in TOOLS or b"hostd.lower" in words:
                        found.append(b" ".join(words).decode(errors="replace").strip())
        return found

    def stages(self, host: str) -> list[str]:
        """Stage directories on the host: beside volumes, in Docker's data root, and in /srv where the tests' binds are."""
        where = self.lab.host(host)
        volumes, binds = where.path(VOLUMES), where.path("/srv")
        found = [*volumes.glob("*/cargo"), *volumes.glob("*/.cargo-*"), *binds.rglob(".cargo-*")]
        found += [*volumes.parent.glob("cargo"), *volumes.parent.glob("containerd/daemon/cargo")]
        found += where.path("/var/lib/containerd").glob("cargo")
        return sorted(str(place.relative_to(where.directory)) for place in found)

    def records(self, host: str, migration: str) -> bool:
        """Whether the agent keeps files of the migration."""
        return self.lab.host(host).path(f"/var/lib/cargo/migrations/{migration}").exists()

    def grants(self, host: str, migration: str = "*") -> list[str]:
        """What other hosts may ask of this one by SSH, as ``<peer>/<migration>``."""
        place = self.lab.host(host).path("/var/lib/cargo/gate/grants")
        return sorted(f"{file.parent.name}/{file.stem}" for file in place.glob(f"*/{migration}.grant"))

    def assert_clean(self, host: str, migration: str) -> None:
        """Nothing of the migration is on the host: containers, mounts, processes, directories."""
        label = f"cargo.migration={migration}"
        containers = self.docker[host].containers.list(all=True, filters={"label": label})
        volumes = self.docker[host].volumes.list(filters={"label": label})
        networks = self.docker[host].networks.list(filters={"label": label})
        left = {
            "containers": [container.name for container in containers],
            "volumes": [volume.name for volume in volumes],
            "networks": [network.name for network in networks],
            "mounts": self.mounts(host),
            "processes": self.tools(host),
            "stages": self.stages(host),
            "files": [migration] if self.records(host, migration) else [],
            "what peers may ask for": self.grants(host, migration),
        }
        assert not any(left.values()), f"{migration} left on {host}: {left}"

    def assert_sound(self, migration: str) -> list[Event]:
        """Every role can fold the history, which is chained and has one outcome; and nobody ran twice."""
        events = self.events(migration)
        lifecycle.fold(events)
        for plan in (source.PLAN, target.PLAN):
            plan.fold(events, plan.start())
        for earlier, later in itertools.pairwise(events):
            assert later.prev == earlier.digest
        types = [event.type for event in events]
        assert not {"target_claimed", "abort_ordered"} <= set(types), told(events)
        for once in ("requested", "source_stopped", "target_claimed", "target_started", "completed", "aborted"):
            assert types.count(once) <= 1, told(events)
        self.oracle.assert_one_runner()
        return events

    # --- cleaning up ----------------------------------------------------------------------------------

    def at_end(self, undo: Callable[[], None]) -> None:
        """Do that when the test ends, whatever happened, before anything else is cleaned up."""
        self._closing.append(undo)

    def close(self) -> None:
        """End every migration and remove every container and volume; fails when something is left over.

        Raises AssertionError or LabError; the caller then has to make a new lab.
        """
        try:
            for undo in reversed(self._closing):
                undo()
            died = [daemon.name for daemon in self._daemons() if not daemon.running]
            self._bring_up()
            assert not died, f"not running at the end, although the test did not leave them so: {died}"
            self._end_migrations()
            self._remove_all()
            self._assert_nothing_left()
            self.oracle.assert_one_runner()
        finally:
            self.oracle.close()
            for client in self.docker.values():
                client.close()
            self.store.close()

    def _daemons(self) -> list[Process]:
        agents = [host.hostd for host in self.lab.hosts if host.running]
        return [*self.lab.etcd.members, self.lab.coordinator, *agents]

    def _bring_up(self) -> None:
        """Whatever a test stopped, cut off or froze works again, without faults."""
        for host in self.lab.hosts:
            if host.cuts:
                host.heal()
            self.lab.etcd.start()
            self.failpoints(f"hostd/{host.spec.name}", "")
            if not host.running:
                host.boot()
            host.start_services()
        self.lab.start_agents()

    def _end_migrations(self) -> None:
        for migration in self._migrations:
            head = self.store.head(migration)
            if head is None or head.terminal:
                continue
            state = lifecycle.fold(self.events(migration))
            wish = {"control": "rollback", "discard_target_writes": True} if state.reversible else "abort"
            self.control(migration, wish)
            wait_until(lambda name=migration: self._ended(name), f"{migration} does not end", 40)

    def _ended(self, migration: str) -> bool:
        head = self.store.head(migration)
        return head is not None and head.terminal

    def _remove_all(self) -> None:
        """Containers first: the agent folds the union of one that is gone, and then volumes can go."""
        for client in self.docker.values():
            for container in client.containers.list(all=True, ignore_removed=True):
                container.remove(force=True)
        for migration in self._migrations:
            head = self.store.head(migration)
            if head is not None and head.phase in ("completed", "finalise"):
                self.wait_for(migration, "finalised", timeout_seconds=20)
        for client in self.docker.values():
            for volume in client.volumes.list():
                volume.remove(force=True)
        for host in self.lab.hosts:
            subprocess.run(["find", str(host.path("/srv")), "-mindepth", "1", "-delete"], check=True)

    def _assert_nothing_left(self) -> None:
        for host in self.lab.hosts:
            name = host.spec.name
            left = [*self.mounts(name), *self.tools(name), *self.stages(name)]
            assert not left, f"left on {name}: {left}"

    def wait_inbox_empty(self, migrations: Iterable[str]) -> None:
        """Until neither host has a pointer to any of these ended migrations."""
        wanted = [self.keys.inbox_pointer(host.spec.name, name) for host in self.lab.hosts for name in migrations]

        def gone() -> bool:
            return all(self.store.get(key) is None for key in wanted)

        wait_until(gone, "inbox pointers of ended migrations stay", INBOX_SECONDS)


def told(events: Sequence[Event]) -> str:
    """A history in words, for the message of a failing test."""
    lines = []
    for event in events:
        data = event.data
        more = f": {data.step}: {data.reason}" if isinstance(data, schema.StepFailed) else ""
        more = f": {'; '.join(data.reasons)}" if isinstance(data, schema.Rejected) else more
        lines.append(f"{event.seq} {event.by} {event.type}{more}")
    return "\n".join(lines) or "(no events)"


def differences(expected: Sequence[Entry], actual: Sequence[Entry], *, apart_from: Sequence[str] = ()) -> list[str]:
    """How two trees differ, in words. ``apart_from`` are kinds of difference that do not count."""
    found: Iterable[Difference] = compare(expected, actual)
    return [difference.words for difference in found if difference.what not in apart_from]


def without_state(inspected: Mapping[str, Any]) -> dict[str, Any]:
    """A container's ``docker inspect`` without what changes when it is stopped and started again."""
    kept = {key: value for key, value in inspected.items() if key not in ("State", "RestartCount")}
    network = dict(kept.get("NetworkSettings", {}))
    for changing in ("SandboxID", "SandboxKey", "EndpointID"):
        network.pop(changing, None)
    network["Networks"] = {
        name: {key: value for key, value in endpoint.items() if key not in ("EndpointID",)}
        for name, endpoint in network.get("Networks", {}).items()
    }
    return {**kept, "NetworkSettings": network}


def bring_up(lab: Lab) -> dict[str, str]:
    """The lab with its images on all hosts; returns the images' tags by name."""
    lab.up()
    return {name: share(name, lab.hosts) for name in ("busybox", "redis")}
