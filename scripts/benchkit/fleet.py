"""The coordinator with many migrations in flight over a large fleet: how fast it answers, what it weighs, how it restarts."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from typing import Any

from benchkit.backbone import Backbone, backbone, cpu_seconds, resident_mib
from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, seconds
from benchkit.fleet_agents import Agents, container_of
from benchkit.stage import clock
from events.store import Store
from labkit.errors import LabError

IN_FLIGHT = {"tiny": (1, 10), "quick": (1, 100), "full": (1, 100, 1000)}
HELD = frozenset({"fill"})
"""Where migrations are kept: the container runs on the target, its data arrives."""
PROBES = 5
DEADLINE_SECONDS = 300.0


class Fleet:
    """200 hosts, and migrations between them."""

    def __init__(self, bus: Backbone, hosts: int) -> None:
        self.bus = bus
        self.store: Store = bus.store
        self.agents = Agents(bus.connect(), hosts)
        self._number = 0

    def ask(self) -> str:
        """Put one request; returns the migration's name. Sources and targets go round."""
        hosts = self.agents.hosts
        self._number += 1
        migration = f"m{self._number:05d}"
        origin, goal = hosts[self._number % len(hosts)], hosts[(self._number * 7 + 1) % len(hosts)]
        goal = goal if goal != origin else hosts[(self._number + 1) % len(hosts)]
        self.agents.lists(origin, migration)
        body = {"container": container_of(migration), "source": origin, "target": goal}
        self.store.put(self.store.keys.request(migration), json.dumps(body).encode())
        return migration

    def wait(self, migrations: list[str], phase: str) -> None:
        """Until all are in that phase. Raises LabError."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        waiting = set(migrations)
        while waiting:
            for migration in sorted(waiting)[:50]:
                head = self.store.head(migration)
                if head is None or head.phase != phase:
                    break
                waiting.discard(migration)
            if time.monotonic() > deadline:
                raise LabError(f"{len(waiting)} of {len(migrations)} migrations did not reach {phase}")
            time.sleep(0.01)

    def whole(self) -> Result:
        """One migration from end to end, by agents that take no time: what coordination costs."""
        self.agents.held = frozenset()
        migration = self.ask()
        self.wait([migration], "completed")
        events = self.store.read(migration)
        self.agents.held = HELD
        return {"migration": migration, "seconds": clock(events[-1].at) - clock(events[0].at), "events": len(events)}


def run(setting: Setting) -> Result:
    """Ever more migrations in flight; at each number: whole migrations, the coordinator at rest, its restart."""
    rest = setting.pick(1.0, 6.0, 20.0)
    hosts = setting.pick(10, 200, 200)
    levels = []
    with backbone() as bus:
        fleet = Fleet(bus, hosts)
        bus.start_coordinator()
        wait_for_leader(bus)
        fleet.agents.start()
        fleet.agents.held = HELD
        flying: list[str] = []
        try:
            for number in IN_FLIGHT[setting.scale]:
                began = time.monotonic()
                fresh = [fleet.ask() for _ in range(number - len(flying))]
                fleet.wait(fresh, "fill")
                took = time.monotonic() - began
                flying += fresh
                level = {"in_flight": number, "started": len(fresh), "started_seconds": took}
                level.update(weigh(fleet, rest))
                level.update(restart(fleet, flying))
                levels.append(level)
                setting.say(f"{number} in flight: {took:.1f} s to get there; restart {level['restart_seconds']}")
            stored = stored_bytes(bus, fleet.whole()["migration"])
        finally:
            fleet.agents.stop()
    return {"hosts": hosts, "levels": levels, "stored": stored}


def weigh(fleet: Fleet, rest: float) -> Result:
    """Whole migrations beside those in flight, then the coordinator at rest."""
    probes = [fleet.whole() for _ in range(PROBES)]
    before, began = cpu_seconds(fleet.bus.pid)[0], time.monotonic()
    time.sleep(rest)  # the stretch over which processor time is counted
    used = (cpu_seconds(fleet.bus.pid)[0] - before) / (time.monotonic() - began)
    return {
        "whole_seconds": [probe["seconds"] for probe in probes],
        "events_each": statistics.median(probe["events"] for probe in probes),
        "rest_cores": used,
        "resident_mib": resident_mib(fleet.bus.pid),
    }


def restart(fleet: Fleet, flying: list[str]) -> Result:
    """From the start of a new coordinator until it has answered what had happened meanwhile in the last of all histories.

    The coordinator looks at histories in the order of their names, so everything in flight has been folded by then.
    """
    bus = fleet.bus
    bus.stop_coordinator()
    extra = max(flying)
    size = bus.log.stat().st_size
    control = fleet.store.keys.control(extra)
    fleet.store.put(control, b"abort")  # refused, as it is too late for that: an answer that changes nothing
    began = time.monotonic()
    bus.start_coordinator()
    deadline = began + DEADLINE_SECONDS
    while fleet.store.get(control) is not None:
        if time.monotonic() > deadline:
            raise LabError("the new coordinator answers nothing")
        time.sleep(0.01)
    took = time.monotonic() - began
    lines = [json.loads(line) for line in bus.log.read_bytes()[size:].splitlines() if line.startswith(b"{")]
    leading = [clock(line["timestamp"]) for line in lines if line["event"] == "leading"]
    caught_up = [line for line in lines if line["event"] == "caught up"]
    return {
        "restart_seconds": took,
        "folding_seconds": caught_up[-1]["seconds"] if caught_up and leading else 0.0,
        "restarted_mib": resident_mib(bus.pid, "VmHWM"),
    }


def wait_for_leader(bus: Backbone) -> None:
    """Until the coordinator leads."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while bus.store.get(bus.store.keys.leader) is None:
        if time.monotonic() > deadline:
            raise LabError(f"the coordinator does not lead: {bus.log.read_text()[-2000:]}")
        time.sleep(0.02)


