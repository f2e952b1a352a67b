"""``scripts/demo``: a real service with real data moves from one Docker host to another before your eyes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coordinator.narrate import size
from coordinator.timeline import line_of
from events import schema
from events.connecting import connect
from events.schema import TERMINAL_PHASES, Event
from events.settings import EtcdSettings
from labkit.errors import LabError
from labkit.host import Host
from labkit.images import share
from labkit.lab import Lab
from labkit.witness import Witness, load_keys, wait_until_answering

PORT = 6379
VOLUME = "webdata"
CONTAINER = "web"
FILES, FILE_BYTES = 3000, 100_000
KEYS, KEY_BYTES = 2000, 5_000
RESTARTS = 3
MIGRATION_SECONDS = 120.0
PAYLOAD = "files"


class Show:
    """The demonstration, step by step."""

    def __init__(self, lab: Lab, console: Console) -> None:
        self.lab = lab
        self.console = console
        self.alpha, self.beta = lab.host("alpha"), lab.host("beta")
        self.store = connect(EtcdSettings(endpoints=tuple(lab.etcd.endpoints.split(","))))

    def say(self, text: str) -> None:
        """A heading."""
        self.console.print(f"\n[bold cyan]▸[/] {text}")

    def fill(self) -> None:
        """Bring a Redis up on alpha, over a volume with many files."""
        self.say("a real service: Redis with appendonly and fsync on every write, on alpha")
        image = share("redis", (self.alpha, self.beta))
        docker = self.alpha.docker_client()
        docker.volumes.create(VOLUME)
        place = self.alpha.path(f"/var/lib/docker/volumes/{VOLUME}/_data") / PAYLOAD
        block = os.urandom(FILE_BYTES)
        for number in range(FILES):
            directory = place / f"{number % 50:02d}"
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{number:05d}").write_bytes(number.to_bytes(8, "big") + block[8:])
        docker.containers.run(
            image,
            name=CONTAINER,
            detach=True,
            ports={f"{PORT}/tcp": PORT},
            volumes={VOLUME: {"bind": "/data"}},
            restart_policy={"Name": "always"},
        )
        wait_until_answering(self.alpha.spec.address, PORT)
        load_keys(self.alpha.spec.address, PORT, KEYS, KEY_BYTES)
        self.console.print(
            f"  volume {VOLUME}: {FILES} files with {size(FILES * FILE_BYTES)}, and {KEYS} keys with "
            f"{size(KEYS * KEY_BYTES)}"
        )

    def restart_outage(self, witness: Witness) -> float:
        """What ``docker restart`` of the same container costs the client, in seconds: the median."""
        self.say(f"for comparison: docker restart {CONTAINER}, {RESTARTS} times, as an outside client sees it")
        outages = []
        for _ in range(RESTARTS):
            witness.wait_for_more(50)
            began = time.monotonic()
            self.alpha.run(["docker", "restart", CONTAINER])
            witness.wait_for_more(50)
            outages.append(witness.longest_gap(began)[0])
        self.console.print("  " + ", ".join(f"{outage * 1000:.0f} ms" for outage in outages))
        return statistics.median(outages)

    def migrate(self, witness: Witness) -> list[Event]:
        """Put the request with etcdctl, and show every event as it is appended."""
        request = json.dumps({"container": CONTAINER, "source": "alpha", "target": "beta"})
        command = ["etcdctl", "put", self.store.keys.request("web-7"), request]
        self.say("one line starts it")
        self.console.print(f"  [bold]etcdctl put {command[2]} '{request}'[/]\n", soft_wrap=True)
        witness.wait_for_more(50)
        environment = {**os.environ, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": self.lab.etcd.endpoints}
        began = time.monotonic()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=30)
        events: list[Event] = []
        with self.store.follow(self.store.keys.migration("web-7"), tick_seconds=1.0) as follower:
            for _ in follower:
                for event in self.store.read("web-7", after=events[-1] if events else None):
                    events.append(event)
                    self.console.print(line_of(event, events[0]), soft_wrap=True)
                if events and events[-1].type in TERMINAL_PHASES:
                    return events
                if time.monotonic() - began > MIGRATION_SECONDS:
                    raise LabError(f"no end after {MIGRATION_SECONDS:.0f} s; `scripts/lab logs` has the details")
        return events

    def digest(self, host: Host) -> str:
        """Digest of the payload as the host sees it at the volume's place (on beta: through the union)."""
        kept = f"/var/lib/docker/volumes/{VOLUME}/_data/{PAYLOAD}"
        code = (
            "import sys; from pathlib import Path; from hostd.manifest import tree_digest, walk; "
            "print(tree_digest(walk(Path(sys.argv[1]), digest=True)))"
        )
        repository = str(Path(__file__).resolve().parents[2])
        done = host.run([sys.executable, "-c", code, kept], env={"PYTHONPATH": repository})
        return done.stdout.strip()

    def report(self, witness: Witness, events: list[Event], restart: float, began: float) -> bool:
        """The table at the end. Returns whether everything is there."""
        outage, before, after = witness.longest_gap(began)
        missing = witness.missing_from(self.beta.spec.address)
        digests = self.digest(self.alpha), self.digest(self.beta)
        moved = _bytes_moved(events)
        table = Table(title="What it came to", title_justify="left", show_header=False, box=None, padding=(0, 2))
        table.add_row(
            "outage of the migration, as the client saw it",
            f"[bold]{outage * 1000:.0f} ms[/]",
            f"last answer from {before.address}, next from {after.address}",
        )
        table.add_row(
            "docker restart of the same container",
            f"{restart * 1000:.0f} ms",
            f"the migration took {outage / restart:.2f} times as long",
        )
        table.add_row("bytes moved before the cut-over", size(moved["before"]), "while it ran on alpha")
        table.add_row("bytes moved during the cut-over", size(moved["during"]), "the list of what had changed")
        table.add_row("bytes moved after the cut-over", size(moved["after"]), "while it ran on beta")
        table.add_row("records acknowledged", f"{len(witness.answers)}", f"of {witness.attempted} written")
        table.add_row("of these missing on beta", f"[bold]{len(missing)}[/]", "" if not missing else str(missing[:5]))
        table.add_row("digest on alpha", digests[0][:16], f"{FILES} files that Redis itself does not touch")
        table.add_row("digest on beta", digests[1][:16], "equal" if digests[0] == digests[1] else "[red]DIFFERENT[/]")
        self.console.print()
        self.console.print(table)
        return not missing and digests[0] == digests[1]


