"""Outage and total time over size and number of files, against ``docker restart``, one rsync, and stop-rsync-start."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, milliseconds, ratio, seconds
from benchkit.plots import bars
from benchkit.stage import PORT, Load, Stage, clock, moment
from events.schema import Event
from labkit.witness import AskingSession, RedisSession, Witness

PAUSE_SECONDS = 0.001
SETTLE_ANSWERS = 30
RESTARTS = 3
"""Before each migration: now and then one takes a second longer, and large data sets have few turns."""
WARM = (("idle", "warm"), ("writing", "warm"))
KINDS = (*WARM, ("idle", "cold"), ("writing", "cold"))
"""What the client does, and how the container is started on the target."""
TINY = ((Load(10**5, 10), WARM, 2, 1),)
QUICK = ((Load(10**6, 10), KINDS, 4, 2), (Load(2 * 10**8, 10), WARM, 2, 1), (Load(4 * 10**7, 10_000), WARM, 2, 1))
FULL = (
    (Load(10**6, 10), KINDS, 12, 3),
    (Load(10**9, 10), KINDS, 4, 2),
    (Load(4 * 10**6, 1000), KINDS, 8, 2),
    (Load(4 * 10**8, 100_000), WARM, 4, 1),
    (Load(10**10, 10), WARM, 4, 1),
)
"""Data set; the kinds that its migrations go round; how many of these; turns of stop-rsync-start. The largest comes last: while the
file system gives back what it took, every fsync may wait for a second, and with it a service that answers only after one."""
PARTS = (
    "stop",
    "list what changed",
    "append, watch",
    "apply the list (prune)",
    "mounts",
    "claim",
    "start",
    "first answer",
)


@dataclass
class Sample:
    """One migration, in seconds."""

    outage: float
    total: float
    filled: float
    start: str
    """``warm`` or ``cold``, as the history says."""
    parts: dict[str, float] = field(default_factory=dict)


def watched(stage: Stage, *, writing: bool) -> Witness:
    """A client outside of the hosts, already answered: one request every millisecond."""
    witness = Witness(stage.addresses, PORT, PAUSE_SECONDS, connect=RedisSession if writing else AskingSession)
    witness.attempted = stage.first_record()
    witness.start()
    return witness


def gap_of(witness: Witness, act: Any) -> tuple[float, float, float, Any]:
    """Do ``act`` under the client's eyes: outage, last and first answer (wall clock), and what it returned.

    If the service has moved, the outage lies between its last answer here and its first answer there; else it is the
    longest time between two answers.
    """
    witness.wait_for_more(SETTLE_ANSWERS)
    began = time.monotonic()
    returned = act()
    witness.wait_for_more(SETTLE_ANSWERS)
    answers = [answer for answer in witness.answers if answer.at >= began]
    moves = [pair for pair in itertools.pairwise(answers) if pair[0].address != pair[1].address]
    last, first = moves[-1] if moves else witness.longest_gap(began)[1:]
    offset = time.time() - time.monotonic()
    return first.at - last.at, last.at + offset, first.at + offset, returned


def parts_of(
    events: list[Event], log: list[dict[str, Any]], last_answer: float, first_answer: float
) -> dict[str, float]:
    """Where the outage went: from the events' times, and from what the agents' logs say of each effect."""
    stopped, claimed, started = (
        moment(events, kind) for kind in ("source_stopped", "target_claimed", "target_started")
    )
    done = {entry["step"]: entry.get("effects", {}) for entry in log if entry["event"] == "step done"}
    begun = {entry["step"]: clock(entry["timestamp"]) for entry in log if entry["event"] == "step begins"}
    publish = done.get("stop", {}).get("publish_dirty", 0.0)
    unite = done.get("unite", {})
    listed = begun.get("unite", stopped)
    return {
        "stop": max(0.0, stopped - publish - last_answer),
        "list what changed": publish,
        "append, watch": max(0.0, listed - stopped),
        "apply the list (prune)": unite.get("attach_remote", 0.0) + unite.get("apply_dirty", 0.0),
        "mounts": unite.get("mount_union", 0.0),
        "claim": max(0.0, claimed - listed - sum(unite.values())),
        "start": started - claimed,
        "first answer": first_answer - started,
    }


def migrated(stage: Stage, witness: Witness, start: str = "warm") -> Sample:
    """One migration under the client's eyes, folded afterwards."""

    def move() -> tuple[str, list[Event]]:
        name = stage.ask(start=start)
        return name, stage.wait(name, {"completed"})

    outage, last, first, (name, events) = gap_of(witness, move)
    stage.arrived()
    sample = Sample(
        outage=outage,
        total=moment(events, "completed") - moment(events, "requested"),
        filled=moment(events, "fill_finished") - moment(events, "requested"),
        start=next(getattr(event.data, "start", "cold") for event in events if event.type == "target_started"),
        parts=parts_of(events, stage.log_lines(name), last, first),
    )
    stage.fold(name)
    return sample


