"""The project's budgets beside what was measured: one table from the recorded figures. Pure.

A budget is judged by medians, as a ratio within one run where it is one; the worst of all measured data sets counts. Nothing is
asserted: a budget that is not reached stands on the page as such.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchkit.case import Result
from benchkit.figures import Table
from benchkit.union import shares

OUTAGE, OUTAGE_AIM, FLAT = 1.5, 0.5, 1.25
TOTAL, TOTAL_SMALL_FILES, SMALL_FILES = 1.15, 1.0, 100_000
REACTION_MS, EVENTS_PER_SECOND = 10.0, 200
STEADY = 0.95
IN_FLIGHT, RESTART_SECONDS, COORDINATOR_MIB, CORES = 1000, 3.0, 200.0, 1.0
AGENT_MIB, AGENT_PERCENT = 60.0, 0.2
COPIES = ("rsync_seconds", "compared_seconds")
UNKNOWN = "not measured"

ABOUT = (
    "What the project wants to reach, beside what the recorded runs below say; medians, the worst of all data sets. *Flat* is read as: the "
    f"outage with the most bytes, and with the most files, is at most {FLAT} times that of the smallest data set."
)


@dataclass(frozen=True)
class Verdict:
    """One budget."""

    what: str
    budget: str
    measured: str = UNKNOWN
    reached: bool | None = None
    """None when there is nothing to judge."""


@dataclass(frozen=True)
class Named:
    """One figure, and which data set or kind of work it is of."""

    value: float
    name: str


def against(values: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Median over median; None without both."""
    if not values or not baseline or not statistics.median(baseline):
        return None
    return statistics.median(values) / statistics.median(baseline)


def at_most(what: str, budget: str, limit: float, found: Iterable[Named], digits: int = 2, unit: str = "") -> Verdict:
    """The largest figure counts; all are shown, the largest with its name."""
    ordered = sorted(found, key=lambda figure: figure.value)
    if not ordered:
        return Verdict(what, budget)
    low, high = ordered[0], ordered[-1]
    text = f"{high.value:.{digits}f}{unit} ({high.name})"
    if len(ordered) > 1:
        within = sum(figure.value <= limit for figure in ordered)
        text = f"{low.value:.{digits}f} to {text}; {within} of {len(ordered)} within"
    return Verdict(what, budget, text, high.value <= limit)


def at_least(what: str, budget: str, limit: float, found: Iterable[Named]) -> Verdict:
    """The smallest figure counts."""
    ordered = sorted(found, key=lambda figure: figure.value)
    if not ordered:
        return Verdict(what, budget)
    within = sum(figure.value >= limit for figure in ordered)
    text = f"{ordered[0].value:.2f} ({ordered[0].name}) to {ordered[-1].value:.2f}; {within} of {len(ordered)} within"
    return Verdict(what, budget, text, ordered[0].value >= limit)


def outages(result: Result, start: str) -> list[Named]:
    """Outage over ``docker restart``, by data set and what the client does."""
    found = []
    for load in result["loads"]:
        for kind, kept in load["kinds"].items():
            value = against(kept["outage_seconds"], load["restart_seconds"])
            if kind.endswith(start) and value is not None:
                found.append(Named(value, f"{load['label']}, {kind.partition(',')[0]}"))
    return found


def growth(result: Result, start: str) -> list[Named]:
    """Outage with the most bytes, and with the most files, over that of the smallest data set."""
    loads = result["loads"]
    if len(loads) < 2:
        return []
    small = min(loads, key=lambda load: (load["bytes"], load["files"]))
    large = [max(loads, key=lambda load, by=by: load[by]) for by in ("bytes", "files")]
    found = []
    for load in [load for load in large if load is not small]:
        for kind in [kind for kind in load["kinds"] if kind.endswith(start) and kind in small["kinds"]]:
            value = against(load["kinds"][kind]["outage_seconds"], small["kinds"][kind]["outage_seconds"])
            if value is not None:
                found.append(Named(value, f"{load['label']}, {kind.partition(',')[0]}"))
    return found


def judge_outage(result: Result) -> list[Verdict]:
    """Outage, and its being flat."""
    stops, aim = "outage of a container that stops at once", OUTAGE_AIM
    warm, cold, grown = outages(result, "warm"), outages(result, "cold"), growth(result, "warm")
    return [
        at_most(f"{stops}, warm start", f"≤ {OUTAGE} times `docker restart`", OUTAGE, warm),
        at_most(f"{stops}, cold start", f"≤ {OUTAGE} times `docker restart`", OUTAGE, cold),
        at_most(f"{stops}, warm start: the further aim", f"≤ {aim} times `docker restart`", aim, warm),
        at_most("the same in bytes and files, warm start", f"flat: ≤ {FLAT} times the smallest", FLAT, grown),
    ]


def judge_total(result: Result) -> list[Verdict]:
    """The whole migration of an idle container against one rsync; many small files apart."""
    found, compared = ([(load, named) for load in result["loads"] for named in _total(load, key)] for key in COPIES)
    return [
        at_most(
            "whole migration, hybrid, idle container",
            f"≤ {TOTAL} times one `rsync -a`",
            TOTAL,
            [figure for load, figure in found if load["files"] < SMALL_FILES],
        ),
        at_most(
            f"the same with {SMALL_FILES:,} small files",
            f"≤ {TOTAL_SMALL_FILES} times one `rsync -a`",
            TOTAL_SMALL_FILES,
            [figure for load, figure in found if load["files"] >= SMALL_FILES],
        ),
        at_most(
            "for comparison: the same where the copy is compared, too, as a migration is",
            f"≤ {TOTAL} times `rsync -a` and `rsync -a --checksum --dry-run`",
            TOTAL,
            [figure for _, figure in compared],
        ),
    ]


