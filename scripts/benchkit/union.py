"""What the union costs whoever works on it: reads, writes and metadata, against a plain volume on the same host."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from benchkit.case import Case, Result, Setting
from benchkit.figures import NOTHING, Table, count
from benchkit.stage import TREE, VOLUMES, Load, Stage, write_load
from labkit.errors import LabError
from labkit.host import Host

PROBE = Path(__file__).with_name("probe.py")
PLAIN = "plain"
CRAWL_KIB = 64
"""The fill is slowed to this while the union is measured with everything still remote."""
JOBS: dict[str, tuple[str, bool, list[str]]] = {
    "read sequential, cold": ("big", True, ["--rw=read", "--bs=1M"]),
    "read sequential, cached": ("big", False, ["--rw=read", "--bs=1M", "--time_based"]),
    "read 4k random, cold": ("big", True, ["--rw=randread", "--bs=4k", "--time_based"]),
    "read 4k random, cached": ("big", False, ["--rw=randread", "--bs=4k", "--time_based"]),
    "mmap 4k random, cached": ("big", False, ["--rw=randread", "--bs=4k", "--ioengine=mmap", "--time_based"]),
    "write sequential": ("own", False, ["--rw=write", "--bs=1M", "--end_fsync=1"]),
    "write 4k random": ("own", False, ["--rw=randwrite", "--bs=4k", "--end_fsync=1", "--time_based"]),
    "write 4k, fsync each": ("own", False, ["--rw=randwrite", "--bs=4k", "--fsync=1", "--time_based"]),
}
"""Name: on which file (the one that was moved, or one that the container made), cold or not, and how."""
PHASES = ("fill", "released", "released, hybrid", "finalised")


class Bench:
    """Measures one directory of a host, which is a mounted volume."""

    def __init__(self, setting: Setting, host: Host) -> None:
        self._host = host
        self._seconds = setting.pick(0.2, 1.0, 2.0)
        self._small = setting.pick(100, 1000, 3000)
        self._jobs = setting.pick(dict(list(JOBS.items())[2:3]), JOBS, JOBS)

    def measure(self, directory: str) -> dict[str, float]:
        """MiB/s by fio job, and operations a second of the small-file work."""
        found = {name: self._fio(directory, *job) for name, job in self._jobs.items()}
        for verb, words in (
            ("own files", ["small", f"{directory}/work", str(self._small)]),
            ("moved files, cold", ["walk", f"{directory}/load/many"]),
        ):
            drop_caches()
            done = self._host.run([sys.executable, "-I", str(PROBE), *words], timeout_seconds=300)
            found.update({f"{verb}: {name}": value for name, value in json.loads(done.stdout).items()})
        return found

    def _fio(self, directory: str, file: str, cold: bool, words: list[str]) -> float:
        place = f"{directory}/load/big/00/000000" if file == "big" else f"{directory}/own"
        if not cold and file == "big":
            self._host.run(["cat", place], timeout_seconds=300)
        if cold:
            drop_caches()
        line = [
            *("fio", "--name=job", f"--filename={place}", "--ioengine=psync", "--thread", "--output-format=json"),
            *("--invalidate=0", f"--runtime={self._seconds}", *words),
        ]
        if file == "own":
            line.append(f"--size={64 << 20}")
        else:
            line += ["--readonly"]
        done = self._host.run(line, timeout_seconds=300)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        if job["error"]:
            raise LabError(f"fio failed with error {job['error']} on {place}")
        side = job["read"] if job["read"]["io_bytes"] else job["write"]
        return float(side["io_bytes"]) / (side["runtime"] / 1000) / 2**20


def drop_caches() -> None:
    """Let the kernel forget contents and names (of the whole machine: there is only one kernel)."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def run(setting: Setting) -> Result:
    """A plain volume between the phases of one ``postcopy`` and one ``hybrid`` migration."""
    if shutil.which("fio") is None:
        raise LabError("fio is missing: apt-get install fio")
    stage = setting.stage()
    big = Load(setting.pick(10**6, 10**8, 256 * 2**20), 1)
    many = Load(setting.pick(4 * 10**5, 8 * 10**6, 2 * 10**7), setting.pick(100, 2000, 5000))
    phases: dict[str, dict[str, float]] = {}
    plain: list[dict[str, float]] = []
    try:
        lay_out(stage.home, "benchdata", big, many)
        stage.run_idle(ticking=True)
        host = stage.away
        lay_out(host, PLAIN, big, many)
        bench = Bench(setting, host)

        def look(phase: str) -> None:
            setting.say(phase)
            phases[phase] = bench.measure(TREE)

        def compare() -> None:
            setting.say("plain volume")
            plain.append(bench.measure(f"{VOLUMES}/{PLAIN}/_data"))

        compare()
        name = stage.ask(strategy="postcopy", bwlimit_kib=CRAWL_KIB)
        stage.wait(name, {"target_started"})
        look("fill")
        stage.control(name, {"control": "bwlimit", "kib": 0})
        stage.wait(name, {"completed"})
        stage.arrived()
        look("released")
        stage.fold(name)
        compare()
        look("finalised")
        hybrid(stage, look)
        compare()
    finally:
        stage.clear()
    return {"big": big.label, "many": many.label, "phases": phases, "plain": plain}


def hybrid(stage: Stage, look: Any) -> None:
    """Away and back again with pre-copy, so that only what was written last is beneath the union."""
    stage.migrate()
    name = stage.ask()
    stage.wait(name, {"completed"})
    stage.arrived()
    look("released, hybrid")
    stage.fold(name)


def lay_out(host: Host, volume: str, big: Load, many: Load) -> None:
    """The same data in any volume."""
    host.docker_client().volumes.create(volume)
    place = host.path(f"{VOLUMES}/{volume}/_data") / "load"
    write_load(place / "big", big)
    write_load(place / "many", many)


def tables(result: Result) -> list[Table]:
    """Throughput of the plain volume, and each phase as a part of it."""
    rows = []
    for name in result["plain"][0]:
        figures = [measured[name] for measured in result["plain"]]
        base = statistics.median(figures)
        unit = "MiB/s" if name in JOBS else "/s"
        row = [name, f"{count(base)} {unit} ({count(min(figures))}-{count(max(figures))})"]
        for phase in PHASES:
            value = result["phases"].get(phase, {}).get(name)
            row.append(NOTHING if value is None or not base else f"{value / base:.2f}")
        rows.append(row)
    return [
        Table(
            f"A file of {result['big']}, and {result['many']}: ratio to the plain volume",
            ("work", "plain volume", *PHASES),
            rows,
        )
    ]


CASE = Case(
    name="union",
    title="Working on the union",
    about=(
        "fio and small-file work on the moved volume, seen through the container's own mount, against a plain volume on the same "
        "host before, between and after. *fill*: `postcopy` with the fill slowed to a crawl, so that all contents are still on the source: the "
        "worst that a container can meet. *released*: the same after the release, with all contents in the replica beneath "
        "the union. *released, hybrid*: after an ordinary migration, where only what was written last lies beneath. *finalised*: folded "
        "into a plain volume. *own* files are made by the container after its start. *cold*: after the kernel was made to forget "
        "everything."
    ),
    run=run,
    tables=tables,
    quick_seconds=60,
    full_seconds=300,
)
