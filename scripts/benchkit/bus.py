"""From an append in one process to the reaction in another, by rate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

from benchkit.backbone import Backbone, backbone
from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, percentile
from benchkit.plots import lines
from events import schema
from events.schema import Event
from events.stamp import Stamper
from events.store import Store
from labkit.errors import LabError
from labkit.spec import REPOSITORY

WRITERS = 4
RATES = {"tiny": (50,), "quick": (50, 200), "full": (10, 50, 100, 200, 400)}
DEADLINE_SECONDS = 30.0
PERCENTS = (50, 90, 99, 99.9)


class Writer(threading.Thread):
    """Appends to a history of its own at a steady rate; remembers when each append was called, and when durable."""

    def __init__(self, store: Store, migration: str, rate: float, seconds: float) -> None:
        super().__init__(name=migration, daemon=True)
        self._store, self._migration = store, migration
        self._rate, self._seconds = rate, seconds
        self.called: dict[str, float] = {}
        self.durable: dict[str, float] = {}

    def run(self) -> None:
        stamper = Stamper("hostd/alpha")
        previous: Event | None = None
        began = time.monotonic()
        for number in range(int(self._rate * self._seconds)):
            time.sleep(max(0.0, began + number / self._rate - time.monotonic()))
            stamp = stamper.stamp(1)
            self.called[stamp.uuid] = time.monotonic()
            data = schema.StepRecovered(step=f"step {number}")
            previous = self._store.append(self._migration, previous, data, cause=0, stamp=stamp, notify=("beta",))
            self.durable[stamp.uuid] = time.monotonic()


def run(setting: Setting) -> Result:
    """One rate after the other."""
    seconds = setting.pick(1.0, 4.0, 6.0)
    found = []
    with backbone() as bus:
        for rate in RATES[setting.scale]:
            found.append(at_rate(bus, rate, seconds))
            setting.say(f"{rate} events/s: p99 {found[-1]['reaction_seconds']['99'] * 1000:.1f} ms")
    return {"rates": found}


def at_rate(bus: Backbone, rate: int, seconds: float) -> Result:
    """So many events a second, over several histories, for so long."""
    reactor = subprocess.Popen(
        [sys.executable, "-m", "benchkit.reactor", bus.endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}/scripts:{REPOSITORY}"},
    )
    assert reactor.stdout is not None
    stores = [bus.connect() for _ in range(WRITERS)]
    try:
        if reactor.stdout.readline().strip() != "ready":
            raise LabError("the process that is to react did not start")
        writers = [
            Writer(store, f"rate-{rate}-{number}", rate / WRITERS, seconds) for number, store in enumerate(stores)
        ]
        began = time.monotonic()
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(seconds + DEADLINE_SECONDS)
        took = time.monotonic() - began
        time.sleep(1.0)  # what is under way arrives; whatever is later is lost, and counted
        said, _ = reactor.communicate("", timeout=DEADLINE_SECONDS)
    finally:
        reactor.kill()
        reactor.wait()
        for store in stores:
            store.close()
    seen = dict(json.loads(said))
    called = {uuid: at for writer in writers for uuid, at in writer.called.items()}
    durable = {uuid: at for writer in writers for uuid, at in writer.durable.items()}
    reaction = [seen[uuid] - at for uuid, at in called.items() if uuid in seen]
    return {
        "asked_per_second": rate,
        "done_per_second": len(called) / took,
        "events": len(called),
        "unseen": len(called) - len(reaction),
        "durable_seconds": {
            str(percent): percentile([durable[u] - called[u] for u in called], percent) for percent in PERCENTS
        },
        "reaction_seconds": {str(percent): percentile(reaction, percent) for percent in PERCENTS},
    }


def tables(result: Result) -> list[Table]:
    """One row a rate."""
    rows = [
        [
            str(found["asked_per_second"]),
            f"{found['done_per_second']:.0f}",
            str(found["events"]),
            *(f"{found['durable_seconds'][str(percent)] * 1000:.1f}" for percent in (50, 99)),
            *(f"{found['reaction_seconds'][str(percent)] * 1000:.1f}" for percent in PERCENTS),
            str(found["unseen"]),
        ]
        for found in result["rates"]
    ]
    headings = (
        "events/s asked",
        "done",
        "events",
        "durable p50, ms",
        "p99",
        *(f"reaction p{percent}, ms" for percent in PERCENTS),
        "unseen",
    )
    return [Table("Append to reaction", headings, rows)]


def plots(result: Result) -> dict[str, str]:
    """Percentiles over rate."""
    series = {
        f"p{percent}": [
            (found["asked_per_second"], found["reaction_seconds"][str(percent)] * 1000) for found in result["rates"]
        ]
        for percent in PERCENTS
    }
    return {"bus.svg": lines("Append to reaction in another process (ms)", "events per second", series, dots=True)}


CASE = Case(
    name="bus",
    title="The bus",
    about=(
        "Four writers append, each to a history of its own, on a real etcd with its log on the disk; another process follows all "
        "histories. *Reaction*: from the call of the append until the other process has read the event, checked the chain and "
        "decoded it. *Durable*: until the append has returned."
    ),
    run=run,
    tables=tables,
    plots=plots,
    quick_seconds=12,
    full_seconds=45,
)
