"""One run of the simulator: a seed decides everything that happens, and in which order.

    while faults may come:   one random action of the world or of one process; check every promise
    then:                    heal, restart, and let everything come to rest; check that every migration has ended

Single-threaded, no clock but its own, no randomness but the seed's. A process can be preempted in the middle of an
append: other processes then run *inside* that call, which is how stale leaders and lost races come about.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator import lifecycle
from events.errors import CargoError, PermanentError, TransientError
from events.memory import MemoryStore
from events.schema import EVENT_TYPES
from events.store import Delete, Put
from tests.simulation.agents import Agent, Coordinator, Killed, Process, tame_clock
from tests.simulation.invariants import NEEDS, Checker, ViolationError
from tests.simulation.remembered import RememberedKeys, remember_events
from tests.simulation.transcript import Transcript
from tests.simulation.world import IMAGE, LAYER_PATHS, PATHS, VOLUME, Container, Host, Volume, World

MAX_CALM_STEPS = 700
"""More than a migration takes in which nothing goes wrong."""
FAULT_STEPS = (100, 250, 400, 600, 900)
MAX_REST_ROUNDS = 400
MAX_IN_A_ROUND = 30
QUIET_ROUNDS = 4
"""Rounds of 35 s each without any event: longer than every retry and every periodic look."""
MAX_DEPTH = 2
"""Of preemptions inside preemptions."""
MOODS = {
    "leave it": ("pause", "resume", "resume", "finalise", "nonsense"),
    "give up": ("abort", "pause", "resume"),
    "go back": ("rollback", "rollback", "rollback", "finalise", "resume"),
    "anything": ("abort", "rollback", "pause", "resume", "resume", "finalise", "nonsense"),
}
"""What the person of this seed asks for."""
MOMENTS = (
    tuple(sorted(NEEDS))
    + tuple(f"undo {name}" for name in sorted(NEEDS))
    + tuple(sorted(set(EVENT_TYPES) - {"rejected", "step_failed", "step_recovered"}))
)
"""Effects and events at which a seed may aim a control or a fault."""
AIMS = ("policy", "on_release", "strategy", "mood", "control", "control_at", "trouble_at", "trouble")
"""What a test may fix, to look for one thing in particular."""
LATE_MOMENTS = (
    "target_claimed", "start_container", "target_started", "fill_replica", "digest_trees", "fill_finished",
    "verify_trees", "verified", "release_ordered", "retire_container", "source_released", "completed", "fold_union",
    "finalise_ordered", "finalised",
)  # fmt: skip
WAY_BACK_MOMENTS = (
    "rollback_ordered", "recall_container", "list_changes", "target_stopped", "carry_back", "carried_back",
    "revive_container", "source_restored", "abort_ordered", "target_cleaned",
)  # fmt: skip
FAULTS = {
    "is killed": "a process is killed",
    "is killed %s": "a process is killed right before or after a write",
    "is killed and starts": "a process is killed",
    "is frozen": "a process is frozen",
    "stands still in the middle of a write": "a process is preempted inside an append",
    "its write is %s": "a write or its reply is lost, or comes late",
    "meets a passing error": "an effect fails in passing",
    "meets a passing error, aimed at it": "an effect fails in passing",
    "meets a lasting error": "an effect fails for good",
    "misses a wake-up": "a wake-up is lost",
    "loses power": "a host loses power",
    "dockerd restarts": "Docker restarts",
    "dockerd stops answering": "Docker falls silent",
    "the store is %s for %s": "the way to the store is cut, both ways or one",
    "alpha and beta lose each other": "the link between the hosts is cut",
    "the queue of the tracker overflows": "the tracker's queue overflows",
    "forgets what lies before revision %s": "the store is compacted, past watches that lag",
    "%s seconds pass": "time passes, so that leases expire",
    "leads with epoch %s": "leadership is taken",
    "puts %s %s": "a person asks for something",
    "%s %s on %s": "the container ends, by itself or by a person's hand",
    "removes %s": "a person removes the container",
}
"""Lines of the transcript that are faults, and what they are called in statistics."""
STRATEGIES = ("hybrid", "hybrid", "hybrid", "hybrid", "postcopy", "precopy", "cold", "auto")
POLICIES = ("always", "unless-stopped", "on-failure", "no")
PROCESSES = 4
_LASTS = tuple(tuple(range(count - 1, 0, -1)) for count in range(PROCESSES + 1))
_BITS = tuple((last + 1).bit_length() for last in range(PROCESSES))
"""How ``Random.shuffle`` goes through so many, and how many random bits it draws for each."""


@dataclass(frozen=True)
class Result:
    """What became of a seed."""

    seed: int
    rule: str
    """Of the violation; empty when all went well."""
    words: str
    outcomes: tuple[str, ...]
    """State of each migration at the end."""
    events: int
    steps: int
    digest: str
    """Over every stored event and every line of the transcript (P18)."""
    transcript: str
    faults: Mapping[str, int] = field(default_factory=dict)
    """How often each kind of fault struck."""

    @property
    def good(self) -> bool:
        """No promise was broken."""
        return not self.rule


class Simulation:
    """One seed."""

    def __init__(self, seed: int, aim: Mapping[str, str] | None = None) -> None:
        """``aim`` fixes some of what the seed would choose: see AIMS."""
        self.seed = seed
        self.rng = random.Random(seed)
        self._draw, self._draw_bits = self.rng.random, self.rng.getrandbits
        self.clock = 0.0
        self.numbers = 0
        self.depth = 0
        self.steps = 0
        self.faults = False
        self.transcript = Transcript()
        self.backend = MemoryStore(RememberedKeys(), clock=lambda: self.clock)
        self.world = World()
        self.mood = self.rng.choice(("leave it", "leave it", "give up", "go back", "go back", "anything"))
        self.policy = self.rng.choice(POLICIES)
        self.fault_rate = self.rng.choice((0.0, 0.02, 0.05, 0.12))
        self.write_rate = self.rng.choice((0.03, 0.15))
        self.control_at = self.rng.choice(MOMENTS) if self.rng.random() < 0.6 else ""
        self.trouble_at = self.rng.choice(MOMENTS) if self.rng.random() < 0.7 else ""
        if self.mood == "go back" or (self.mood == "give up" and self.rng.random() < 0.4):
            self.control_at = self.rng.choice(LATE_MOMENTS)
            if self.rng.random() < 0.5:
                self.trouble_at = self.rng.choice(WAY_BACK_MOMENTS)
        self.calm_until = self.rng.choice(LATE_MOMENTS + WAY_BACK_MOMENTS) if self.rng.random() < 0.4 else ""
        """Nothing goes wrong by chance before this moment, so that faults strike late in a migration as often as early."""
        self.control_in = self.trouble_in = -1
        """Steps until the person speaks, or something breaks, once the moment has come."""
        self.fail_next_effect = False
        self.fail_after = ""
        self.touches = 1 if self.rng.random() < 0.3 else 0
        """How often somebody may still end the workload from outside."""
        self.control = ""
        """What the person asks for at the moment; empty: whatever suits the mood."""
        self.on_release = ""
        self.trouble = ""
        self.strategy = ""
        """What each request asks for; empty: any."""
        for name, value in (aim or {}).items():
            assert name in AIMS
            setattr(self, name, value)
        self.checker = Checker(self)
        self.agents = [Agent(self, host) for host in self.world.hosts.values()]
        self.coordinators = [Coordinator(self, "c1"), Coordinator(self, "c2")]
        self.processes: list[Process] = [*self.agents, *self.coordinators]
        self.requests = 0
        self._populate()

    def _populate(self) -> None:
        host = self.world.hosts["alpha"]
        files = {path: number for number, path in enumerate(PATHS[: self.rng.randint(1, len(PATHS))], 1)}
        self.world.writes = len(files)
        self.world.truth = files | IMAGE
        host.volumes[VOLUME] = Volume(files=dict(files))
        container = Container("source-container", "web", self.policy)
        host.containers[container.id] = container
        host.start(container, "a person")
        self.world.hosts["beta"].image = self.rng.random() < 0.7

    # --- used by everything --------------------------------------------------------------------

    def next_number(self) -> int:
        """Never the same twice."""
        self.numbers += 1
        return self.numbers

    def say(self, who: str, words: str, *values: object) -> None:
        """One line of the transcript."""
        self.transcript.add(self.steps, self.depth, who, words, values)

    def moment(self, name: str) -> None:
        """An event was appended, or an effect begins: this is where control and trouble are aimed at."""
        if name == self.control_at:
            self.control_at, self.control_in = "", self.rng.randint(1, 9)
        if name == self.calm_until:
            self.calm_until = ""
        if name == self.trouble_at:
            self.trouble_at, self.trouble_in = "", self.rng.randint(1, 9)

    def violation(self, rule: str, words: str) -> None:
        """A promise is broken."""
        raise ViolationError(rule, words)

    def committed(self) -> None:
        """Something may have been written."""
        self.checker.committed()

    # --- hooks in the store's client -----------------------------------------------------------

    def before_write(self, process: Process, operations: Sequence[Put | Delete]) -> str:
        """May preempt or kill ``process``; returns what becomes of the request."""
        if not self.faults or "/ev/" not in operations[0].key:
            return ""
        roll = self.rng.random()
        if roll < 0.10:
            self._preempt(process)
        elif roll < 0.10 + self.fault_rate / 4:
            self._kill_inside(process, "before its write")
        roll = self.rng.random()
        if roll > self.fault_rate:
            return ""
        fault = self.rng.choice(("not_applied", "applied_lost", "applied_late"))
        self.say(process.name, "its write is %s", fault)
        return fault

    def loses_wake_up(self) -> bool:
        """A watch is silent about one revision, without a word."""
        return self.faults and self.rng.random() < self.fault_rate

    def after_write(self, process: Process) -> None:
        """The write is durable, its author does not know yet."""
        if self.faults and self.rng.random() < self.fault_rate / 4:
            self._kill_inside(process, "after its write")

    def _kill_inside(self, process: Process, when: str) -> None:
        self.say(process.name, "is killed %s", when)
        process.kill()
        raise Killed

    def _preempt(self, process: Process) -> None:
        if self.depth >= MAX_DEPTH:
            return
        self.depth += 1
        process.busy += 1
        self.say(process.name, "stands still in the middle of a write")
        try:
            for _ in range(self.rng.choice((1, 3, 8, 25))):
                self._one_step()
        finally:
            process.busy -= 1
            self.depth -= 1
        self.say(process.name, "goes on")

    def inject_error(self, agent: Agent, done: str = "") -> None:
        """A tool, a disk or Docker fails."""
        if not self.faults:
            return
        if done and done == self.fail_after:
            self.fail_after = ""
            raise TransientError("an aimed error, after the effect")
        if self.fail_next_effect:
            self.fail_next_effect = False
            self.say(agent.name, "meets a passing error, aimed at it")
            raise TransientError("an aimed error")
        roll = self.rng.random()
        if roll < self.fault_rate / 3:
            self.say(agent.name, "meets a passing error")
            raise TransientError(f"an error on demand, number {self.next_number() % 3}")
        if roll < self.fault_rate / 2.7:
            self.say(agent.name, "meets a lasting error")
            raise PermanentError("a lasting error on demand")

    # --- running -------------------------------------------------------------------------------

    def run(self) -> Result:
        """The whole run. Never raises for a broken promise: the result says it."""
        tame_clock(self)
        remember_events()
        rule = words = ""
        try:
            for process in self.processes:
                process.start()
            for agent in self.agents:
                agent.tell()
            for _ in range(MAX_CALM_STEPS):
                if not self.calm_until:
                    break
                self._one_step()
            self.faults = True
            for _ in range(self.rng.choice(FAULT_STEPS)):
                self._one_step()
            self._heal()
            self._rest()
            self.checker.final()
        except ViolationError as violation:
            rule, words = violation.rule, str(violation)
        except Exception as error:
            rule, words = "crash", f"{type(error).__name__}: {error}"
            if self.seed < 0:
                raise
        self.say("the simulator", "%s", words or "every promise was kept")
        return self._result(rule, words)

    def _result(self, rule: str, words: str) -> Result:
        digest = hashlib.sha256()
        for migration in sorted(self.checker.records):
            for event in self.checker.records[migration].events:
                digest.update(event.raw)
        text = self.transcript.text() if rule else ""
        digest.update(self.transcript.fingerprint())
        return Result(
            seed=self.seed,
            rule=rule,
            words=words,
            outcomes=tuple(record.lifecycle.state for record in self.checker.records.values()),
            events=sum(len(record.events) for record in self.checker.records.values()),
            steps=self.steps,
            digest=digest.hexdigest(),
            transcript=text,
            faults=self.transcript.count(FAULTS),
        )

    def _one_step(self) -> None:
        self.steps += 1
        rng = self.rng
        self.clock += self._draw() * 0.4
        roll = self._draw()
        self.control_in -= 1
        self.trouble_in -= 1
        world_touched = True
        if self.control_in == 0 and self.checker.records:
            self._control(rng.choice(sorted(self.checker.records)), self.control)
        elif self.trouble_in == 0:
            self._trouble()
        elif self.faults and roll < self.fault_rate / 2:
            self._fault()
        elif roll < self.fault_rate / 2 + (0.025 if self.requests else 0.3):
            self._person()
        elif roll < self.fault_rate / 2 + 0.025 + self.write_rate:
            self._client()
        else:
            world_touched = self._process_step()
        self.checker.step(world_touched=world_touched)

    def _client(self) -> None:
        rng = self.rng
        kind = rng.choice(("write", "write", "write", "delete", "rename"))
        done = self.world.write(kind, rng.choice(PATHS + LAYER_PATHS), rng.choice(PATHS + LAYER_PATHS))
        if done:
            self.say("client", "%s", done)
        if rng.random() < 0.02:
            for tracker in self.world.hosts["alpha"].trackers.values():
                tracker.trusted = False
                self.say("alpha", "the queue of the tracker overflows")

    def _process_step(self) -> bool:
        """Somebody does something; whether that may have changed a host."""
        usable = [one for one in self.processes if one.alive and not one.frozen and not one.busy]
        self._shuffle(usable)
        for process in usable:
            if not process.idle() and self._advance(process):
                return process.touched
        return False

    def _shuffle(self, processes: list[Process]) -> None:
        """As ``Random.shuffle``, drawing the same numbers, without its calls for each of them."""
        draw = self._draw_bits
        for last in _LASTS[len(processes)]:
            bits = _BITS[last]
            chosen = draw(bits)
            while chosen > last:
                chosen = draw(bits)
            processes[last], processes[chosen] = processes[chosen], processes[last]

    def _advance(self, process: Process) -> bool:
        process.busy += 1
        process.touched = False
        try:
            if isinstance(process, Agent):
                roll = self._draw()
                if roll < 0.16:
                    if roll < 0.04:
                        process.tell()
                        return True
                    if roll < 0.14:
                        return process.watch(drop=self.faults and self.rng.random() < self.fault_rate)
                    process.tick()
                    return True
            return process.advance()
        except Killed:
            return True
        except CargoError as error:
            raise ViolationError("P6", f"{process.name} stumbles over {type(error).__name__}: {error}") from error
        finally:
            process.busy -= 1

    # --- people --------------------------------------------------------------------------------

    def _person(self) -> None:
        rng = self.rng
        if self.requests == 0 or (rng.random() < 0.04 and self.requests < 3):
            self._request()
            return
        ids = sorted(self.checker.records)
        roll = rng.random()
        if self.mood == "go back" and roll < 0.6:
            ids = [one for one in ids if "target_claimed" in self.checker.records[one].types]
        if roll < 0.12:
            if self.touches:
                self.touches -= 1
                self._touch_container()
        elif roll < 0.16:
            self._repeat_request()
        elif ids and roll < 0.6:
            self._control(rng.choice(ids))

    def _request(self) -> None:
        self.requests += 1
        body: dict[str, Any] = {
            "container": "web",
            "source": "alpha",
            "target": "beta",
            "max_rounds": self.rng.choice((1, 2, 5)),
            "on_release": self.on_release or self.rng.choice(("keep", "keep", "remove")),
            "strategy": self.strategy or self.rng.choice(STRATEGIES),
            # Not drawn: what a seed does otherwise stays as it was.
            "remote": ("sshfs", "nfs")[(self.seed + self.requests) % 2],
        }
        if self.rng.random() < 0.2:
            body["downtime_budget_seconds"] = self.rng.choice((1.0, 30.0))
        self._put(self.backend.keys.request(f"m{self.requests}"), json.dumps(body).encode())

    def _repeat_request(self) -> None:
        key = self.backend.keys.request(f"m{self.rng.randint(1, self.requests)}")
        stored = self.backend.get(key)
        if stored is not None:
            self._put(key, stored.value)

    def _put(self, key: str, value: bytes) -> None:
        self.say("a person", "puts %s %s", key, value.decode())
        self.backend.put(key, value)

    def _control(self, migration: str, wish: str = "") -> None:
        record = self.checker.records[migration]
        control: dict[str, Any] = {"control": wish or self.rng.choice(MOODS[self.mood])}
        if control["control"] == "rollback" and self.rng.random() < 0.3:
            control["discard_target_writes"] = True
            target = self.world.hosts["beta"]
            if not target.up and "target_claimed" in record.types and "finalised" not in record.types:
                control["target_off"] = "ada"
        self._put(self.backend.keys.control(migration), json.dumps(control).encode())

    def _touch_container(self) -> None:
        """Somebody, or the container itself, ends the workload outside of any migration."""
        running = self.world.running()
        if not running:
            return
        host, container = running[0]
        if not host.docker:
            return
        agent = next(agent for agent in self.agents if agent.host is host)
        how = self.rng.choice(("exits by itself", "is stopped", "fails"))
        self.say("a person" if how == "is stopped" else container.name, "%s %s on %s", container.name, how, host.name)
        host.stop(container, manually=how == "is stopped", exit_code=1 if how == "fails" else 0)
        if how == "is stopped":
            self.world.excused = True
            if agent.alive:
                agent.manual_stops.add(container.id)
        revived = container.policy in ("always", "unless-stopped") or (
            container.policy == "on-failure" and how == "fails"
        )
        if how != "is stopped" and revived:
            host.start(container, "dockerd")
        elif self.policy == "no" or (self.policy == "on-failure" and how != "fails"):
            self.world.excused = True
        agent.container_changed(container)
        if how == "is stopped" and self.rng.random() < 0.3:
            self.say("a person", "removes %s", container.name)
            host.containers.pop(container.id, None)
            self.world.removed = True
            if container.label:
                self.world.forget_layer()

    # --- faults --------------------------------------------------------------------------------

    def _fault(self) -> None:
        choice: Callable[[], None] = self.rng.choice(
            (
                self._kill, self._kill, self._restart, self._restart, self._restart, self._freeze, self._thaw,
                self._thaw, self._cut_link, self._heal_link, self._cut_etcd, self._heal_etcd, self._reboot,
                self._docker_restart, self._time_passes, self._compact,
            )
        )  # fmt: skip
        choice()

    def _trouble(self) -> None:
        """What happens at the very moment that this seed is about."""
        choice: Callable[[], None] = self.rng.choice(
            (self._reboot, self._reboot, self._docker_restart, self._kill, self._cut_link, self._cut_etcd, self._fail)
        )
        if self.trouble:
            choice = getattr(self, f"_{self.trouble}")
        choice()

    def _fresh_start(self) -> None:
        """The source's agent loses its tracker, and its next arming fails when it is done."""
        agent = self.agents[0]
        if not agent.busy and agent.host.up:
            self.say(agent.name, "is killed and starts")
            agent.kill()
            agent.start()
            self.fail_after = "arm_tracking"

    def _fail(self) -> None:
        self.fail_next_effect = True

    def _pick(self, wanted: Callable[[Process], bool]) -> Process | None:
        found = [process for process in self.processes if not process.busy and wanted(process)]
        return self.rng.choice(found) if found else None

    def _kill(self) -> None:
        process = self._pick(lambda one: one.alive)
        if process is not None:
            self.say(process.name, "is killed")
            process.kill()

    def _restart(self) -> None:
        process = self._pick(lambda one: not one.alive and not (isinstance(one, Agent) and not one.host.up))
        if process is not None:
            self.say(process.name, "starts")
            process.start()

    def _freeze(self) -> None:
        process = self._pick(lambda one: one.usable)
        if process is not None:
            self.say(process.name, "is frozen")
            process.frozen = True

    def _thaw(self) -> None:
        process = self._pick(lambda one: one.alive and one.frozen)
        if process is not None:
            self.say(process.name, "thaws")
            process.frozen = False

    def _cut_link(self) -> None:
        self.say("network", "alpha and beta lose each other")
        self.world.link = False

    def _heal_link(self) -> None:
        self.say("network", "alpha and beta reach each other")
        self.world.link = True

    def _cut_etcd(self) -> None:
        place = self.rng.choice(sorted(self.world.etcd))
        self.world.etcd[place] = self.rng.choice(("down", "deaf"))
        self.say("network", "the store is %s for %s", self.world.etcd[place], place)

    def _heal_etcd(self) -> None:
        for place in self.world.etcd:
            self.world.etcd[place] = "up"
        self.say("network", "everybody reaches the store")

    def _reboot(self) -> None:
        agent = self.rng.choice(self.agents)
        if agent.busy:
            return
        host = agent.host
        if not host.up:
            self._boot(host)
            return
        self.say(host.name, "loses power")
        self._end_of_containers(host)
        agent.kill()
        host.power_off()
        if self.rng.random() < 0.6:
            self._boot(host)

    def _boot(self, host: Host) -> None:
        self.say(host.name, "boots")
        host.power_on()

    def _end_of_containers(self, host: Host) -> None:
        """A container whose own policy would not bring it back after this is down for good, rightly."""
        if self.policy == "no" and any(container.running for container in host.containers.values()):
            self.world.excused = True

    def _docker_restart(self) -> None:
        agent = self.rng.choice(self.agents)
        host = agent.host
        if not host.up:
            return
        if host.docker and self.rng.random() < 0.3:
            host.docker = False
            self.say(host.name, "dockerd stops answering")
            return
        host.docker = True
        self.say(host.name, "dockerd restarts")
        self._end_of_containers(host)
        host.restart_docker()
        for container in list(host.containers.values()):
            agent.container_changed(container)

    def _compact(self) -> None:
        """The store forgets what was before; a watch that has not come so far gets a snapshot instead."""
        self.checker.compacted(self.rng.choice((0, 3, 10)))

    def _time_passes(self) -> None:
        seconds = self.rng.choice((6.0, 40.0))
        self.say("time", "%s seconds pass", seconds)
        self.clock += seconds

    # --- the end -------------------------------------------------------------------------------

    def _heal(self) -> None:
        """Faults stop, everything comes back; a person who paused something says resume, now and then."""
        self.faults = False
        self.say("the simulator", "all faults stop")
        self.world.link = True
        for place in self.world.etcd:
            self.world.etcd[place] = "up"
        for host in self.world.hosts.values():
            if not host.up:
                self._boot(host)
            if not host.docker:
                host.docker = True
        for process in self.processes:
            process.frozen = False
            if not process.alive:
                process.start()
        if self.rng.random() < 0.5:
            for migration, record in self.checker.records.items():
                if record.lifecycle.paused:
                    self._put(self.backend.keys.control(migration), b"resume")

    def _rest(self) -> None:
        """Round after round until nothing happens any more."""
        quiet = 0
        for _ in range(MAX_REST_ROUNDS):
            events = self.checker.events
            self.clock += 35.0 if quiet > 1 else 1.0
            if quiet > 1:
                for agent in self.agents:
                    agent.tell()
                    agent.tick()
                self.say("time", "35 seconds pass")
            for process in self.processes:
                self._let_run(process)
            quiet = quiet + 1 if self.checker.events == events else 0
            if quiet > QUIET_ROUNDS:
                break
        self._watches_gave_everything()

    def _let_run(self, process: Process) -> None:
        for _ in range(MAX_IN_A_ROUND):
            self.steps += 1
            process.busy += 1
            process.touched = False
            try:
                more = process.advance()
            except CargoError as error:
                raise ViolationError("P6", f"{process.name} stumbles over {error}") from error
            finally:
                process.busy -= 1
            self.checker.step(world_touched=process.touched)
            if not more:
                return

    def _watches_gave_everything(self) -> None:
        processes: list[Agent | Coordinator] = [*self.agents, *self.coordinators]
        for process in processes:
            follower = process.follower
            if follower is None:
                continue
            while (item := follower.poll(0)) is not None:
                process.watched.note(item)
            self.checker.watched(process.place, process.watched, follower)


def run_seed(seed: int, aim: Mapping[str, str] | None = None) -> Result:
    """One seed from its beginning to its end."""
    return Simulation(seed, aim).run()


def states(result: Result) -> str:
    """The outcomes in one word, for statistics."""
    return "+".join(result.outcomes) or "nothing"


__all__ = ["Result", "Simulation", "lifecycle", "run_seed", "states"]
