"""``scripts/bench``: what a migration costs, against its baselines, measured in one run on this machine.

It measures and never asserts. Each case is repeated with its baseline in between, so that both meet the same
machine; what counts is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coordinator.narrate import seconds_between, size
from events.connecting import connect
from events.schema import TERMINAL_PHASES, Event
from events.settings import EtcdSettings
from labkit.errors import LabError
from labkit.host import Host
from labkit.images import share
from labkit.lab import Lab
from labkit.witness import Witness, wait_until_answering

DOCS = Path(__file__).resolve().parents[2] / "docs"
PORT = 6379
CONTAINER = "bench"
VOLUME = "benchdata"
END_SECONDS = 900.0
SETTLE_ANSWERS = 30


@dataclass(frozen=True)
class Load:
    """A data set beside the service's own: so many bytes in so many files."""

    bytes: int
    files: int

    @property
    def label(self) -> str:
        """For tables."""
        return f"{size(self.bytes)} in {self.files} files"


QUICK = (Load(10**6, 10), Load(10**8, 1000), Load(10**8, 10_000))
FULL = (
    Load(10**6, 10),
    Load(10**9, 10),
    Load(10**10, 10),
    Load(10**8, 10_000),
    Load(4 * 10**8, 100_000),
)


@dataclass
class Sample:
    """One migration, in seconds."""

    outage: float
    total: float
    fill: float
    parts: dict[str, float] = field(default_factory=dict)
    moved_bytes: int = 0


class Bench:
    """A lab with one service that is moved back and forth."""

    def __init__(self, lab: Lab, console: Console) -> None:
        self.lab = lab
        self.console = console
        self.store = connect(EtcdSettings(endpoints=tuple(lab.etcd.endpoints.split(","))))
        self.hosts = [lab.host("alpha"), lab.host("beta")]
        self.image = share("redis", self.hosts)
        self.number = 0

    def close(self) -> None:
        """Let go of the bus."""
        self.store.close()

    def prepare(self, load: Load) -> None:
        """A fresh service on alpha, with ``load`` in its volume."""
        host = self.hosts[0]
        docker = host.docker_client()
        docker.volumes.create(VOLUME)
        place = host.path(f"/var/lib/docker/volumes/{VOLUME}/_data") / "load"
        each = load.bytes // load.files
        block = os.urandom(min(each, 1 << 20))
        for number in range(load.files):
            directory = place / f"{number % 100:02d}"
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / f"{number:06d}").open("wb") as file:
                for start in range(0, each, len(block)):
                    file.write(block[: each - start])
        docker.containers.run(
            self.image,
            name=CONTAINER,
            detach=True,
            ports={f"{PORT}/tcp": PORT},
            volumes={VOLUME: {"bind": "/data"}},
            restart_policy={"Name": "always"},
        )
        wait_until_answering(host.spec.address, PORT)

    def clear(self) -> None:
        """Remove whatever a case left."""
        for host in self.hosts:
            docker = host.docker_client()
            for container in docker.containers.list(all=True):
                container.remove(force=True)
        for migration, head in self.store.heads().heads.items():
            if head.phase == "completed":
                self._wait(migration, {"finalised"}, 60)
        for host in self.hosts:
            for volume in host.docker_client().volumes.list():
                volume.remove(force=True)

    def restart(self, witness: Witness, host: Host) -> float:
        """Client-seen outage of ``docker restart``, seconds."""
        witness.wait_for_more(SETTLE_ANSWERS)
        began = time.monotonic()
        host.run(["docker", "restart", CONTAINER])
        witness.wait_for_more(SETTLE_ANSWERS)
        return witness.longest_gap(began)[0]

    def migrate(self, witness: Witness, source: Host, target: Host) -> Sample:
        """One migration, followed by a finalise, so that the next one finds a plain volume."""
        self.number += 1
        name = f"bench-{self.number}"
        request = {
            "container": CONTAINER,
            "source": source.spec.name,
            "target": target.spec.name,
            "on_release": "remove",
        }
        witness.wait_for_more(SETTLE_ANSWERS)
        began = time.monotonic()
        self.store.put(self.store.keys.request(name), json.dumps(request).encode())
        events = self._wait(name, TERMINAL_PHASES, END_SECONDS)
        if events[-1].type not in ("completed", "finalised"):
            raise LabError(f"{name} ended with {events[-1].type}")
        witness.wait_for_more(SETTLE_ANSWERS)
        outage, _, first = witness.longest_gap(began)
        sample = _sample(events, outage, first.at + time.time() - time.monotonic())
        if events[-1].type == "completed":
            self.store.put_if_absent(self.store.keys.control(name), b"finalise")
            self._wait(name, {"finalised"}, 120)
        return sample

    def rsync(self, source: Host, target: Host) -> float:
        """Seconds of one ``rsync -a`` of the same tree over the same link."""
        tree = f"/var/lib/docker/volumes/{VOLUME}/_data/"
        ssh = (
            "ssh -i /etc/cargo/ssh/id_ed25519 -o BatchMode=yes -o StrictHostKeyChecking=yes "
            f"-o UserKnownHostsFile=/etc/cargo/ssh/known_hosts -o HostKeyAlias={source.spec.name}"
        )
        target.run(["mkdir", "-p", "/var/lib/bench"])
        began = time.monotonic()
        line = ["rsync", "-a", "-e", ssh, f"root@{source.spec.address}:{tree}", "/var/lib/bench/"]
        target.run(line, timeout_seconds=END_SECONDS)
        target.run(["sync", "-f", "/var/lib/bench"])
        took = time.monotonic() - began
        target.run(["rm", "-rf", "/var/lib/bench"])
        return took

    def _wait(self, migration: str, ends: frozenset[str] | set[str], seconds: float) -> list[Event]:
        events: list[Event] = []
        deadline = time.monotonic() + seconds
        with self.store.follow(self.store.keys.migration(migration), tick_seconds=1.0) as follower:
            for _ in follower:
                events += self.store.read(migration, after=events[-1] if events else None)
                if any(event.type in ends for event in events):
                    return events
                if time.monotonic() > deadline:
                    break
        raise LabError(f"{migration} did not reach {', '.join(sorted(ends))} in {seconds:.0f} s")


