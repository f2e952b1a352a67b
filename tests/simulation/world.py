"""The world of the simulator: Docker hosts, containers, volumes, unions, links, a client that writes.

A small model with the properties that matter to the promises: what revives a container and what does not, what a
reboot takes away and what it leaves, what a running container sees, which bytes a crash may lose. It knows
nothing of events or machines. It must never mend what the product got wrong: the one thing it does by itself is
what a kernel, a Docker daemon or a client does by itself.

Contents are integers: every acknowledged write has a number of its own, so a lost or an old one shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

VOLUME = "data"
WORKLOAD = "web"
PATHS = ("a", "b", "c", "d", "e")
LAYER_PATHS = ("x", "y")
"""What the workload keeps outside of its volume, in the container's writable layer."""
IMAGE: dict[str, int] = {"y": 0}
"""What its image has beneath that layer, on every host."""
WHITEOUT = -1
"""In a layer, in the place of a number: the workload removed what the image has there."""

Tree = dict[str, Any]
"""Path → number of the write, or ``Remote`` for what lies on the other host."""


@dataclass(frozen=True)
class Remote:
    """A placeholder: the contents are what the source has under ``path``."""

    path: str


@dataclass
class Union:
    """What the target's mount stands on while contents are arriving."""

    upper: Tree = field(default_factory=dict)
    replica: dict[str, int] = field(default_factory=dict)
    placeholders: list[str] = field(default_factory=list)
    """The source's paths that were stale at the cut-over."""
    remote: bool = False
    merged: bool = False
    settled: bool = False

    def fill_list(self) -> list[str]:
        """Contents that are still needed and not here."""
        needed = {value.path for value in self.upper.values() if isinstance(value, Remote)}
        return [path for path in self.placeholders if path in needed and path not in self.replica]

    def unmount(self) -> None:
        """What a reboot does."""
        self.remote = self.merged = False


@dataclass
class Volume:
    """A named volume."""

    label: str = ""
    """The migration that made it."""
    files: Tree = field(default_factory=dict)
    union: Union | None = None
    changed: set[str] | None = None
    """What the container has changed since the mount was marked; None before that."""

    @property
    def federated(self) -> Union | None:
        """The union, while the data is not plain."""
        return self.union if self.union is not None and not self.union.settled else None


def root_of(layer: Tree) -> Tree:
    """What a container with this writable layer sees outside of its volume."""
    return {path: value for path, value in {**IMAGE, **layer}.items() if value != WHITEOUT}


@dataclass
class LayerStage:
    """Where the container's writable layer arrives on the target."""

    tree: Tree = field(default_factory=dict)
    placed_in: str = ""
    """Id of the container that it was put into."""


@dataclass
class Container:
    """One container of a host."""

    id: str
    name: str
    policy: str
    label: str = ""
    running: bool = False
    manually_stopped: bool = False
    exit_code: int = 0
    unnoticed: bool = False
    """Its processes have ended, and Docker still says that it runs."""
    ended_for: str = ""
    """The agent's life that saw it end so, and waits for Docker before it looks again."""
    sees: str = ""
    """``plain``, ``merged`` or ``bare`` (a place whose union is not mounted), fixed when it started."""
    layer: Tree = field(default_factory=dict)
    """What it wrote outside of its volume; goes when it is removed."""
    layer_changed: set[str] | None = None
    """What it has changed in there since the layer was put into it."""


@dataclass
class Tracker:
    """One process's watch over the source's volume, and over the container's writable layer."""

    generation: int = 0
    marks: set[str] = field(default_factory=set)
    before: set[str] | None = None
    before_trusted: bool = True
    trusted: bool = True


class Host:
    """One Docker host. ``files`` is its agent's durable directory, by migration."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.up = True
        self.docker = True
        self.boots = 1
        self.containers: dict[str, Container] = {}
        self.volumes: dict[str, Volume] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.layers: dict[str, LayerStage] = {}
        """Writable layers on their way to this host, by migration."""
        self.trackers: dict[str, Tracker] = {}
        """Of the agent's present life, by migration."""
        self.exports: set[str] = set()
        """Migrations whose trees an NFS server of this host shows to the target."""
        self.image = True
        """The container's image is here."""

    # --- Docker --------------------------------------------------------------------------------

    def find(self, label: str) -> Container | None:
        """The container that this migration made here."""
        return next((c for c in self.containers.values() if c.label == label), None)

    def named(self, name: str) -> Container | None:
        """The container of that name."""
        return next((c for c in self.containers.values() if c.name == name), None)

    def start(self, container: Container, who: str) -> None:
        """Start; what the container sees of its data is fixed now."""
        if container.running:
            return
        volume = self.volumes.get(VOLUME)
        union = volume.federated if volume is not None else None
        container.sees = "plain" if union is None else ("merged" if union.merged else "bare")
        container.running = True
        container.unnoticed = False
        container.manually_stopped = False
        self.world.started(self, container, who)

    def stop(self, container: Container, *, manually: bool = True, exit_code: int = 0) -> None:
        """Stop, or notice that it has stopped."""
        if container.running:
            container.running = False
            container.exit_code = exit_code
        if manually:
            container.manually_stopped = True

    def restart_docker(self) -> None:
        """Everything ends with the daemon; then the daemon starts what the policies say."""
        was = [c for c in self.containers.values() if c.running]
        for container in was:
            self.stop(container, manually=False, exit_code=137)
        for container in self.containers.values():
            container.unnoticed = False
            revive = container.policy == "always"
            revive |= container.policy == "unless-stopped" and not container.manually_stopped
            revive |= container.policy == "on-failure" and container in was
            if revive:
                self.start(container, "dockerd")

    def power_off(self) -> None:
        """Everything that is not on disk is gone."""
        self.up = False
        self.trackers.clear()
        self.exports.clear()
        for container in self.containers.values():
            if container.running:
                self.stop(container, manually=False, exit_code=137)
                container.exit_code = 137
                self.world.cut_short.add(container.id)
        for volume in self.volumes.values():
            if volume.union is not None:
                volume.union.unmount()

    def power_on(self) -> None:
        """Docker comes first, the agent later, as on a real host."""
        self.up = True
        self.docker = True
        self.boots += 1
        for container in self.containers.values():
            container.unnoticed = False
            revive = container.policy == "always"
            revive |= container.policy == "unless-stopped" and not container.manually_stopped
            revive |= container.policy == "on-failure" and container.id in self.world.cut_short
            self.world.cut_short.discard(container.id)
            if revive:
                self.start(container, "dockerd")