def _bytes_moved(events: list[Event]) -> dict[str, int]:
    moved = {"before": 0, "during": 0, "after": 0}
    for event in events:
        match event.data:
            case schema.SyncFinished() as data:
                moved["before"] += data.bytes_moved
            case schema.SourceStopped() as data:
                moved["during"] += sum(dirty.manifest.size_bytes for dirty in data.dirty)
            case schema.FillFinished() as data:
                moved["after"] += data.bytes_moved
    return moved


def run(options: argparse.Namespace) -> int:
    """The whole demonstration. Returns the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    lab = Lab(name="demo", subnet=options.subnet)
    began = time.monotonic()
    good = False
    try:
        console.print("[bold cyan]▸[/] a lab on this machine: etcd, a coordinator, two Docker hosts, alpha and beta")
        lab.up()
        show = Show(lab, console)
        try:
            show.fill()
            witness = Witness([show.alpha.spec.address, show.beta.spec.address], PORT)
            witness.start()
            try:
                restart = show.restart_outage(witness)
                start = time.monotonic()
                events = show.migrate(witness)
                witness.wait_for_more(50)
            finally:
                witness.stop()
            good = events[-1].type == "completed" and show.report(witness, events, restart, start)
        finally:
            show.store.close()
        console.print(f"\nthe whole demonstration took {time.monotonic() - began:.0f} s")
    finally:
        if options.keep:
            _say_how_to_look(console, lab)
        else:
            lab.down()
            console.print("everything was cleaned up; [bold]--keep[/] leaves the lab running")
    return 0 if good else 1


def _say_how_to_look(console: Console, lab: Lab) -> None:
    console.print(
        "\nThe lab is still up. To look around:\n"
        "  scripts/lab status\n"
        "  scripts/lab exec beta docker ps\n"
        f"  CARGO_ETCD={lab.etcd.endpoints} .venv/bin/cargoctl history web-7\n"
        f"  ETCDCTL_API=3 ETCDCTL_ENDPOINTS={lab.etcd.endpoints} etcdctl get --prefix /cargo/migrations/web-7/ev/\n"
        "  scripts/lab logs\n"
        "  scripts/lab down        removes everything"
    )


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Moves a real Redis with its data between two Docker hosts on this machine."
    )
    parser.add_argument("--keep", action="store_true", help="leave the lab running afterwards")
    parser.add_argument("--subnet", default=None, metavar="A.B.C", help="first three parts of the lab's addresses")
    try:
        return run(parser.parse_args())
    except (LabError, TimeoutError) as error:
        print(f"scripts/demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("scripts/demo: interrupted; scripts/lab down removes whatever is left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