def _sample(events: list[Event], outage: float, first_answer_at: float) -> Sample:
    newest = {event.type: event for event in events}

    def between(earlier: str, later: str) -> float:
        return seconds_between(newest[earlier], newest[later])

    answered = first_answer_at - datetime.fromisoformat(newest["target_started"].at).timestamp()
    return Sample(
        outage=outage,
        total=between("requested", "completed"),
        fill=between("requested", "fill_finished"),
        parts={
            "order to stopped": between("cutover_ordered", "source_stopped"),
            "stopped to claimed": between("source_stopped", "target_claimed"),
            "claimed to started": between("target_claimed", "target_started"),
            "started to first answer": answered,
        },
        moved_bytes=sum(getattr(event.data, "bytes_moved", 0) for event in events),
    )


def measure(bench: Bench, load: Load, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One case: migrations back and forth, a ``docker restart`` before each, an ``rsync -a`` after the first."""
    say(f"{load.label}: filling the volume")
    bench.prepare(load)
    witness = Witness([host.spec.address for host in bench.hosts], PORT)
    witness.start()
    restarts, samples, copies = [], [], []
    try:
        for turn in range(repeats):
            source, target = bench.hosts[turn % 2], bench.hosts[(turn + 1) % 2]
            restarts.append(bench.restart(witness, source))
            copies.append(bench.rsync(source, target))
            samples.append(bench.migrate(witness, source, target))
            say(
                f"{load.label}: restart {restarts[-1] * 1000:.0f} ms, migration {samples[-1].outage * 1000:.0f} ms; "
                f"rsync {copies[-1]:.1f} s, migration {samples[-1].total:.1f} s"
            )
        missing = witness.missing_from(bench.hosts[repeats % 2].spec.address)
    finally:
        witness.stop()
        bench.clear()
    return {
        "load": load.label,
        "bytes": load.bytes,
        "files": load.files,
        "repeats": repeats,
        "missing_records": len(missing),
        "outage_seconds": [sample.outage for sample in samples],
        "restart_seconds": restarts,
        "total_seconds": [sample.total for sample in samples],
        "until_filled_seconds": [sample.fill for sample in samples],
        "rsync_seconds": copies,
        "parts_seconds": {
            part: statistics.median(sample.parts[part] for sample in samples) for part in samples[0].parts
        },
        "moved_bytes": [sample.moved_bytes for sample in samples],
    }


def _median(values: list[float], scale: float = 1.0, unit: str = "s", digits: int = 1) -> str:
    low, high = min(values) * scale, max(values) * scale
    return f"{statistics.median(values) * scale:.{digits}f} {unit} ({low:.{digits}f}-{high:.{digits}f})"


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """One row a case: outage against restart, total against rsync."""
    made = []
    for result in results:
        outage, restart = statistics.median(result["outage_seconds"]), statistics.median(result["restart_seconds"])
        total, copy = statistics.median(result["total_seconds"]), statistics.median(result["rsync_seconds"])
        made.append(
            [
                result["load"],
                _median(result["outage_seconds"], 1000, "ms", 0),
                _median(result["restart_seconds"], 1000, "ms", 0),
                f"{outage / restart:.2f}",
                _median(result["total_seconds"]),
                _median(result["rsync_seconds"]),
                f"{total / copy:.2f}",
                str(result["missing_records"]),
            ]
        )
    return made


HEADINGS = (
    "data",
    "outage",
    "docker restart",
    "ratio",
    "whole migration",
    "one rsync -a",
    "ratio",
    "acknowledged records missing",
)


def page(results: list[dict[str, Any]]) -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks\n",
        "Written by `sudo scripts/bench`; the raw figures are in [benchmarks.json](benchmarks.json). Medians, with the",
        "range in brackets. The service is a Redis that fsyncs every write, with a client outside of the hosts that writes",
        "all the time; the data lies beside it in the same volume. Outage is the longest time between two of the client's",
        "answers. All hosts of the lab share one machine's cores and disk, so only the ratios carry over to others.\n",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    lines += ["\nWhere the outage goes (medians, by the events' times):\n"]
    parts = list(results[0]["parts_seconds"])
    lines += ["| data | " + " | ".join(parts) + " |", "|---|" + "---|" * len(parts)]
    for result in results:
        figures = (f"{result['parts_seconds'][part] * 1000:.0f} ms" for part in parts)
        lines.append(f"| {result['load']} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> int:
    """All cases. Returns the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    lab = Lab(name="bench", subnet=options.subnet or "10.77.20")
    results = []
    try:
        lab.up()
        bench = Bench(lab, console)
        try:
            for load in QUICK if options.quick else FULL:
                if options.only and options.only not in load.label:
                    continue
                results.append(measure(bench, load, options.repeats, console.print))
        finally:
            bench.close()
    finally:
        lab.down()
    table = Table(*HEADINGS, box=None)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if options.write:
        (DOCS / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")
        (DOCS / "benchmarks.md").write_text(page(results))
    return 0


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures migrations against their baselines.")
    parser.add_argument("--quick", action="store_true", help="small data sets only, some minutes")
    parser.add_argument("--only", metavar="TEXT", help="cases whose label contains TEXT, such as '1.0 GB'")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="migrations a case (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the raw figures there too")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and docs/benchmarks.json")
    parser.add_argument("--subnet", metavar="A.B.C", help="first three parts of the lab's addresses")
    try:
        return run(parser.parse_args())
    except (LabError, TimeoutError) as error:
        print(f"scripts/bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
