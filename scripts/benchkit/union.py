"""What the union costs whoever works on it: reads, writes and metadata, against a plain volume on the same host."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, count, spread
from benchkit.stage import TREE, VOLUMES, Load, Stage, write_load
from labkit.errors import LabError
from labkit.host import Host

PROBE = Path(__file__).with_name("probe.py")
PLAIN = "plain"
PLAIN_TREE = f"{VOLUMES}/{PLAIN}/_data"
BARE = "bare"
"""A volume that holds an overlay of the kernel's without anything of Cargo: what overlayfs itself costs."""
CRAWL_KIB = 64
HARDLY_LIMITED_KIB = 10**8
"""More than any link carries. But with a limit nothing is asked of the view at the stop, so there is a union."""
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
SMALL = {"own files": False, "moved files, cold": True}
"""Kinds of small-file work, and whether the kernel has forgotten everything before."""
REPEATS = 3
"""Small-file work takes milliseconds: of each look the median of so many."""
PHASES = ("bare overlay", "fill", "released", "hybrid on a union", "hybrid", "finalised")
Figures = dict[str, dict[str, list[float]]]
"""Kind of work → ``values``, one a turn, and ``plain``: of the plain volume before, between and after."""


class Bench:
    """Measures directories of a host, each of which is a mounted volume."""

    def __init__(self, setting: Setting, host: Host) -> None:
        self._setting = setting
        self._host = host
        self._milliseconds = setting.pick(200, 500, 600)
        self._small = setting.pick(100, 1000, 3000)
        self._jobs = setting.pick(dict(list(JOBS.items())[2:3]), JOBS, JOBS)

    def measure(self, directories: dict[str, str], turns: int, repeats: int = REPEATS) -> dict[str, Figures]:
        """MiB/s by fio job, and operations a second of small-file work, for each of ``directories``.

        Kind of work by kind of work, the directories by turns, and the plain volume before and after each turn, so that what the
        machine does besides meets all of them.
        """
        found: dict[str, Figures] = {phase: {} for phase in directories}
        works: dict[str, Callable[[str], dict[str, float]]] = {
            name: partial(self._fio, name, *job) for name, job in self._jobs.items()
        }
        works |= {verb: partial(self._small_files, verb, repeats) for verb in SMALL}
        for work in works.values():
            plain = [work(PLAIN_TREE)]
            for _ in self._setting.turns(turns):
                for phase, directory in directories.items():
                    for name, value in work(directory).items():
                        found[phase].setdefault(name, {"values": [], "plain": []})["values"].append(value)
                plain.append(work(PLAIN_TREE))
            for phase in directories:
                for name in plain[0]:
                    found[phase][name]["plain"] = [seen[name] for seen in plain]
        return found

    def _small_files(self, verb: str, repeats: int, directory: str) -> dict[str, float]:
        cold = SMALL[verb]
        words = ["walk", f"{directory}/load/many"] if cold else ["small", f"{directory}/work", str(self._small)]
        seen = []
        for _ in range(repeats):
            if cold:
                drop_caches()
            done = self._host.run([sys.executable, "-I", str(PROBE), *words], timeout_seconds=300)
            seen.append(json.loads(done.stdout))
        return {f"{verb}: {name}": statistics.median(found[name] for found in seen) for name in seen[0]}

    def _fio(self, name: str, file: str, cold: bool, words: list[str], directory: str) -> dict[str, float]:
        place = f"{directory}/load/big/00/000000" if file == "big" else f"{directory}/own"
        if not cold and file == "big":
            self._host.run(["dd", f"if={place}", "of=/dev/null", "bs=1M", "status=none"], timeout_seconds=300)
        if cold:
            drop_caches()
        line = [
            *("fio", "--name=job", f"--filename={place}", "--ioengine=psync", "--thread", "--output-format=json"),
            *("--invalidate=0", f"--runtime={self._milliseconds}ms", *words),
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
        return {name: float(side["io_bytes"]) / (side["runtime"] / 1000) / 2**20}


def drop_caches() -> None:
    """Let the kernel forget contents and names (of the whole machine: there is only one kernel)."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def run(setting: Setting) -> Result:
    """The phases of one ``postcopy`` and two ``hybrid`` migrations."""
    if shutil.which("fio") is None:
        raise LabError("fio is missing: apt-get install fio")
    stage = setting.stage()
    big = Load(setting.pick(10**6, 10**8, 256 * 2**20), 1)
    many = Load(setting.pick(4 * 10**5, 8 * 10**6, 2 * 10**7), setting.pick(100, 2000, 5000))
    phases: dict[str, Figures] = {}
    turns = setting.pick(1, 1, 3)
    try:
        lay_out(stage.home, "benchdata", big, many)
        stage.run_idle(ticking=True)
        host = stage.away
        lay_out(host, PLAIN, big, many)
        bench = Bench(setting, host)

        def look(phase: str, turns: int = turns) -> None:
            setting.say(phase)
            phases.update(bench.measure({phase: TREE}, turns, repeats=1 if phase == "fill" else REPEATS))

        name = stage.ask(strategy="postcopy", bwlimit_kib=CRAWL_KIB)
        stage.wait(name, {"target_started"})
        look("fill", 1)
        stage.control(name, {"control": "bwlimit", "kib": 0})
        stage.wait(name, {"completed"})
        stage.arrived()
        with bare_overlay(host, big, many) as bare:
            setting.say("released, and a bare overlay")
            phases.update(bench.measure({"released": TREE, "bare overlay": bare}, turns))
        stage.fold(name)
        look("finalised")
        hybrid(stage, look)
    finally:
        stage.clear()
    return {"big": big.label, "many": many.label, "phases": phases}


@contextlib.contextmanager
def bare_overlay(host: Host, big: Load, many: Load) -> Iterator[str]:
    """The same data in the upper layer of an overlay with the union's options and an empty lower layer."""
    lay_out(host, BARE, big, many)
    base = f"{VOLUMES}/{BARE}/_data"
    made = host.path(base)
    for name in ("lower", "work", "merged", "upper"):
        (made / name).mkdir()
    (made / "load").rename(made / "upper" / "load")
    options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work,metacopy=on,redirect_dir=on,index=off,xino=off"
    host.run(["mount", "-t", "overlay", "overlay", "-o", options, f"{base}/merged"])
    try:
        yield f"{base}/merged"
    finally:
        host.run(["umount", f"{base}/merged"])


def hybrid(stage: Stage, look: Callable[[str], None]) -> None:
    """Away and back again with pre-copy, so that only what was written last has to come after it, or at the stop."""
    for phase, kib in (("hybrid on a union", HARDLY_LIMITED_KIB), ("hybrid", 0)):
        stage.migrate()
        name = stage.ask(bwlimit_kib=kib)
        stage.wait(name, {"completed"})
        stage.arrived()
        look(phase)
        stage.fold(name)


def lay_out(host: Host, volume: str, big: Load, many: Load) -> None:
    """The same data in any volume."""
    host.docker_client().volumes.create(volume)
    place = host.path(f"{VOLUMES}/{volume}/_data") / "load"
    write_load(place / "big", big)
    write_load(place / "many", many)


def shares(result: Result, phase: str) -> dict[str, list[float]]:
    """By kind of work: each turn's figure as a part of the plain volume's right before and after it."""
    found = {}
    for work, seen in result["phases"].get(phase, {}).items():
        if not isinstance(seen, dict):  # recorded before the turns: one figure, beside some of the plain volume
            seen = {"values": [seen], "plain": [statistics.median(kept[work] for kept in result["plain"])] * 2}  # noqa: PLW2901
        pairs = zip(seen["values"], seen["plain"], seen["plain"][1:], strict=False)
        found[work] = [2 * value / (before + after) for value, before, after in pairs if before + after]
    return found


def plain_figures(result: Result) -> dict[str, list[float]]:
    """By kind of work: everything that was measured on the plain volume."""
    found: dict[str, list[float]] = {}
    for kept in result.get("plain", ()):
        for work, value in kept.items():
            found.setdefault(work, []).append(value)
    for seen in result["phases"].values():
        for work, figures in seen.items():
            if isinstance(figures, dict):
                found.setdefault(work, []).extend(figures["plain"])
    return found


def tables(result: Result) -> list[Table]:
    """Throughput of the plain volume, and each phase as a part of it."""
    parts = {phase: shares(result, phase) for phase in PHASES}
    rows = []
    for name, figures in sorted(plain_figures(result).items()):
        unit = "MiB/s" if name in JOBS else "/s"
        base = f"{count(statistics.median(figures))} {unit} ({count(min(figures))}-{count(max(figures))})"
        rows.append([name, base, *(spread(parts[phase].get(name, []), digits=2) for phase in PHASES)])
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
        "host. Each kind of work is done by turns, on the plain volume before and after each turn, and a ratio is that of one turn to the two plain "
        "ones beside it: median and range. *Bare overlay*: an overlay of the kernel's without anything of Cargo, all data in its upper "
        "layer: what a union cannot be faster than. *Fill*: `postcopy` with the fill slowed to a crawl, so that all contents are still on the "
        "source: the worst that a container can meet. *Released*: the same after the release, with all contents in the replica beneath "
        "the union. *Hybrid*: after the release of an ordinary migration of a container that writes a little all the time, which was at hand at "
        "the stop, so there is no union. *Hybrid on a union*: the same with a bandwidth limit, where what was written last lies beneath one. *Finalised*: folded "
        "into a plain volume. *Own* files are made by the container after its start. *Cold*: after the kernel was made to forget "
        "everything. *Hybrid* and *finalised* are plain volumes, so what their ratios differ from 1 by is what this machine's noise makes of the others, too. "
        "What differs beyond that is overlayfs's own: it takes longer to look up and rename a name than the file system "
        "beneath it, and a moved file after `postcopy` has an entry in three places (its metadata, where its contents are, and these), "
        "each of which is looked up once while the kernel does not know it yet."
    ),
    run=run,
    tables=tables,
    quick_seconds=90,
    full_seconds=360,
)
