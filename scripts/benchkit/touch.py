"""The first read of, and the first write to, a file that has not arrived yet, by its size."""

from __future__ import annotations

import json
import sys

from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, percentile
from benchkit.plots import lines
from benchkit.stage import TREE, VOLUMES, Load, write_load
from benchkit.union import CRAWL_KIB, PROBE, drop_caches
from coordinator.narrate import size
from labkit.host import Host

KINDS = {"read": "first 4 KiB", "all": "whole file", "write": "write 1 byte"}
TINY = ((4096, 3),)
QUICK = ((4096, 30), (2**20, 10), (2**24, 3))
FULL = ((4096, 50), (65536, 50), (2**20, 20), (2**24, 8), (2**27, 3))
"""Size of a file, and how many for each kind of touch."""
PLAIN = "plain"


def run(setting: Setting) -> Result:
    """Everything is remote when it is touched; a plain volume that was dropped from the caches is the baseline."""
    stage = setting.stage()
    sizes = setting.pick(TINY, QUICK, FULL)
    rows = []
    try:
        stage.home.docker_client().volumes.create("benchdata")
        stage.away.docker_client().volumes.create(PLAIN)
        for bytes_each, files in sizes:
            for kind in KINDS:
                for host, volume in ((stage.home, "benchdata"), (stage.away, PLAIN)):
                    place = host.path(f"{VOLUMES}/{volume}/_data") / f"{kind}-{bytes_each}"
                    write_load(place, Load(bytes_each * files, files))
        stage.run_idle()
        host = stage.away
        name = stage.ask(strategy="postcopy", bwlimit_kib=CRAWL_KIB)
        stage.wait(name, {"target_started"})
        for bytes_each, files in sizes:
            for kind in KINDS:
                folder = f"{kind}-{bytes_each}"
                remote = touched(host, kind, TREE, folder, files)
                drop_caches()
                local = touched(host, kind, f"{VOLUMES}/{PLAIN}/_data", folder, files)
                rows.append({"bytes": bytes_each, "kind": kind, "remote_seconds": remote, "plain_seconds": local})
        stage.control(name, {"control": "bwlimit", "kib": 0})
        stage.wait(name, {"completed"})
        stage.arrived()
        stage.fold(name)
    finally:
        stage.clear()
    return {"touches": rows}


def touched(host: Host, kind: str, directory: str, folder: str, files: int) -> list[float]:
    """Seconds of each first touch."""
    paths = [f"{directory}/{folder}/{number % 100:02d}/{number:06d}" for number in range(files)]
    done = host.run([sys.executable, "-I", str(PROBE), "touch", kind, *paths], timeout_seconds=300)
    return [float(took) for took in json.loads(done.stdout)]


def tables(result: Result) -> list[Table]:
    """One row a size and kind."""

    def milliseconds(values: list[float], percent: float) -> str:
        return f"{percentile(values, percent) * 1000:.2f}"

    rows = [
        [
            size(row["bytes"]),
            KINDS[row["kind"]],
            milliseconds(row["remote_seconds"], 50),
            milliseconds(row["remote_seconds"], 95),
            milliseconds(row["plain_seconds"], 50),
            str(len(row["remote_seconds"])),
        ]
        for row in result["touches"]
    ]
    headings = ("file", "touch", "remote, median ms", "95 %", "plain volume, cold, median ms", "files")
    return [Table("First touch of a file that is still on the source", headings, rows)]


def plots(result: Result) -> dict[str, str]:
    """Latency over size."""
    series = {
        words: [
            (row["bytes"] / 1024, percentile(row["remote_seconds"], 50) * 1000)
            for row in result["touches"]
            if row["kind"] == kind
        ]
        for kind, words in KINDS.items()
    }
    title = "First touch of a remote file (ms over KiB, both logarithmic)"
    return {"touch.svg": lines(title, "KiB", series, logarithmic=True, dots=True)}


CASE = Case(
    name="touch",
    title="First touch",
    about=(
        "After a `postcopy` start, with the fill slowed to a crawl, each file is touched once. A first *write* copies the whole "
        "file up before it returns, as overlayfs does; reads take only what they ask for, and read-ahead."
    ),
    run=run,
    tables=tables,
    plots=plots,
    quick_seconds=20,
    full_seconds=50,
)
