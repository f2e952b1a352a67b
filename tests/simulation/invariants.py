"""What must hold after every step of the simulation, checked from outside.

The checker sees the world and the raw keys of the store, and nothing that a process believes. Its rules about who
may do what and when are written here a second time on purpose: they must not be the product's own tables, or a
mistake there would be judged by itself. The names are those of FAULTS.md, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coordinator import lifecycle
from events.errors import CargoError
from events.following import Changes, Follower, Snapshot
from events.keyspace import key_bytes, key_text
from events.schema import EVENT_TYPES, GENESIS, Event, Requested, RollbackOrdered
from hostd import source, target
from hostd.plan import View
from tests.simulation.remembered import decode_event, decode_head
from tests.simulation.world import LAYER_PATHS, VOLUME, Container, Host, root_of

if TYPE_CHECKING:
    from tests.simulation.agents import Runner
    from tests.simulation.scheduler import Simulation


class ViolationError(Exception):
    """A promise is broken: ``rule`` names it."""

    def __init__(self, rule: str, words: str) -> None:
        super().__init__(f"{rule}: {words}")
        self.rule = rule


NEEDS: dict[str, tuple[str, ...]] = {
    "describe_container": ("prepare_ordered",),
    "track_changes": ("prepare_ordered",),
    "measure_mounts": ("prepare_ordered",),
    "connect_source": ("prepare_ordered",),
    "fetch_spec": ("source_prepared",),
    "check_target": ("source_prepared",),
    "provide_image": ("source_prepared",),
    "create_volumes": ("source_prepared",),
    "open_views": ("source_prepared",),
    "create_container": ("source_prepared",),
    "open_layer": ("source_prepared",),
    "create_networks": ("source_prepared",),
    "pack_image": ("image_wanted",),
    "arm_tracking": ("sync_ordered",),
    "pull_round": ("sync_armed",),
    "attach_remote": ("target_prepared",),
    "warm_container": ("brace_ordered",),
    "vouch_for_tracking": ("cutover_ordered",),
    "disarm_restart": ("cutover_ordered",),
    "stop_container": ("cutover_ordered",),
    "publish_dirty": ("cutover_ordered",),
    "apply_dirty": ("source_stopped",),
    "mount_union": ("source_stopped",),
    "start_container": ("target_claimed",),
    "supervise_container": ("target_started",),
    "fill_replica": ("target_claimed",),
    "digest_trees": ("target_started",),
    "digest_arrived": ("fill_finished",),
    "verify_trees": ("fill_finished", "source_digested"),
    "detach_remote": ("fill_finished", "source_digested"),
    "retire_container": ("verified", "release_ordered"),
    "guard_source": ("source_stopped",),
    "export_trees": ("prepare_ordered",),
    "recall_container": ("rollback_ordered",),
    "list_changes": ("rollback_ordered",),
    "fold_union": ("completed",),
    "return_policy": ("finalised",),
    "carry_back": ("rollback_ordered",),
    "revive_container": ("carried_back",),
}
"""The durable events without which an effect may not begin (P8)."""

BEFORE: dict[str, tuple[str, ...]] = {
    "source_prepared": ("prepare_ordered",),
    "target_prepared": ("source_prepared",),
    "sync_armed": ("sync_ordered",),
    "sync_finished": ("sync_armed",),
    "brace_ordered": ("target_prepared",),
    "target_braced": ("brace_ordered",),
    "cutover_ordered": ("target_braced",),
    "source_stopped": ("cutover_ordered",),
    "target_claimed": ("source_stopped",),
    "target_started": ("target_claimed",),
    "fill_finished": ("target_started",),
    "verified": ("fill_finished", "source_digested"),
    "release_ordered": ("verified",),
    "source_released": ("release_ordered",),
    "completed": ("source_released",),
    "finalise_ordered": ("completed",),
    "finalised": ("completed",),
    "aborted": ("source_restored", "target_cleaned"),
    "rollback_ordered": ("target_claimed",),
    "target_stopped": ("rollback_ordered",),
    "target_asserted_off": ("rollback_ordered",),
    "carried_back": ("rollback_ordered",),
    "rolled_back": ("carried_back", "source_restored"),
}
"""What must be in a history before an event may be."""

NEVER_AFTER: dict[str, tuple[str, ...]] = {
    "abort_ordered": ("target_claimed",),
    "target_claimed": ("abort_ordered",),
    "target_started": ("abort_ordered", "rollback_ordered"),
    "source_stopped": ("abort_ordered",),
    "release_ordered": ("rollback_ordered",),
    "completed": ("rollback_ordered",),
    "rollback_ordered": ("abort_ordered",),
}
"""What must not be in a history any more when an event comes."""

ONCE = frozenset(EVENT_TYPES) - {
    "sync_ordered", "sync_armed", "sync_finished", "step_failed", "step_recovered", "control_refused", "paused",
    "resumed", "brace_ordered", "target_braced", "cutover_ordered", "bwlimit_ordered",
}  # fmt: skip
TERMINAL = frozenset({"rejected", "completed", "finalised", "aborted", "rolled_back"})


@dataclass
class Record:
    """One migration's history, as the raw keys tell it."""

    events: list[Event] = field(default_factory=list)
    types: set[str] = field(default_factory=set)
    lifecycle: lifecycle.Lifecycle = field(default_factory=lifecycle.Lifecycle)
    source: View = field(default_factory=source.PLAN.start)
    target: View = field(default_factory=target.PLAN.start)
    frozen: dict[str, int] | None = None
    """The source's tree while nobody may touch it."""

    @property
    def container_id(self) -> str:
        data = self.events[0].data
        return data.container_id if isinstance(data, Requested) else ""

    @property
    def ended(self) -> bool:
        return self.lifecycle.state in TERMINAL

    def host(self, role: str) -> str:
        data = self.events[0].data
        assert isinstance(data, Requested)
        return data.request.source if role == "source" else data.request.target


