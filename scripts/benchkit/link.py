"""Total time and bytes on the cable, over an unlimited, a limited and a long link, against one ``rsync -a``."""

from __future__ import annotations

from contextlib import nullcontext

from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, ratio, seconds, spread
from benchkit.stage import Load, Stage, moment
from labkit.errors import LabError

LINKS = ((0, 0.0, 3), (100, 0.0, 2), (100, 20.0, 2))
"""Mbit/s (0: not limited), milliseconds of distance there and back, turns at full scale."""


def run(setting: Setting) -> Result:
    """rsync and migration by turns, on each kind of link. The container is idle."""
    stage = setting.stage()
    load = setting.pick(Load(10**5, 10), Load(4 * 10**7, 200), Load(10**8, 500))
    stage.fill(load)
    stage.run_idle()
    links = []
    try:
        for megabits, milliseconds, turns in LINKS:
            kept: Result = {"megabits": megabits, "distance_ms": milliseconds}
            links.append(kept)
            try:
                with (
                    stage.distant(milliseconds) if milliseconds else nullcontext(),
                    stage.limited_link(megabits) if megabits else nullcontext(),
                ):
                    measure(setting, stage, kept, setting.pick(1, 1, turns))
            except LabError as error:
                if not milliseconds:
                    raise
                kept["impossible"] = str(error).splitlines()[0]
            words = f"rsync {kept['rsync_seconds']}, migration {kept['total_seconds']}"
            setting.say(f"{name_of(kept)}: {kept.get('impossible') or words}")
    finally:
        stage.clear()
    return {"label": load.label, "bytes": load.bytes, "links": links}


def measure(setting: Setting, stage: Stage, kept: Result, turns: int) -> None:
    """One kind of link."""
    for key in ("rsync_seconds", "rsync_bytes", "total_seconds", "filled_seconds", "total_bytes"):
        kept[key] = []
    for _ in setting.turns(turns):
        before = stage.sent_bytes(stage.home)
        kept["rsync_seconds"].append(stage.rsync_seconds())
        between = stage.sent_bytes(stage.home)
        home = stage.home
        events = stage.migrate()
        kept["rsync_bytes"].append(between - before)
        kept["total_bytes"].append(stage.sent_bytes(home) - between)
        kept["total_seconds"].append(moment(events, "completed") - moment(events, "requested"))
        kept["filled_seconds"].append(moment(events, "fill_finished") - moment(events, "requested"))


def name_of(kept: Result) -> str:
    """The link, in words."""
    limit = f"{kept['megabits']} Mbit/s" if kept["megabits"] else "not limited"
    return f"{limit}, {kept['distance_ms']:.0f} ms away" if kept["distance_ms"] else limit


def tables(result: Result) -> list[Table]:
    """One row a link."""
    rows = []
    for kept in result["links"]:
        if "impossible" in kept:
            rows.append([name_of(kept), f"not possible here: {kept['impossible']}", *[""] * 7])
            continue
        copy, filled, total = kept["rsync_seconds"], kept["filled_seconds"], kept["total_seconds"]
        rows.append(
            [
                name_of(kept),
                seconds(copy),
                seconds(filled),
                ratio(filled, copy),
                seconds(total),
                ratio(total, copy),
                spread(kept["rsync_bytes"], 1e-6),
                spread(kept["total_bytes"], 1e-6),
                ratio(kept["total_bytes"], kept["rsync_bytes"]),
            ]
        )
    headings = (
        "link",
        "one rsync -a, s",
        "all data there, s",
        "ratio",
        "verified and released, s",
        "ratio",
        "rsync -a, MB sent",
        "migration, MB sent",
        "ratio",
    )
    return [Table(f"{result['label']}, idle container", headings, rows)]


CASE = Case(
    name="link",
    title="A limited link, and a long one",
    about=(
        "One `rsync -a` of the volume and one migration by turns; the link is limited by a token bucket (tbf) on both hosts' "
        "cables. The contents do not compress. MB sent is everything that left the source's interface, etcd's and "
        "SSH's own traffic included. *Away*: one of the hosts is so far from everything else, etcd and the other host, there and back; a small "
        "forwarder between its cable and the bridge keeps every frame for half of that time, in either direction."
    ),
    run=run,
    tables=tables,
    quick_seconds=40,
    full_seconds=135,
)