def _total(load: Mapping[str, Any], baseline: str) -> Iterator[Named]:
    value = against(load.get("idle_total_seconds", []), load.get(baseline, []))
    if value is not None:
        yield Named(value, load["label"])


def judge_link(result: Result) -> list[Verdict]:
    """The same by kind of link."""
    from_links = []
    for kept in result["links"]:
        value = against(kept.get("total_seconds", []), kept.get("rsync_seconds", []))
        if value is not None:
            words = f"{kept['megabits']} Mbit/s" if kept["megabits"] else "not limited"
            from_links.append(Named(value, f"{words}, {kept['distance_ms']:.0f} ms" if kept["distance_ms"] else words))
    return [at_most("the same by link", f"≤ {TOTAL} times one `rsync -a`", TOTAL, from_links)]


def judge_bus(result: Result) -> list[Verdict]:
    """Reaction at the rate that the budget names."""
    found = [
        Named(kept["reaction_seconds"]["99"] * 1000, f"{kept['asked_per_second']} events/s")
        for kept in result["rates"]
        if kept["asked_per_second"] == EVENTS_PER_SECOND
    ]
    words = f"bus: append to reaction in another process, p99 at {EVENTS_PER_SECOND} events/s"
    return [at_most(words, f"≤ {REACTION_MS:.0f} ms", REACTION_MS, found, 1, " ms")]


def judge_union(result: Result) -> list[Verdict]:
    """Every kind of work after the release, against the plain volume."""
    made = []
    for phase, words in (
        ("hybrid", "`hybrid`"),
        ("hybrid on a union", "`hybrid` with more to come after the start"),
        ("released", "`postcopy`"),
    ):
        found = [Named(statistics.median(parts), work) for work, parts in shares(result, phase).items() if parts]
        made.append(at_least(f"work after the release, {words}", f"≥ {STEADY} times a plain volume", STEADY, found))
    return made


def judge_fleet(result: Result) -> list[Verdict]:
    """The coordinator with the most in flight."""
    level = max(result["levels"], key=lambda level: level["in_flight"], default={})
    here = f"{level.get('in_flight', 0):,} in flight, {result['hosts']} hosts"
    memory = [level[key] for key in ("resident_mib", "restarted_mib") if key in level]

    def named(values: Sequence[float]) -> list[Named]:
        return [Named(max(values), here)] if values else []

    restart, cores = ([level[key]] if key in level else [] for key in ("restart_seconds", "rest_cores"))
    seconds, mib = f"≤ {RESTART_SECONDS:.0f} s", f"≤ {COORDINATOR_MIB:.0f} MiB"
    made = [
        at_most("coordinator: restart with all of them folded", seconds, RESTART_SECONDS, named(restart), 2, " s"),
        at_most("coordinator: memory", mib, COORDINATOR_MIB, named(memory), 0, " MiB"),
        at_most("coordinator: processor, beside all of them", "one core", CORES, named(cores), 3, " cores"),
    ]
    if level.get("in_flight", 0) < IN_FLIGHT:  # a smaller run says nothing about the budget
        return [Verdict(found.what, found.budget, found.measured) for found in made]
    return made


def judge_agent(result: Result) -> list[Verdict]:
    """The idle agents."""
    agents = result["agents"].items()
    memory = [Named(found["idle_mib"], role) for role, found in agents]
    part = [Named(found["idle_cores"] * 100, role) for role, found in agents]
    return [
        at_most("agent, idle: memory", f"≤ {AGENT_MIB:.0f} MiB", AGENT_MIB, memory, 0, " MiB"),
        at_most("agent, idle: processor", f"≤ {AGENT_PERCENT} % of a core", AGENT_PERCENT, part, 2, " %"),
    ]


JUDGES: tuple[tuple[str, Callable[[Result], list[Verdict]]], ...] = (
    ("outage", judge_outage),
    ("outage", judge_total),
    ("link", judge_link),
    ("bus", judge_bus),
    ("union", judge_union),
    ("fleet", judge_fleet),
    ("agent", judge_agent),
)
EMPTY: dict[str, Result] = {
    "outage": {"loads": []},
    "link": {"links": []},
    "bus": {"rates": []},
    "union": {"phases": {}},
    "fleet": {"hosts": 0, "levels": []},
    "agent": {"agents": {}},
}
"""A case of which nothing was recorded: its budgets are on the page all the same."""


def verdicts(figures: Mapping[str, Any]) -> list[Verdict]:
    """All budgets, by what is recorded."""
    made: list[Verdict] = []
    for case, judge in JUDGES:
        kept = figures.get(case, {"result": EMPTY[case]})
        scale = kept.get("scale", "full")
        for found in judge(kept["result"]):
            short = scale != "full" and found.measured != UNKNOWN
            made.append(replace(found, measured=f"{found.measured}, with `--{scale}`") if short else found)
    return made


def table(figures: Mapping[str, Any], *, measured_only: bool = False) -> Table:
    """One row a budget."""
    words = {True: "yes", False: "**no**", None: "-"}
    shown = [found for found in verdicts(figures) if found.measured != UNKNOWN or not measured_only]
    rows = [[found.what, found.budget, found.measured, words[found.reached]] for found in shown]
    return Table("Budgets", ("what", "budget", "measured", "reached"), rows)