class Watched:
    """What one follower has given, to be compared with what there was."""

    def __init__(self) -> None:
        self.since: dict[str, int] = {}
        self.seen: dict[str, set[int]] = {}

    def note(self, item: object) -> None:
        """An item came."""
        if isinstance(item, Snapshot):
            self.since[item.prefix] = item.revision
            self.seen[item.prefix] = set()
        elif isinstance(item, Changes):
            self.seen[item.prefix].add(item.revision)


class Checker:
    """Raises ViolationError."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.world = sim.world
        self.records: dict[str, Record] = {}
        self.uuids: set[str] = set()
        self._next = 0
        self.events = 0
        self.leader = 0
        """Revision at which the present leader's key was made; 0 while nobody leads."""
        self.world.started = self.started

    # --- the history ---------------------------------------------------------------------------

    def committed(self) -> None:
        """Look at every event that was appended since the last call."""
        log = self.sim.backend._log
        while self._next < len(log):
            revision, changes = log[self._next]
            self._next += 1
            for change in changes:
                if change.key == self.sim.backend.keys.leader:
                    gone = change.value is None
                    self.leader = 0 if gone else (self.leader or revision)
                    continue
                place = self.sim.backend.keys.parse(change.key)
                if place is not None and place.kind == "event":
                    if change.value is None:
                        raise ViolationError("P6", "an event was deleted")
                    self._event(place.parts[0], change.value)

    def compacted(self, kept: int) -> None:
        """The store is compacted, ``kept`` revisions before the newest."""
        self.committed()
        backend = self.sim.backend
        before = len(backend._log)
        self.sim.say("etcd", "forgets what lies before revision %s", backend._revision - kept)
        backend.compact(max(backend._revision - kept, 0))
        self._next -= before - len(backend._log)

    def _event(self, migration: str, raw: bytes) -> None:
        record = self.records.setdefault(migration, Record())
        event = decode_event(raw)
        self.sim.say(event.by, "► %s %s: %s", migration, event.seq, event.type)
        self._well_formed(migration, record, event)
        self._legal(migration, record, event)
        record.events.append(event)
        self.events += 1
        record.types.add(event.type)
        try:
            record.lifecycle = lifecycle.apply(record.lifecycle, event)
            record.source = source.PLAN.apply(record.source, event)
            record.target = target.PLAN.apply(record.target, event)
        except CargoError as error:
            raise ViolationError("P6", f"{migration}: {error}") from error
        stored = self.sim.backend._newest(key_bytes(self.sim.backend.keys.head(migration)))
        head = decode_head(stored.value if stored is not None and stored.value is not None else b"")
        if head.seq == event.seq and (head.digest, head.phase) != (event.digest, record.lifecycle.state):
            raise ViolationError("P5", f"{migration}: the head says {head.phase}, the fold {record.lifecycle.state}")
        self._data(record, event)
        self.sim.moment(event.type)

    def _well_formed(self, migration: str, record: Record, event: Event) -> None:
        last = record.events[-1] if record.events else None
        if event.seq != len(record.events) + 1 or event.prev != (last.digest if last else GENESIS):
            raise ViolationError("P6", f"{migration}: event {event.seq} does not continue the history")
        if event.uuid in self.uuids:
            raise ViolationError("P6", f"{migration}: the uuid of event {event.seq} was there before")
        self.uuids.add(event.uuid)
        if event.type in ONCE and event.type in record.types:
            raise ViolationError("P6", f"{migration}: a second {event.type}")
        if not 0 <= event.cause < event.seq:
            raise ViolationError("P6", f"{migration}: event {event.seq} answers event {event.cause}")
        roles = EVENT_TYPES[event.type].authors
        allowed = event.by.startswith("coordinator/") and "coordinator" in roles
        if record.events and isinstance(record.events[0].data, Requested):
            allowed |= any(event.by == f"hostd/{record.host(role)}" for role in roles if role != "coordinator")
        if not allowed:
            raise ViolationError("P6", f"{migration}: {event.type} may not be written by {event.by}")

    def _legal(self, migration: str, record: Record, event: Event) -> None:
        missing = [name for name in BEFORE.get(event.type, ()) if name not in record.types]
        if missing:
            raise ViolationError("P6", f"{migration}: {event.type} without {', '.join(missing)}")
        before = [name for name in NEVER_AFTER.get(event.type, ()) if name in record.types]
        if before:
            raise ViolationError("P6", f"{migration}: {event.type} after {', '.join(before)}")
        if event.type == "carried_back" and not record.types & {"target_stopped", "target_asserted_off"}:
            raise ViolationError("P12", f"{migration}: carried_back although the target may still run")
        if event.by.startswith("coordinator/") and self.leader != event.epoch:
            raise ViolationError("P9", f"{migration}: {event.type} of epoch {event.epoch}, which does not lead")
        if isinstance(event.data, Requested):
            rivals = [
                other
                for other, known in self.records.items()
                if known.events and not known.ended and known.container_id == event.data.container_id
            ]
            if rivals:
                raise ViolationError("P16", f"{migration} moves a container that {rivals[0]} is moving")

    def _data(self, record: Record, event: Event) -> None:
        """What the events say about whose copy counts."""
        if event.type == "source_stopped":
            files = self._at_source(record)
            if files != self.world.truth:
                raise ViolationError("P2", f"the stopped source has {files}, the client was told {self.world.truth}")
            record.frozen = files
            self.world.at_stop = dict(files)
        elif event.type in ("abort_ordered", "release_ordered", "target_stopped", "target_asserted_off"):
            record.frozen = None
        if event.type == "verified":
            volume = self.world.hosts[record.host("target")].volumes.get(VOLUME)
            if volume is not None and volume.union is not None and volume.union.remote:
                raise ViolationError(
                    "P11", "it counts as verified, and the source's tree is still mounted on the target"
                )
        given_up = event.type == "target_asserted_off"
        if event.type == "target_stopped":
            order = next(e.data for e in record.events if isinstance(e.data, RollbackOrdered))
            given_up = order.discard_target_writes
        if given_up:
            # What was already pulled aside from a target that then died is kept rather than lost; all of it or nothing.
            self.world.or_all_kept = dict(self.world.truth) if event.type == "target_asserted_off" else None
            self.world.truth = dict(self.world.at_stop)

    # --- the world -----------------------------------------------------------------------------

    def step(self, *, world_touched: bool = True) -> None:
        """After every step of the simulation.

        P1 to P3 can only have changed when something was done on a host, or was appended.
        """
        world = self.world
        if self._next < len(self.sim.backend._log):
            self.committed()
        elif not world_touched:
            return
        running = world.running()
        if running:
            if len(running) > 1:
                where = ", ".join(f"{container.name} on {host.name}" for host, container in running)
                raise ViolationError("P1", f"two copies run: {where}")
            host, container = running[0]
            seen = world.visible(host, container)
            if world.or_all_kept is not None:
                if seen == world.or_all_kept:
                    world.truth = dict(seen)
                world.or_all_kept = None
            if seen != world.truth:
                raise ViolationError("P2", f"on {host.name} the container sees {seen}, acknowledged is {world.truth}")
        for migration, record in self.records.items():
            if record.frozen is not None and self._at_source(record) != record.frozen:
                raise ViolationError("P3", f"{migration}: the source's data was touched while it is frozen")

    def _at_source(self, record: Record) -> dict[str, Any]:
        """All data of the container on its source, plain as it lies there."""
        host = self.world.hosts[record.host("source")]
        volume, container = host.volumes.get(VOLUME), host.containers.get(record.container_id)
        root = root_of(container.layer) if container is not None else {}
        return {**(volume.files if volume is not None else {}), **root}

    def effect_begins(self, host: Host, migration: str, name: str, undo: bool) -> None:
        """P8: is there a durable event that allows this?"""
        self.committed()
        self.sim.moment(f"undo {name}" if undo else name)
        types = self.records[migration].types
        if undo:
            if "abort_ordered" not in types and not {"rollback_ordered", "source_restored"} <= types:
                raise ViolationError("P8", f"{host.name} undoes {name} of {migration} without an order")
            return
        missing = [event for event in NEEDS.get(name, ("requested",)) if event not in types]
        if missing:
            raise ViolationError("P8", f"{host.name} performs {name} of {migration} without {', '.join(missing)}")

    def started(self, host: Host, container: Container, who: str) -> None:
        """A container starts: may it?"""
        self.sim.say(who, "starts %s on %s", container.name, host.name)
        self.committed()
        if container.label:
            types = self.records[container.label].types
            if "target_claimed" not in types:
                raise ViolationError("P1", f"{host.name} runs the container before target_claimed")
            if types & {"target_stopped", "target_asserted_off"}:
                raise ViolationError("P1", f"{host.name} runs the container after it was given back")
            if who == "dockerd" and container.sees != "plain":
                raise ViolationError("P10", f"Docker revived the container on {host.name} without its union")
            return
        for record in self.records.values():
            if record.container_id != container.id or record.lifecycle.state == "rejected":
                continue
            stopped = "source_stopped" in record.types
            if stopped and not record.types & {"abort_ordered", "carried_back"}:
                rule = "P10" if who == "dockerd" else "P1"
                raise ViolationError(rule, f"{who} starts the source's container after source_stopped")

    # --- the end -------------------------------------------------------------------------------

    def watched(self, name: str, watched: Watched, follower: Follower) -> None:
        """E13: a watch gives every revision, once the follower has nothing more to give."""
        if follower.closed or self.sim.world.etcd[name.rpartition("/")[2]] != "up":
            return
        log = self.sim.backend._log
        for prefix, since in watched.since.items():
            for revision, changes in log:
                unseen = revision > since and revision not in watched.seen[prefix]
                if unseen and any(change.key.startswith(prefix) for change in changes):
                    raise ViolationError("E13", f"the watch of {name} on {prefix} never gave revision {revision}")

    def final(self) -> None:
        """All faults have stopped, everything has come to rest."""
        for migration, record in self.records.items():
            self._replay(migration, record)
            state, sentence = record.lifecycle.state, lifecycle.decide(record.lifecycle).sentence
            if state not in TERMINAL:
                if record.lifecycle.paused and "resume" in sentence:
                    continue
                failing = [failed.reason for _, failed in record.lifecycle.failures]
                if self.world.removed and any("by hand" in reason for reason in failing):
                    continue  # a person removed the container, and is told what to do
                raise ViolationError("P13", f"{migration} never ends: {state}; {sentence} {failing}")
            if state in ("aborted", "rolled_back"):
                self._back_home(migration, record)
            elif state != "rejected":
                self._moved(migration, record)

    def _replay(self, migration: str, record: Record) -> None:
        """P5: what is stored folds to what every process made of it as it came."""
        keys = self.sim.backend.keys
        prefix = keys.events(migration)
        stored = [
            decode_event(versions[-1].value or b"")
            for key, versions in sorted(self.sim.backend._versions.items())
            if key_text(key).startswith(prefix)
        ]
        if lifecycle.fold(stored) != record.lifecycle:
            raise ViolationError("P5", f"{migration}: the coordinator's fold differs on replay")
        for plan, view in ((source.PLAN, record.source), (target.PLAN, record.target)):
            if plan.fold(stored) != view:
                raise ViolationError("P5", f"{migration}: the {plan.role}'s fold differs on replay")
        for agent in self.sim.agents:
            runner = agent.runners.get(migration) if agent.alive else None
            if runner is not None:
                self.forgotten(migration, agent.name, runner)

    def forgotten(self, migration: str, name: str, runner: Runner) -> None:
        """P5: what an agent knows of a history, now that it lets go of it."""
        record = self.records[migration]
        expected = record.source if runner.turns.plan.role == "source" else record.target
        if runner.turns.view.seq == len(record.events) and runner.turns.view != expected:
            raise ViolationError("P5", f"{migration}: {name} knows another state than the history gives")

    def _back_home(self, migration: str, record: Record) -> None:
        self._nothing_exported(migration)
        host = self.world.hosts[record.host("source")]
        container = host.containers.get(record.container_id)
        self._no_leftovers(migration, self.world.hosts[record.host("target")])
        if record is not self._last(record.container_id):
            return  # a later migration has moved it since
        if self._released_before(record):
            return  # admitted by what the agent had told of it before an earlier migration took it away
        if container is None:
            if not self.world.excused:
                raise ViolationError("P11", f"{migration}: the container is gone from {host.name}")
            return
        if container.policy != self.sim.policy or container.name != "web":
            raise ViolationError("P11", f"{migration}: {container.name} has the policy {container.policy} now")
        files = self._at_source(record)
        truth = self.world.truth
        if self.world.removed:  # with the container on the target went what it had written outside of its volume
            files, truth = _of_volume(files), _of_volume(truth)
        if files != truth:
            raise ViolationError("P2", f"{migration}: {host.name} has {files}, acknowledged was {self.world.truth}")
        if not container.running and not self.world.excused:
            raise ViolationError("P11", f"{migration}: the container ran on {host.name} and does not run again")

    def _no_leftovers(self, migration: str, host: Host) -> None:
        left = [f"the container {c.name}" for c in host.containers.values() if c.label == migration]
        left += [f"the volume {name}" for name, volume in host.volumes.items() if volume.label == migration]
        left += ["a layer's stage"] if migration in host.layers else []
        left += ["files of the agent"] if migration in host.files else []
        left += ["an NFS server"] if migration in host.exports else []
        if left:
            raise ViolationError("P11", f"{migration} left on {host.name}: {', '.join(left)}")

    def _nothing_exported(self, migration: str) -> None:
        if any(migration in host.exports for host in self.world.hosts.values()):
            raise ViolationError("P11", f"{migration} has ended, and its tree is still served by NFS")

    def _moved(self, migration: str, record: Record) -> None:
        self._nothing_exported(migration)
        host = self.world.hosts[record.host("target")]
        volume, container = host.volumes.get(VOLUME), host.find(migration)
        seen = {} if volume is None else self.world.visible(host, None)
        if volume is not None and volume.federated is not None and volume.federated.fill_list():
            raise ViolationError("P4", f"{migration} is {record.lifecycle.state}, but contents still lie on the source")
        if volume is not None and volume.federated is not None:
            seen = {
                path: self.world._contents(host, volume.federated, value)
                for path, value in volume.federated.upper.items()
            }
        truth = self.world.truth
        if container is None:
            seen, truth = _of_volume(seen), _of_volume(truth)
        else:
            seen = {**seen, **root_of(container.layer)}
        if seen != truth:
            raise ViolationError("P2", f"{migration}: {host.name} has {seen}, acknowledged was {self.world.truth}")
        if container is None:
            if not self.world.excused:
                raise ViolationError("P2", f"{migration}: the container is gone from {host.name}")
            return
        if not container.running and not self.world.excused:
            raise ViolationError("P13", f"{migration}: the container does not run on {host.name}")
        wanted = self.sim.policy if record.lifecycle.state == "finalised" else "no"
        if container.policy != wanted:
            raise ViolationError("P10", f"{migration} is {record.lifecycle.state}, the policy is {container.policy}")

    def _released_before(self, record: Record) -> bool:
        """Whether the container had left its host already when this migration was asked for."""
        others = (r for r in self.records.values() if r is not record and r.container_id == record.container_id)
        return any("source_released" in r.types and r.lifecycle.state != "rolled_back" for r in others)

    def _last(self, container_id: str) -> Record:
        mine = [r for r in self.records.values() if r.lifecycle.state != "rejected" and r.container_id == container_id]
        return mine[-1]


def _of_volume(tree: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in tree.items() if path not in LAYER_PATHS}