def measure(
    setting: Setting, stage: Stage, load: Load, going_round: tuple[tuple[str, str], ...], turns: int, by_hand: int
) -> Result:
    """One data set: the ways take turns."""
    setting.say(f"{load.label}: filling the volume")
    stage.fill(load)
    stage.run_service()
    series: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, dict[str, Any]] = {}
    lost = 0
    try:
        for turn in setting.turns(turns):
            client, start = going_round[turn % len(going_round)]
            # What is written during the copy would only make the service's log longer, which it reads at each start.
            witness = watched(stage, writing=False)
            try:
                copy = stage.rsync_seconds(series["compared_seconds"])
            finally:
                witness.stop()
            witness = watched(stage, writing=client == "writing")
            try:
                restarts = [gap_of(witness, stage.restart)[0] for _ in range(RESTARTS)]
                sample = migrated(stage, witness, start)
                if client == "writing":
                    lost += len(witness.missing_from(stage.home.spec.address))
            finally:
                witness.stop()
            series["restart_seconds"] += restarts
            series["rsync_seconds"].append(copy)
            series[f"{client}_total_seconds"].append(sample.total)
            series[f"{client}_filled_seconds"].append(sample.filled)
            kept = kinds.setdefault(f"{client}, {sample.start}", {"outage_seconds": [], "parts_seconds": []})
            kept["outage_seconds"].append(sample.outage)
            kept["parts_seconds"].append(sample.parts)
            setting.say(
                f"{load.label}, {client}, {sample.start}: restart {statistics.median(restarts) * 1000:.0f} ms, outage "
                f"{sample.outage * 1000:.0f} ms; rsync {copy:.1f} s, migration {sample.total:.1f} s"
            )
            if turn < by_hand:
                witness = watched(stage, writing=False)
                try:
                    outage, _, _, took = gap_of(witness, stage.by_hand)
                finally:
                    witness.stop()
                series["by_hand_outage_seconds"].append(outage)
                series["by_hand_total_seconds"].append(took)
                setting.say(f"{load.label}: stop-rsync-start {took:.1f} s")
    finally:
        stage.clear()
    return {
        "label": load.label,
        "bytes": load.bytes,
        "files": load.files,
        "acknowledged_records_lost": lost,
        "kinds": kinds,
        **series,
    }


def run(setting: Setting) -> Result:
    """All data sets."""
    stage = setting.stage()
    loads = setting.pick(TINY, QUICK, FULL)
    measured = []
    for load, *how in loads:
        if setting.late:
            setting.say(f"this machine is slow: {load.label} is left out")
        else:
            measured.append(measure(setting, stage, load, *how))
    return {"loads": measured}


