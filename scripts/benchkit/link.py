"""Total time and bytes on the cable, over an unlimited and a limited link, against one ``rsync -a``."""

from __future__ import annotations

from contextlib import nullcontext

from benchkit.case import Case, Result, Setting
from benchkit.figures import Table, ratio, seconds, spread
from benchkit.stage import Load, moment

MEGABITS = 100


def run(setting: Setting) -> Result:
    """rsync and migration by turns, on both kinds of link. The container is idle."""
    stage = setting.stage()
    load = setting.pick(Load(10**5, 10), Load(4 * 10**7, 200), Load(10**8, 500))
    turns = setting.pick(1, 1, 3)
    stage.fill(load)
    stage.run_idle()
    links = []
    try:
        for megabits in (0, MEGABITS):
            kept: Result = {"megabits": megabits}
            for key in ("rsync_seconds", "rsync_bytes", "total_seconds", "filled_seconds", "total_bytes"):
                kept[key] = []
            with stage.limited_link(megabits) if megabits else nullcontext():
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
            setting.say(f"{megabits or 'unlimited'}: rsync {kept['rsync_seconds']}, migration {kept['total_seconds']}")
            links.append(kept)
    finally:
        stage.clear()
    return {"label": load.label, "bytes": load.bytes, "links": links}


def tables(result: Result) -> list[Table]:
    """One row a link."""
    rows = []
    for kept in result["links"]:
        copy, filled, total = kept["rsync_seconds"], kept["filled_seconds"], kept["total_seconds"]
        rows.append(
            [
                f"{kept['megabits']} Mbit/s" if kept["megabits"] else "not limited",
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
    title="A limited link",
    about=(
        "One `rsync -a` of the volume and one migration by turns; the link is limited by a token bucket (tbf) on both hosts' "
        "cables. The contents do not compress. MB sent is everything that left the source's interface, etcd's and "
        "SSH's own traffic included. A longer distance is not simulated: the kernel here has no netem."
    ),
    run=run,
    tables=tables,
    quick_seconds=25,
    full_seconds=90,
)
