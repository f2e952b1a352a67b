"""The ways in which people move a container today, on the same lab with the same data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchkit import original
from benchkit.case import Case, Result, Setting
from benchkit.checkpoint import CheckpointStage, reason
from benchkit.figures import NOTHING, Table, milliseconds, ratio, seconds
from benchkit.outage import gap_of, migrated, watched
from benchkit.plots import bars
from benchkit.stage import Load, Stage
from labkit.errors import LabError

WAYS = {
    "cargo": "Cargo",
    "rsync_twice": "rsync-stop-rsync-start",
    "by_hand": "stop-rsync-start",
    "commit": "docker commit, save, load, and tar",
    "original": "the first Cargo: union over the whole remote, one rsync a file, stop and start again",
    "checkpoint": "rsync, docker checkpoint, rsync, restore",
}
CLIENTS = ("writing", "idle")
"""By turns."""
TINY = ((Load(10**5, 10), 1),)
QUICK = ((Load(10**8, 200), 2),)
FULL = ((Load(10**6, 10), 4), (Load(10**9, 1000), 2))
"""Data set, and turns of every way."""


@dataclass
class Move:
    """What one move cost, in seconds."""

    outage: float
    total: float
    lost: int
    second_outage: float | None = None
    """Of a way that stops the container once more."""


def run(setting: Setting) -> Result:
    """Each way in turn, for each data set; checkpoint and restore beside its own ``docker restart``, on its own hosts."""
    stage = setting.stage()
    loads = [begun(load) for load, _ in setting.pick(TINY, QUICK, FULL)]
    result: Result = {"loads": loads, "impossible": {}, "versions": {}}
    if why := original.missing():
        result["impossible"]["original"] = why
    for kept, (load, turns) in zip(loads, setting.pick(TINY, QUICK, FULL), strict=True):
        if kept is not loads[0] and setting.late:
            setting.say(f"this machine is slow: {load.label} is left out")
        else:
            measure(setting, stage, load, turns, kept, set(result["impossible"]))
    try:
        measure_checkpoints(setting, stage, result)
    except (LabError, TimeoutError, OSError) as error:
        result["impossible"]["checkpoint"] = reason(str(error))
        setting.say(f"checkpoint and restore: not possible here: {reason(str(error))}")
    return result


def begun(load: Load) -> Result:
    """A data set of which nothing was measured yet."""
    return {"label": load.label, "restart_seconds": [], "checkpoint_restart_seconds": [], "ways": {}}


def measure(setting: Setting, stage: Stage, load: Load, turns: int, kept: Result, left_out: set[str]) -> None:
    """One data set, all ways but the checkpoint."""
    setting.say(f"{load.label}: filling the volume")
    stage.fill(load)
    stage.run_service()
    acts: dict[str, Callable[[], Any]] = {
        "rsync_twice": lambda: stage.by_hand(first_copy=True),
        "by_hand": stage.by_hand,
        "commit": stage.commit_save_load,
        "original": lambda: original.move(stage),
    }
    try:
        for turn in setting.turns(turns):
            client = CLIENTS[turn % len(CLIENTS)]
            for way in [way for way in ("cargo", *acts) if way not in left_out]:
                with watching(stage, client) as witness:
                    if way == "cargo":
                        kept["restart_seconds"].append(gap_of(witness, stage.restart)[0])
                        sample = migrated(stage, witness)
                        move = Move(sample.outage, sample.total, 0)
                    else:
                        outage, _, _, returned = gap_of(witness, acts[way])
                        total, again = returned if isinstance(returned, tuple) else (returned, None)
                        move = Move(outage, total, 0, None if again is None else witness.longest_gap(again)[0])
                    if client == "writing":
                        move.lost = len(witness.missing_from(stage.home.spec.address))
                keep(setting, kept, way, client, move)
    finally:
        stage.clear()


def measure_checkpoints(setting: Setting, stage: Stage, result: Result) -> None:
    """Every data set. Raises LabError when it cannot be done here; what was measured until then stays."""
    pair = CheckpointStage(stage.lab)
    result["versions"]["checkpoint"] = pair.versions
    try:
        for kept, (load, turns) in zip(result["loads"], setting.pick(TINY, QUICK, FULL), strict=True):
            if not kept["ways"]:
                continue  # there was no time for it
            setting.say(f"{load.label}: filling the volume on {pair.home.spec.name}")
            pair.begin(load)
            try:
                for turn in setting.turns(turns):
                    client = CLIENTS[turn % len(CLIENTS)]
                    with watching(pair, client) as witness:
                        kept["checkpoint_restart_seconds"].append(gap_of(witness, pair.restart)[0])
                        outage, _, _, total = gap_of(witness, pair.move)
                        missing = witness.missing_from(pair.away.spec.address) if client == "writing" else []
                    keep(setting, kept, "checkpoint", client, Move(outage, total, len(missing)))
                    pair.put_back()
            finally:
                pair.clear()
    finally:
        pair.close()


@contextmanager
def watching(stage: Stage, client: str) -> Iterator[Any]:
    """A client as long as this lasts."""
    witness = watched(stage, writing=client == "writing")
    try:
        yield witness
    finally:
        witness.stop()


def keep(setting: Setting, kept: Result, way: str, client: str, move: Move) -> None:
    """One more figure of each kind."""
    found = kept["ways"].setdefault(way, {}).setdefault(client, {"outage_seconds": [], "total_seconds": [], "lost": 0})
    found["outage_seconds"].append(move.outage)
    found["total_seconds"].append(move.total)
    found["lost"] += move.lost
    again = ""
    if move.second_outage is not None:
        found.setdefault("second_outage_seconds", []).append(move.second_outage)
        again = f" and {move.second_outage:.2f} s"
    setting.say(f"{kept['label']}, {client}, {WAYS[way]}: outage {move.outage:.2f} s{again}, in all {move.total:.1f} s")


def tables(result: Result) -> list[Table]:
    """One table a data set, one row a way."""
    return [_table(kept, result) for kept in result["loads"] if kept["ways"]]


def _table(kept: Result, result: Result) -> Table:
    rows = [["docker restart, for comparison", milliseconds(kept["restart_seconds"]), "", "1.00", "", "", ""]]
    for way, words in WAYS.items():
        found = kept["ways"].get(way)
        if found is None:
            why = result["impossible"].get(way)
            rows.append([words, f"not possible here: {why}" if why else "not measured", *[""] * 5])
            continue
        own = way == "checkpoint"
        restart = kept["checkpoint_restart_seconds" if own else "restart_seconds"]
        outages = {client: found.get(client, {}).get("outage_seconds", []) for client in CLIENTS}
        again, totals = (
            [value for each in found.values() for value in each.get(key, [])]
            for key in ("second_outage_seconds", "total_seconds")
        )
        version = f" ({result['versions'][way]}; `docker restart` there {milliseconds(restart)} ms)" if own else ""
        rows.append(
            [
                words + version,
                milliseconds(outages["writing"]),
                milliseconds(outages["idle"]),
                ratio([value for values in outages.values() for value in values], restart),
                milliseconds(again) if again else NOTHING,
                seconds(totals),
                str(sum(each["lost"] for each in found.values())),
            ]
        )
    headings = (
        "way",
        "outage while writing, ms",
        "while idle, ms",
        "ratio to docker restart",
        "second outage, ms",
        "in all, s",
        "acknowledged records lost",
    )
    return Table(kept["label"], headings, rows)


def plots(result: Result) -> dict[str, str]:
    """The client's outage by data set and way; of a way with two outages, both together."""
    loads = [kept for kept in result["loads"] if kept["ways"]]

    def middle(kept: Result, way: str) -> float | None:
        found = [each for client in kept["ways"].get(way, {}).values() for each in _away(client)]
        return statistics.median(found) * 1000 if found else None

    series: dict[str, list[float | None]] = {
        "docker restart": [statistics.median(kept["restart_seconds"]) * 1000 for kept in loads]
    }
    series |= {words.partition(":")[0]: [middle(kept, way) for kept in loads] for way, words in WAYS.items()}
    title = "Time without an answer, by way (ms, logarithmic)"
    return {"peers.svg": bars(title, [kept["label"] for kept in loads], series, logarithmic=True)}


