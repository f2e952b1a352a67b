"""The ways in which people move a container today, on the same lab with the same data."""

from __future__ import annotations

from typing import Any

from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, milliseconds, ratio, seconds
from benchkit.outage import gap_of, migrated, watched
from benchkit.stage import Load

WAYS = {
    "cargo": "Cargo",
    "rsync_twice": "rsync-stop-rsync-start",
    "by_hand": "stop-rsync-start",
    "commit": "docker commit, save, load, and tar",
}


def run(setting: Setting) -> Result:
    """Each way in turn, under a client that writes."""
    stage = setting.stage()
    load = setting.pick(Load(10**5, 10), Load(10**8, 1000), Load(5 * 10**8, 5000))
    turns = setting.pick(1, 1, 3)
    stage.fill(load)
    stage.run_service()
    result: Result = {"label": load.label, "restart_seconds": [], "ways": {way: _empty() for way in WAYS}}
    acts: dict[str, Any] = {
        "rsync_twice": lambda: stage.by_hand(first_copy=True),
        "by_hand": stage.by_hand,
        "commit": stage.commit_save_load,
    }
    try:
        for _ in setting.turns(turns):
            for way, words in WAYS.items():
                witness = watched(stage, writing=True)
                try:
                    if way == "cargo":
                        result["restart_seconds"].append(gap_of(witness, stage.restart)[0])
                        sample = migrated(stage, witness)
                        outage, total = sample.outage, sample.total
                    else:
                        outage, _, _, total = gap_of(witness, acts[way])
                    lost = len(witness.missing_from(stage.home.spec.address))
                finally:
                    witness.stop()
                kept = result["ways"][way]
                kept["outage_seconds"].append(outage)
                kept["total_seconds"].append(total)
                kept["lost"] += lost
                setting.say(f"{words}: outage {outage:.2f} s, in all {total:.1f} s")
    finally:
        stage.clear()
    return result


def _empty() -> dict[str, Any]:
    return {"outage_seconds": [], "total_seconds": [], "lost": 0}


def tables(result: Result) -> list[Table]:
    """One row a way."""
    restart = result["restart_seconds"]
    rows = [["docker restart, for comparison", milliseconds(restart), "1.00", "", ""]]
    for way, kept in result["ways"].items():
        outages = kept["outage_seconds"]
        rows.append(
            [
                WAYS[way],
                milliseconds(outages),
                ratio(outages, restart),
                seconds(kept["total_seconds"]),
                str(kept["lost"]),
            ]
        )
    headings = ("way", "outage, ms", "ratio to docker restart", "in all, s", "acknowledged records lost")
    return [Table(f"{result['label']}, writing", headings, rows)]


CASE = Case(
    name="peers",
    title="Against what people do today",
    about=(
        "The same Redis, under a client that writes all the time, moved in four ways by turns. The scripted ones are as "
        "careful as a person can be: the container has been created on the other host before the stop, every rsync ends "
        "with a sync, `docker save` and `tar` go straight through SSH. None of them verifies what arrived. Not among the "
        "peers: checkpoint/restore, as Debian 12's CRIU does not run on this kernel."
    ),
    run=run,
    tables=tables,
    quick_seconds=30,
    full_seconds=120,
)