class World:
    """Both hosts, the links between them, and the client."""

    def __init__(self) -> None:
        self.hosts = {name: Host(name, self) for name in ("alpha", "beta")}
        self.link = True
        """Between the hosts: SSH, rsync, sshfs."""
        self.etcd = {"alpha": "up", "beta": "up", "c1": "up", "c2": "up"}
        """``up``, ``down`` or ``deaf`` (requests arrive, replies do not)."""
        self.truth: dict[str, int] = {}
        """What the client has been told is stored."""
        self.at_stop: dict[str, int] = {}
        self.or_all_kept: dict[str, int] | None = None
        """The source's tree when it stopped."""
        self.writes = 0
        self.cut_short: set[str] = set()
        self.excused = False
        """Somebody, or its own policy, has ended the workload for good."""
        self.removed = False
        """Somebody has removed the container."""
        self.started: Callable[[Host, Container, str], None] = lambda _host, _container, _who: None

    def running(self) -> list[tuple[Host, Container]]:
        """Every running copy of the workload."""
        found = []
        for host in self.hosts.values():
            for container in host.containers.values():
                if container.running:
                    found.append((host, container))
        return found

    def linked(self, one: str, other: str) -> bool:
        """Whether the data plane works between two hosts now."""
        return self.link and self.hosts[one].up and self.hosts[other].up

    def other(self, host: Host) -> Host:
        """The host at the other end."""
        return self.hosts["beta" if host.name == "alpha" else "alpha"]

    # --- what a container sees -----------------------------------------------------------------

    def visible(self, host: Host, container: Container | None = None) -> Tree:
        """The data under the container, read through whatever it stands on; None is a file that cannot be read."""
        root = root_of(container.layer) if container is not None else {}
        return {**self._visible_data(host, container), **root}

    def _visible_data(self, host: Host, container: Container | None) -> Tree:
        volume = host.volumes.get(VOLUME)
        if volume is None:
            return {}
        union = volume.federated
        if union is None:
            return volume.files
        if container is not None and container.sees != "merged":
            return volume.files
        return {
            path: self._contents(host, union, value) if isinstance(value, Remote) else value
            for path, value in union.upper.items()
        }

    def _contents(self, host: Host, union: Union, value: Any) -> Any:
        if not isinstance(value, Remote):
            return value
        if value.path in union.replica:
            return union.replica[value.path]
        if not union.remote:
            return None
        volume = self.other(host).volumes.get(VOLUME)
        return None if volume is None else volume.files.get(value.path)

    # --- the client ----------------------------------------------------------------------------

    def forget_layer(self) -> None:
        """A person removed the container on the target: what it wrote outside of its volume there is gone with it."""
        kept = {path: value for path, value in self.at_stop.items() if path in LAYER_PATHS}
        self.truth = {path: value for path, value in self.truth.items() if path not in LAYER_PATHS} | kept

    def write(self, kind: str, path: str, other_path: str) -> str:
        """One request of the client to whichever copy answers; returns what was acknowledged, or nothing."""
        for host, container in self.running():
            volume = host.volumes.get(VOLUME)
            if volume is None:
                continue
            union = volume.federated
            tree = union.upper if union is not None and container.sees == "merged" else volume.files
            if path in LAYER_PATHS:
                tree = container.layer
            if kind == "rename" and (path in LAYER_PATHS) != (other_path in LAYER_PATHS):
                return ""
            if kind == "write":
                self.writes += 1
                tree[path] = self.truth[path] = self.writes
                touched = [path]
            elif path not in self.truth or path not in {**IMAGE, **tree} or path == other_path:
                return ""
            elif kind == "delete":
                _take_out(tree, path)
                del self.truth[path]
                touched = [path]
            else:
                tree[other_path] = _take_out(tree, path)
                self.truth[other_path] = self.truth.pop(path)
                touched = [path, other_path]
            changed = container.layer_changed if path in LAYER_PATHS else volume.changed
            if changed is not None:
                changed.update(touched)
            for tracker in host.trackers.values():
                tracker.marks.update(touched)
            return f"{kind} {' '.join(touched)} on {host.name}"
        return ""


def _take_out(tree: Tree, path: str) -> Any:
    """What a file system does for the one who removes or renames ``path``; returns what was there."""
    found = tree.pop(path, IMAGE.get(path))
    if path in IMAGE:
        tree[path] = WHITEOUT
    return found