def _away(client: Result) -> list[float]:
    again = client.get("second_outage_seconds") or [0.0] * len(client["outage_seconds"])
    return [first + second for first, second in zip(client["outage_seconds"], again, strict=True)]


CASE = Case(
    name="peers",
    title="Against what people do today",
    about=(
        "The same Redis, moved in several ways by turns, under a client that writes all the time and under one that only reads. The scripted "
        "ones are as careful as a person can be: the container has been created on the other host before the stop, every rsync ends "
        "with a sync, `docker save` and `tar` go straight through SSH. None of them verifies what arrived. *The first Cargo* mounts the source by sshfs, "
        "merges it with what has arrived (mergerfs), puts an overlay over both, starts on that at once and fetches every file by an rsync of its own; then it "
        "stops the container again, to go over to a plain volume (its flaws, such as copying before the stop and never again, are left "
        "out: only its way is compared). *Checkpoint* moves the running process with its memory, so it loads nothing anew; it needs a newer Docker and CRIU and "
        "therefore other hosts (of Debian 13, with the CRIU of Debian's unstable suite, fetched once), with a `docker restart` of their own to compare "
        "with; open connections are closed."
    ),
    run=run,
    tables=tables,
    plots=plots,
    quick_seconds=75,
    full_seconds=270,
)
