"""From an append in one process to the reaction in another, by rate."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from benchkit.backbone import Backbone, backbone
from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, percentile
from benchkit.plots import lines
from labkit.errors import LabError
from labkit.spec import REPOSITORY

WRITERS = 4
RATES = {"tiny": (50,), "quick": (50, 200), "full": (10, 50, 100, 200, 400)}
DEADLINE_SECONDS = 30.0
HEAD_START_SECONDS = 0.1
PERCENTS = (50, 90, 99, 99.9)


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
    """So many events a second, evenly spread over time and over several histories, for so long."""
    with contextlib.ExitStack() as stack:
        reactor = stack.enter_context(process("reactor", bus.endpoint))
        writers = [
            stack.enter_context(
                process("writer", bus.endpoint, f"rate-{rate}-{number}", str(rate / WRITERS), str(seconds))
            )
            for number in range(WRITERS)
        ]
        for child in (reactor, *writers):
            assert child.stdout is not None
            if child.stdout.readline().strip() != "ready":
                raise LabError(f"a process of the bus case did not start: {child.args!r}")
        began = time.monotonic() + HEAD_START_SECONDS
        for number, writer in enumerate(writers):
            assert writer.stdin is not None
            writer.stdin.write(f"{began + number / rate}\n")
            writer.stdin.flush()
        appended = [
            (uuid, called, durable)
            for writer in writers
            for uuid, called, durable in json.loads(writer.communicate(timeout=seconds + DEADLINE_SECONDS)[0])
        ]
        time.sleep(1.0)  # what is under way arrives; whatever is later is lost, and counted
        seen = dict(json.loads(reactor.communicate("", timeout=DEADLINE_SECONDS)[0]))
    called = {uuid: at for uuid, at, _ in appended}
    durable = {uuid: at for uuid, _, at in appended}
    took = max(durable.values()) - began
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


@contextlib.contextmanager
def process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of this case, which does not outlive it."""
    child = subprocess.Popen(
        [sys.executable, "-m", f"benchkit.{module}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}/scripts:{REPOSITORY}"},
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


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
        "Four writers, each a process as agents are, append to a history of its own each, on a real etcd with its log on the disk; events are "
        "spread evenly over the time, and another process follows all histories. *Reaction*: from the call of the append until the other process has read the event, checked the chain and "
        "decoded it. *Durable*: until the append has returned."
    ),
    run=run,
    tables=tables,
    plots=plots,
    quick_seconds=12,
    full_seconds=45,
)
