"""Many seeds, on one or several processes."""

from __future__ import annotations

import gc
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tests.simulation.scheduler import Result, run_seed

CHUNK = 25
GARBAGE_OBJECTS = 200_000
MAX_FAILURES = 20
"""More would only hide the first."""


@dataclass
class Summary:
    """What became of many seeds."""

    seeds: int = 0
    events: int = 0
    steps: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """How often a migration ended in each state."""
    faults: Counter[str] = field(default_factory=Counter)
    """What happened to them, by kind."""
    failures: list[Result] = field(default_factory=list)


def run_many(
    first: int,
    count: int,
    jobs: int,
    *,
    tell: Callable[[int], None] | None = None,
    most_failures: int = MAX_FAILURES,
) -> Summary:
    """Run ``count`` seeds from ``first`` on. Stops early after ``most_failures`` broken promises."""
    summary = Summary()
    for result in _results(range(first, first + count), jobs):
        summary.seeds += 1
        summary.events += result.events
        summary.steps += result.steps
        summary.faults.update(result.faults)
        summary.outcomes.update(result.outcomes or ("nothing was asked for",))
        if not result.good:
            summary.failures.append(result)
        if tell is not None and summary.seeds % 100 == 0:
            tell(summary.seeds)
        if len(summary.failures) >= most_failures:
            break
    summary.failures.sort(key=lambda result: result.seed)
    return summary


def _results(seeds: range, jobs: int) -> Iterator[Result]:
    if jobs <= 1:
        yield from map(_lean, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _prepare) as pool:
        for fields_of_one in pool.imap_unordered(_as_fields, seeds, chunksize=CHUNK):
            yield Result(**fields_of_one)
        pool.close()
        pool.join()


def _prepare() -> None:
    """A worker collects garbage once in some seeds, and never looks through the modules for it."""
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, 10, 100)


def _as_fields(seed: int) -> dict[str, Any]:
    """A result as it goes from process to process: a compiled one cannot be pickled itself."""
    result = _lean(seed)
    return {field.name: getattr(result, field.name) for field in fields(result)}


def _lean(seed: int) -> Result:
    result = run_seed(seed)
    return result if not result.good else replace(result, transcript="")
