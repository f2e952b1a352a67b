"""Very many seeds, in ranges that are written down one by one: what was run stays known when the run is ended.

One line of JSON a range, appended when all of it is done. Ranges that the file already has are not run again, so the same
command carries on where it was ended, with the same code or with newer; ``code`` tells which it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.simulation import world
from tests.simulation.running import run_many

RANGE_SEEDS = 5000
"""A minute or two: as much is lost when a run is ended in the middle."""
MAX_FAILURES_KEPT = 50
"""Of a range; all are counted. A defect that strikes more often than that is known by the first ones."""
ROOT = Path(__file__).parents[2]
CODE = ("events", "coordinator", "hostd", "tests/simulation")


@dataclass
class Total:
    """What a results file says altogether."""

    seeds: int = 0
    steps: int = 0
    events: int = 0
    core_seconds: float = 0.0
    """Of processor time, so that it says the same however busy the machine was."""
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seeds_by_code: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)


def run(first: int, count: int, jobs: int, results: Path) -> None:
    """Run what is missing of ``count`` seeds from ``first`` on, range after range, each as wide as RANGE_SEEDS."""
    code = code_digest()
    done = {entry["first"]: entry["seeds"] for entry in entries(results)}
    for begin in range(first, first + count, RANGE_SEEDS):
        seeds = min(RANGE_SEEDS, first + count - begin)
        if done.get(begin, 0) >= seeds:
            continue
        began, processor = time.monotonic(), _processor_seconds()
        summary = run_many(begin, seeds, jobs, most_failures=seeds)
        line = {
            "first": begin,
            "seeds": summary.seeds,
            "code": code,
            "compiled": not world.__file__.endswith(".py"),
            "seconds": round(time.monotonic() - began, 1),
            "core_seconds": round(_processor_seconds() - processor, 1),
            "steps": summary.steps,
            "events": summary.events,
            "outcomes": summary.outcomes,
            "faults": summary.faults,
            "failed": len(summary.failures),
            "failures": [
                {"seed": failure.seed, "rule": failure.rule, "words": failure.words}
                for failure in summary.failures[:MAX_FAILURES_KEPT]
            ],
        }
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def entries(results: Path) -> Iterator[dict[str, Any]]:
    """The lines of a results file; one that was cut short in the middle does not count."""
    if not results.exists():
        return
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        yield entry


def total(results: Path) -> Total:
    """All of a results file."""
    result = Total()
    for entry in entries(results):
        result.seeds += entry["seeds"]
        result.steps += entry["steps"]
        result.events += entry["events"]
        result.core_seconds += entry["core_seconds"]
        result.outcomes.update(entry["outcomes"])
        result.faults.update(entry["faults"])
        result.seeds_by_code[entry["code"]] += entry["seeds"]
        result.failures += [failure | {"code": entry["code"]} for failure in entry["failures"]]
    return result


def told(summary: Total) -> str:
    """``summary`` for people."""
    rate = summary.seeds / summary.core_seconds if summary.core_seconds else 0.0
    lines = [f"{summary.seeds} seeds, {summary.steps} steps, {summary.events} events, {rate:.0f} seeds per core-second"]
    for heading, counted in (
        ("how migrations ended", summary.outcomes),
        ("what happened to them", summary.faults),
        ("seeds by the code that ran them", summary.seeds_by_code),
    ):
        lines.append(f"\n{heading}:")
        lines += [f"{times:12}  {name}" for name, times in counted.most_common()]
    lines.append("")
    for failure in summary.failures:
        lines.append(f"seed {failure['seed']} (code {failure['code']}): {failure['words']}")
    if not summary.failures:
        lines.append("every promise was kept")
    return "\n".join(lines)


def code_digest() -> str:
    """Twelve digits for everything that decides what a seed does."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _processor_seconds() -> float:
    """Of this process and of those that have worked for it and ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