def stored_bytes(bus: Backbone, migration: str) -> dict[str, Any]:
    """What one completed migration leaves in etcd: keys and values, and etcd's own file over all that happened."""
    keys = bus.store.keys
    items = bus.store.range(keys.migration(migration))
    line = ["etcdctl", "--endpoints", bus.endpoint, "endpoint", "status", "-w", "json"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env={**os.environ, "ETCDCTL_API": "3"})
    return {
        "keys": len(items),
        "bytes": sum(len(item.key.encode()) + len(item.value) for item in items),
        "database_bytes": json.loads(done.stdout)[0]["Status"]["dbSize"],
        "histories": len(bus.store.heads().heads),
    }


def tables(result: Result) -> list[Table]:
    """One row a number in flight."""
    rows = [
        [
            str(level["in_flight"]),
            f"{level['started'] / level['started_seconds']:.1f}",
            seconds(level["whole_seconds"]),
            f"{statistics.median(level['whole_seconds']) / level['events_each'] * 1000:.1f}",
            f"{level['rest_cores'] * 100:.1f}",
            f"{level['resident_mib']:.0f}",
            f"{level['restart_seconds']:.2f}",
            f"{level['folding_seconds']:.2f}",
            f"{level['restarted_mib']:.0f}",
        ]
        for level in result["levels"]
    ]
    headings = (
        "in flight",
        "started per s",
        "one more, from request to completed, s",
        "per event, ms",
        "at rest, % of a core",
        "memory, MiB",
        "restart, s",
        "of it reading and folding, s",
        "highest memory, MiB",
    )
    stored = result["stored"]
    notes = [
        f"One completed migration leaves {stored['keys']} keys of {stored['bytes'] / 1024:.1f} KiB in etcd; after "
        f"{stored['histories']} of them, whole or under way, and everything else of this run etcd's file has "
        f"{stored['database_bytes'] / 2**20:.1f} MiB."
    ]
    return [Table(f"The coordinator over {result['hosts']} hosts", headings, rows, notes)]


CASE = Case(
    name="fleet",
    title="A large fleet",
    about=(
        "A real etcd and a real coordinator; the agents are the product's own state machines with effects that take no time, all "
        "in one other process, which shares the two cores. Migrations are kept in flight in the fill. *Restart*: from the start of a new "
        "process, imports included, until it has answered a control that was put while there was none to the last of all histories; all others have been read and "
        "folded by then."
    ),
    run=run,
    tables=tables,
    quick_seconds=40,
    full_seconds=180,
)