def tables(result: Result) -> list[Table]:
    """Outage, total time, and the parts of the outage."""
    outages, totals, parts = [], [], []
    for load in result["loads"]:
        restart, copy = load["restart_seconds"], load["rsync_seconds"]
        for kind, kept in load["kinds"].items():
            found = kept["outage_seconds"]
            outages.append(
                [
                    load["label"],
                    kind,
                    milliseconds(found),
                    milliseconds(restart),
                    ratio(found, restart),
                    milliseconds(load.get("by_hand_outage_seconds", [])),
                    str(load["acknowledged_records_lost"]),
                ]
            )
            parts.append(
                [
                    f"{load['label']}, {kind}",
                    *(
                        milliseconds([statistics.median(sample[part] for sample in kept["parts_seconds"])])
                        for part in PARTS
                    ),
                ]
            )
        total, filled = load.get("idle_total_seconds", []), load.get("idle_filled_seconds", [])
        busy, compared = load.get("writing_total_seconds", []), load.get("compared_seconds", [])
        totals.append(
            [
                load["label"],
                seconds(copy),
                seconds(compared),
                seconds(load.get("by_hand_total_seconds", [])),
                seconds(filled),
                ratio(filled, copy),
                seconds(total),
                ratio(total, copy),
                ratio(total, compared),
                seconds(busy),
                ratio(busy, copy),
            ]
        )
    return [
        Table(
            "Outage, ms",
            (
                "data",
                "client, start",
                "migration",
                "docker restart",
                "ratio",
                "stop-rsync-start",
                "acknowledged records lost",
            ),
            outages,
        ),
        Table(
            "Total time, s",
            (
                "data",
                "one rsync -a",
                "rsync -a, then compared",
                "stop-rsync-start",
                "all data there, idle",
                "ratio to rsync",
                "verified and released, idle",
                "ratio to rsync",
                "ratio to rsync, compared",
                "verified and released, writing",
                "ratio to rsync",
            ),
            totals,
        ),
        Table(
            "Where the outage goes, ms (medians)",
            ("data", *PARTS),
            parts,
            [
                "*stop* runs from the client's last answer until the container's first process has ended (and with it all others); "
                "*apply the list* and *mounts* are the target's, and end with the claim, whose own append to etcd is in *start*, "
                "as is the moment that a warm container needs from its gate to its first instruction; *first answer* from the event "
                "`target_started` to the client's first answer, and is below zero where the service answered before the "
                "event was written."
            ],
        ),
    ]


def plots(result: Result) -> dict[str, str]:
    """Outage by data set."""
    labels = [load["label"] for load in result["loads"]]

    def middle(values: list[float]) -> float | None:
        return statistics.median(values) * 1000 if values else None

    series = {"docker restart": [middle(load["restart_seconds"]) for load in result["loads"]]}
    for client, start in KINDS:
        kind = f"{client}, {start}"
        if any(kind in load["kinds"] for load in result["loads"]):
            series[f"migration, {kind}"] = [
                middle(load["kinds"].get(kind, {}).get("outage_seconds", [])) for load in result["loads"]
            ]
    series["stop-rsync-start"] = [middle(load.get("by_hand_outage_seconds", [])) for load in result["loads"]]
    return {"outage.svg": bars("Outage as a client sees it (ms, logarithmic)", labels, series, logarithmic=True)}


CASE = Case(
    name="outage",
    title="Outage and total time",
    about=(
        "A Redis that fsyncs every write, with further data beside it in the same volume, is moved back and forth; before "
        "each migration the tree is copied once with `rsync -a`, sync included (*then compared*: and read once more on both sides by `rsync -a --checksum --dry-run`, as a careful person "
        "would before letting go of the source), under a client that only reads, and then the container is restarted three times with `docker restart`. Outage is the time between the last answer here and the first answer there (of a restart: the longest between two "
        "answers) to a client outside of the hosts that asks every millisecond. *Idle*: the client only reads, so nothing changes. *Writing*: it writes all the time, and "
        "looks afterwards for every record that was acknowledged. The source keeps its copy, as it does unless asked otherwise; it is removed between the turns. *Warm* and *cold*: how the target starts the container. *All data there* ends with `fill_finished`; *verified and "
        "released* with `completed`, when every byte has been read again on both hosts and compared. Docker forwards a port "
        "before the container answers for its address; a client that asks in between makes the kernel look for it in vain, and "
        "again only a second later. Cargo announces the container, Docker does not: where a restart took more than a second, "
        "one second of it is this."
    ),
    run=run,
    tables=tables,
    plots=plots,
    quick_seconds=90,
    full_seconds=780,
)
