"""The processes of the simulator: two agents and two coordinators, made of the product's own parts.

An agent drives ``hostd/turn.py`` one operation at a time over the model effects. A coordinator is
``coordinator/service.py``'s own Service, called instead of looping, with the real election. Both reach the store
through a ``Client``, the real ``events/store.py`` over the shared in-memory store, which is where partitions, lost
replies, crashes and preemptions happen. Killing a process throws its object away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import coordinator.service as service_module
from coordinator.service import Service
from events.errors import CargoError, LostLeadershipError, SchemaError, StoreUnavailableError, TransientError
from events.failpoints import Failpoints
from events.following import Changes, Follower, KeyValue, Snapshot, Tick
from events.leases import Election, LeaderGuard
from events.memory import MemoryFollower, MemoryStore
from events.records import ContainerRecord, HostRecord, MountRecord, encode_container, encode_host
from events.schema import Requested, Stamp
from events.store import Compare, Delete, NoAnswerError, Outcome, Page, Put, Store
from hostd import source, target
from hostd.turn import Append, Begin, Pass, Perform, Read, Rest, Turn, Turns, Wait, retry_delay_seconds
from tests.simulation.effects.base import MIB, Ctx, Performance, nothing
from tests.simulation.effects.registry import RUN, UNDO
from tests.simulation.invariants import Watched
from tests.simulation.world import Container, Host

if TYPE_CHECKING:
    from tests.simulation.scheduler import Simulation

LEADER_TTL_SECONDS = 5
_Result = TypeVar("_Result")


class Killed(BaseException):
    """The process ends here. Not an Exception: nothing in the product may catch it."""


class Client(Store):
    """One process's connection to the store."""

    def __init__(self, sim: Simulation, process: Process, place: str, backend: MemoryStore) -> None:
        super().__init__(backend.keys)
        self.sim, self.process, self.place, self.backend = sim, process, place, backend
        self._waited = 0.0

    def _page(self, start: bytes, end: bytes, limit: int, revision: int, keys_only: bool) -> Page:
        if self.sim.world.etcd[self.place] != "up":
            raise NoAnswerError("the store cannot be reached")
        return self.backend._page(start, end, limit, revision, keys_only)

    def _get_once(self, key: str) -> KeyValue | None:
        if self.sim.world.etcd[self.place] != "up":
            raise NoAnswerError("the store cannot be reached")
        return self.backend._get_once(key)

    def _transact(self, compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> Outcome:
        fault = self.sim.before_write(self.process, operations)
        state = self.sim.world.etcd[self.place]
        if state == "down" or fault == "not_applied":
            raise NoAnswerError("the request was lost")
        if fault == "applied_late":
            self.backend.fail_next("applied_late")
        outcome = self.backend._transact(compares, operations)
        self.sim.committed()
        if state == "deaf" or fault == "applied_lost":
            raise NoAnswerError("the reply was lost")
        self.sim.after_write(self.process)
        return outcome

    def _reading(self, read: Callable[[], _Result]) -> _Result:
        """Once: nobody else gets a turn during a read, so another attempt would be answered alike."""
        return read()

    def _reachable(self) -> None:
        if self.sim.world.etcd[self.place] != "up":
            raise NoAnswerError("the store cannot be reached")

    def _grant(self, ttl_seconds: int) -> tuple[int, int]:
        self._reachable()
        return self.backend._grant(ttl_seconds)

    def _keep_alive(self, lease_id: int) -> int:
        self._reachable()
        return self.backend._keep_alive(lease_id)

    def _revoke(self, lease_id: int) -> None:
        self._reachable()
        self.backend._revoke(lease_id)

    def follow(self, prefixes: str | Sequence[str], **options: Any) -> Follower:
        return self.backend.follow(prefixes, **options)

    @property
    def cluster_id(self) -> int | None:
        return 1

    def close(self) -> None:
        """Nothing to close."""

    def _now(self) -> float:
        return self.sim.clock + self._waited

    def _pause(self, seconds: float) -> None:
        self._waited += max(seconds, 2.0)


class Numbered:
    """Stamps with numbers instead of random ids, so that a seed gives the same history every time."""

    def __init__(self, sim: Simulation, by: str, boot: str) -> None:
        self.sim, self.by, self.boot = sim, by, boot

    def stamp(self, epoch: int) -> Stamp:
        """A new stamp."""
        return Stamp(
            uuid=f"u{self.sim.next_number()}", at=f"{self.sim.clock:.3f}", by=self.by, boot=self.boot, epoch=epoch
        )


class Quiet:
    """A log that drops everything."""

    def bind(self, **_fields: object) -> Quiet:
        """The same."""
        return self

    def debug(self, *_args: object, **_fields: object) -> None:
        """Dropped, as is everything."""

    def info(self, *_args: object, **_fields: object) -> None:
        """Dropped."""

    def warning(self, *_args: object, **_fields: object) -> None:
        """Dropped."""

    def error(self, *_args: object, **_fields: object) -> None:
        """Dropped."""

    def exception(self, *_args: object, **_fields: object) -> None:
        """Dropped."""


class Process:
    """What agents and coordinators have in common for the scheduler."""

    name = ""
    place = ""

    def __init__(self) -> None:
        self.alive = False
        self.frozen = False
        self.busy = 0
        """It is in the middle of a call, further down the stack."""
        self.touched = False
        """Its last step may have changed something on a host."""

    @property
    def usable(self) -> bool:
        return self.alive and not self.frozen and not self.busy

    def start(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        raise NotImplementedError

    def idle(self) -> bool:
        """Whether it is certain, before any choice, that ``advance`` has nothing to do and asks nobody anything."""
        return False

    def advance(self) -> bool:
        """One action; whether there was one to do."""
        raise NotImplementedError


class Runner:
    """As ``hostd/runner.py``, one operation at a time."""

    def __init__(self, agent: Agent, migration: str, turns: Turns) -> None:
        self.agent, self.migration, self.turns = agent, migration, turns
        self.woken = True
        self.turn: Turn | None = None
        self.operation: Any = None
        self.performing: Performance | None = None
        self.context: Ctx | None = None
        self.appending = self.peek_after = False
        """In the middle of an append; somebody wants to look at the history after it."""
        self.wait_until = 0.0
        self.poke_at: float | None = None
        self.halted = ""

    @property
    def finished(self) -> bool:
        """Nothing to do here, unless somebody appends."""
        return self.turns.finished

    def ready_at(self, now: float) -> bool:
        """Whether there is something to do."""
        if self.halted:
            return False
        if self.poke_at is not None and now >= self.poke_at:
            self.poke_at, self.turns.rested, self.woken = None, None, True
        if self.wait_until > now and not self.woken:
            return False
        return self.turn is not None or self.woken

    def kick(self, *, poke: bool = False) -> None:
        if poke:
            self.turns.rested = None
        self.woken = True
        if self.appending:  # it reads when the append is done, as the real one does, which takes a lock for both
            self.peek_after = True
        elif self.turns.busy_step and not self.halted:
            self._peek()

    def _peek(self) -> None:
        try:
            decision = self.turns.learn(self.agent.store.read(self.migration, after=self.turns.last))
        except CargoError:
            return
        if self.turns.overtaken(decision) and self.context is not None:
            self.context.cancelled = True

    def advance(self) -> None:
        try:
            if self.turn is None:
                self.woken = False
                self.turn = self.turns.turn()
                self.operation = next(self.turn)
                return
            self._step()
        except StopIteration as done:
            self.turn = self.performing = self.context = None
            if done.value:
                self.woken = True
            elif self.finished and not self.woken:
                self.agent.forget(self.migration)
        except StoreUnavailableError:
            self.turn = self.performing = self.context = None
            self.wait_until, self.woken = self.agent.sim.clock + 1.0, True
        except SchemaError as error:
            self.turn = None
            self.halted = str(error)
            self.agent.sim.violation("P6", f"{self.agent.name} refuses to act on {self.migration}: {error}")

    def _step(self) -> None:
        assert self.turn is not None
        operation = self.operation
        try:
            if isinstance(operation, Perform):
                if not self._perform(operation):
                    return
                result = self._outcome
            else:
                result = self._do(operation)
        except CargoError as error:
            self.performing = None
            self.operation = self.turn.throw(error)
        else:
            self.operation = self.turn.send(result)

    def _perform(self, operation: Perform) -> bool:
        """Advance the effect; whether it has ended."""
        sim, context = self.agent.sim, self.context
        assert context is not None
        self.agent.touched = True
        if self.performing is None:
            if not operation.undo:
                context.check_cancelled()
            sim.checker.effect_begins(self.agent.host, self.migration, operation.name, operation.undo)
            sim.inject_error(self.agent)
            verb = (UNDO if operation.undo else RUN).get(operation.name, nothing)
            self.performing = verb(context)
            sim.say(self.agent.name, "undo %s" if operation.undo else "%s", operation.name)
        try:
            next(self.performing)
        except StopIteration as done:
            self.performing = None
            self._outcome = done.value
            sim.inject_error(self.agent, operation.name)
            return True
        return False

    def _do(self, operation: Any) -> Any:
        if isinstance(operation, Read):
            return self.turns.learn(self.agent.store.read(self.migration, after=self.turns.last))
        if isinstance(operation, Begin):
            self.context = Ctx(self.migration, self.turns.view, self.agent)
        elif isinstance(operation, Append):
            self.appending = True
            try:
                self._append(operation)
            finally:
                self.appending = False
                if self.peek_after:
                    self.peek_after = False
                    self._peek()
        elif isinstance(operation, Rest):
            if self.context is not None and self.context.poke_after is not None:
                self.poke_at = self.agent.sim.clock + self.context.poke_after
        elif isinstance(operation, Wait):
            self.wait_until = self.agent.sim.clock + retry_delay_seconds(operation.failures)
        elif isinstance(operation, Pass):
            pass
        return None

    def _append(self, operation: Append) -> None:
        draft = self.turns.draft(operation.data, operation.decision)
        event = self.agent.store.append(
            self.migration,
            draft.previous,
            draft.data,
            cause=draft.cause,
            stamp=self.agent.stamper.stamp(draft.epoch),
            notify=draft.notify,
        )
        self.turns.appended(event)


class Agent(Process):
    """One ``hostd``. Everything that is not on its host dies with it."""

    def __init__(self, sim: Simulation, host: Host) -> None:
        super().__init__()
        self.sim, self.host, self.name, self.place = sim, host, f"hostd/{host.name}", host.name
        self.inline = sim.rng.random() < 0.5
        self.file_bytes = sim.rng.choice((1, MIB, 100 * MIB))
        self.lives = 0

    def start(self) -> None:
        self.lives += 1
        self.alive, self.frozen = True, False
        self.boot = f"{self.host.name}-{self.lives}"
        self.store = Client(self.sim, self, self.place, self.sim.backend)
        self.stamper = Numbered(self.sim, self.name, self.boot)
        self.inbox = self.store.keys.inbox(self.host.name)
        self.polled = -1
        """Revision up to which the follower has given everything."""
        self.follower: MemoryFollower = self.sim.backend.follow(self.inbox)
        self.watched = Watched()
        self.runners: dict[str, Runner] = {}
        self.guarded: dict[str, str] = {}
        self.manual_stops: set[str] = set()
        self.host.trackers.clear()
        self.told: dict[str, bytes] = {}
        self.told_of: list[tuple[object, ...]] = []
        """What the records in ``told`` were made from."""

    def kill(self) -> None:
        self.alive = self.frozen = False
        self.host.trackers.clear()
        self.runners = {}

    # --- waking --------------------------------------------------------------------------------

    def watch(self, *, drop: bool = False) -> bool:
        """Take one item of the watch; whether there was one."""
        if self.sim.world.etcd[self.place] != "up" or self.polled == self.sim.backend._revision:
            return False
        item = self.follower.poll(0)
        if item is None:
            self.polled = self.sim.backend._revision
            return False
        self.watched.note(item)
        if drop:
            self.sim.say(self.name, "misses a wake-up")
            return True
        keys: list[str] = []
        if isinstance(item, Snapshot):
            keys = [pair.key for pair in item.items]
        elif isinstance(item, Changes):
            keys = [change.key for change in item.changes if change.value is not None]
        for key in keys:
            self.wake(key[len(self.inbox) :])
        return True

    def tick(self) -> None:
        """The periodic look at everything."""
        try:
            pointers = self.store.range(self.inbox)
        except StoreUnavailableError:
            return
        for pair in pointers:
            self.wake(pair.key[len(self.inbox) :])

    def wake(self, migration: str) -> None:
        """As ``hostd/service.py`` does, which has registered the host by then."""
        if not self.told_of:
            self.tell()
        if not self.told_of:
            return
        known = self.runners.get(migration)
        try:
            if known is not None and known.finished and known.turn is None:
                self.forget(migration)
                known = None
            if known is None:
                known = self._runner(migration)
        except StoreUnavailableError:
            return
        if known is not None:
            known.kick()

    def forget(self, migration: str) -> None:
        """As ``hostd/service.py`` does with what is finished here: no runner, and no pointer unless there is news."""
        runner = self.runners.pop(migration)
        self.sim.checker.forgotten(migration, self.name, runner)
        key = self.store.keys.inbox_pointer(self.host.name, migration)
        try:
            pointer = self.store.get(key)
            news = runner.turns.view.state != "ended" and self.store.read(migration, after=runner.turns.last)
            if pointer is not None and not news:
                self.store.delete(key, pointer.mod_revision)
        except StoreUnavailableError:
            return

    def _runner(self, migration: str) -> Runner | None:
        events = self.store.read(migration)
        first = events[0].data if events else None
        if not isinstance(first, Requested):
            return None
        plan = {first.request.source: source.PLAN, first.request.target: target.PLAN}.get(self.host.name)
        if plan is None:
            return None
        runner = self.runners[migration] = Runner(self, migration, Turns(plan, self.host.name))
        return runner

    def container_changed(self, container: Container) -> None:
        """Docker's event stream told of a start or an end."""
        migration = container.label or self.guarded.get(container.id, "")
        if self.alive and migration in self.runners:
            self.runners[migration].kick(poke=True)

    # --- working -------------------------------------------------------------------------------

    def advance(self) -> bool:
        now = self.sim.clock
        ready = [runner for runner in self.runners.values() if runner.ready_at(now)]
        if not ready:
            return self.polled != self.sim.backend._revision and self.watch()
        runner = ready[0] if len(ready) == 1 else self.sim.rng.choice(ready)
        runner.advance()
        return True

    def tell(self) -> None:
        """Write what runs here into the inventory, if that has changed."""
        here = self.host.containers.values()
        what: list[tuple[object, ...]] = [
            tuple(self.host.volumes),
            *((c.id, c.name, c.running, c.policy, c.label) for c in here),
        ]
        if what == self.told_of:
            return
        keys = self.store.keys
        host = HostRecord(
            host=self.host.name,
            address=self.host.name,
            free_bytes=10**12,
            volumes=tuple(self.host.volumes),
            boot=self.boot,
        )
        told = {keys.host(self.host.name): encode_host(host)}
        for container in self.host.containers.values():
            record = ContainerRecord(
                id=container.id,
                name=container.name,
                image="image",
                image_id="image",
                running=container.running,
                restart_policy=container.policy,
                migration=container.label,
                mounts=(MountRecord(kind="volume", name="data", destination="/data", tree="/v/data"),),
            )
            told[keys.inventory_item(self.host.name, container.name)] = encode_container(record)
        try:
            for key in self.told.keys() - told.keys():
                self.store.delete(key)
            for key, value in told.items():
                if self.told.get(key) != value:
                    self.store.put(key, value)
        except StoreUnavailableError:
            return
        self.told, self.told_of = told, what

    # --- what effects do to Docker -------------------------------------------------------------

    def world_start(self, container: Container) -> None:
        """The engine's start."""
        if not self.host.docker:
            raise TransientError("the Docker daemon does not answer")
        if container.id not in self.host.containers:
            raise TransientError("no such container")
        self.manual_stops.discard(container.id)
        self.host.start(container, self.name)

    def world_stop(self, container: Container) -> None:
        """The engine's stop."""
        if not self.host.docker:
            raise TransientError("the Docker daemon does not answer")
        was = container.running
        self.host.stop(container)
        if was:
            self.sim.say(self.name, "stops %s", container.name)
            self.container_changed(container)

    def world_remove(self, container: Container) -> None:
        """The engine's removal, never forced."""
        if not self.host.docker:
            raise TransientError("the Docker daemon does not answer")
        if container.running:
            raise TransientError("a running container is not removed")
        self.host.containers.pop(container.id, None)


class _Clock:
    """Stands for the module ``time`` in ``coordinator/service.py``."""

    def __init__(self, sim: Simulation) -> None:
        self._sim = sim

    def monotonic(self) -> float:
        """The simulation's clock."""
        return self._sim.clock


def tame_clock(sim: Simulation) -> None:
    """Give the coordinator's service the simulation's clock."""
    service_module.__dict__["time"] = _Clock(sim)


class Coordinator(Process):
    """One ``cargo-coordinator``."""

    def __init__(self, sim: Simulation, place: str) -> None:
        super().__init__()
        self.sim, self.place, self.name = sim, place, f"coordinator/{place}"
        self.lives = 0

    def start(self) -> None:
        self.lives += 1
        self.alive, self.frozen = True, False
        self.store = Client(self.sim, self, self.place, self.sim.backend)
        self.service = Service(self.store, self.place, Failpoints(), Quiet())  # type: ignore[arg-type]
        self.service._stamper = Numbered(self.sim, self.name, f"{self.place}-{self.lives}")  # type: ignore[assignment]
        self.election: Election | None = None
        self.follower: Follower | None = None
        self.resync = False
        self.look_at = 0.0
        self.polled = -1
        """Revision up to which the follower has given everything."""
        self.refused = -1
        """Revision at which somebody else led."""

    def kill(self) -> None:
        self.alive = self.frozen = False
        self.election = self.follower = None

    @property
    def leading(self) -> bool:
        """As far as this process knows."""
        return self.follower is not None

    def advance(self) -> bool:
        if self.idle():
            return False
        try:
            return self._campaign() if self.follower is None else self._lead()
        except LostLeadershipError:
            self.sim.say(self.name, "finds that it does not lead any more")
            self._resign()
        except StoreUnavailableError:
            self.resync = True
            self.look_at = self.sim.clock + 1.0
        except SchemaError as error:
            self.sim.violation("P6", f"{self.name} met a history that it cannot take: {error}")
        return True

    def idle(self) -> bool:
        now = self.sim.clock
        if now < self.look_at and not self.resync:
            if self.follower is None:
                return True
            service, election = self.service, self.election
            return (
                self.polled == self.sim.backend._revision
                and now < service._look_around_at
                and not service._waiting
                and election is not None
                and election.guard is not None
            )
        return False

    def _campaign(self) -> bool:
        if self.sim.clock < self.look_at:
            return False
        self.look_at = self.sim.clock + 1.0
        backend = self.sim.backend
        unchanged = self.refused == backend._revision and self.sim.clock < backend._soonest_end
        if unchanged and self.sim.world.etcd[self.place] == "up":
            return False  # another attempt would be answered as the last one was
        if self.election is None:
            self.election = Election(
                self.store, self.store.keys.leader, self.place, LEADER_TTL_SECONDS, background=False
            )
            self.election._value = f"{self.place}-{self.sim.next_number()}".encode()
        guard: LeaderGuard | None = self.election.attempt()
        if guard is None:
            self.refused = backend._revision if self.election._lease is None else -1
            return False
        self.sim.say(self.name, "leads with epoch %s", guard.create_revision)
        service = self.service
        service._guard = guard
        service._begin()
        keys = self.store.keys
        prefixes = [keys.migrations, keys.requests, keys.controls]
        self.sim.rng.shuffle(prefixes)  # between two prefixes a follower promises no order
        self.follower = self.sim.backend.follow(prefixes, contents=False)
        self.watched = Watched()
        self.polled = -1
        self.resync = False
        return True

    def _lead(self) -> bool:
        assert self.election is not None
        assert self.follower is not None
        if self.sim.clock >= self.look_at:
            self.look_at = self.sim.clock + LEADER_TTL_SECONDS / 3
            self.election.turn()
        if self.election.guard is None:
            raise LostLeadershipError("the leadership key is not ours any more")
        service = self.service
        if self.resync:
            for prefix in (self.store.keys.migrations, self.store.keys.requests, self.store.keys.controls):
                service._resync(prefix)
            self.resync = False
            return True
        if self.sim.world.etcd[self.place] != "up":
            return False
        waiting = bool(service._waiting)
        if self.sim.clock >= service._look_around_at:
            service._take(Tick(), self.follower)
        if self.polled == self.sim.backend._revision and not waiting:
            return False
        item = self.follower.poll(0)
        if item is None:
            self.polled = self.sim.backend._revision
        else:
            self.watched.note(item)
            if isinstance(item, Changes) and self.sim.loses_wake_up():
                self.sim.say(self.name, "misses a wake-up")
            else:
                service._take(item, self.follower)
        service._look_again()
        if service._halted:
            self.sim.violation("P6", f"{self.name} refuses to act: {service._halted}")
        return item is not None or waiting

    def _resign(self) -> None:
        self.refused = -1
        self.service._guard = None
        self.follower = None
        if self.election is not None:
            self.election.resign()
        self.election = None
