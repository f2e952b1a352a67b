"""``python -m tests.simulation``: run seeds, or replay one. See ``scripts/simulate``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.simulation import campaign, compiled
from tests.simulation.running import run_many
from tests.simulation.scheduler import Simulation


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every promise was kept."""
    parser = argparse.ArgumentParser(
        prog="scripts/simulate",
        description="The same cores, a simulated fleet, and a seed that decides all that happens.",
    )
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many seeds to run (default: 1000)")
    parser.add_argument(
        "--from", type=int, default=0, dest="first", metavar="SEED", help="the first of them (default: 0)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="how many processes (default: 1)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one seed and print everything that happened")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="write every few thousand seeds down there, and run only what it lacks: for runs of hours",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="say what such a file holds, and run nothing")
    parser.add_argument(
        "--compiled", action="store_true", help="run a copy compiled by mypyc: made once in minutes, twice as fast"
    )
    options = parser.parse_args(arguments)
    if options.compiled and not compiled.is_compiled():
        compiled.run_compiled(sys.argv[1:] if arguments is None else arguments)
    if options.report is not None or options.results is not None:
        if options.report is None:
            campaign.run(options.first, options.seeds, options.jobs, options.results)
        total = campaign.total(options.report or options.results)
        print(campaign.told(total))
        return 1 if total.failures else 0
    return _replay(options.replay) if options.replay is not None else _many(options.first, options.seeds, options.jobs)


def _replay(seed: int) -> int:
    simulation = Simulation(seed)
    result = simulation.run()
    print(simulation.transcript.text())
    print(f"\nseed {seed}: {result.words or 'every promise was kept'}")
    print(f"{result.events} events, {result.steps} steps, digest {result.digest}")
    return 0 if result.good else 1


def _many(first: int, count: int, jobs: int) -> int:
    began = time.monotonic()
    summary = run_many(first, count, jobs, tell=_tell if sys.stderr.isatty() else None)
    seconds = time.monotonic() - began
    print(f"{summary.seeds} seeds from {first} in {seconds:.1f} s: {summary.seeds / seconds:.1f} seeds per second")
    print(f"{summary.events} events, {summary.steps} steps")
    for outcome, times in sorted(summary.outcomes.items(), key=lambda pair: -pair[1]):
        print(f"{times:9}  {outcome}")
    for result in summary.failures:
        print(f"seed {result.seed}: {result.words}")
    if not summary.failures:
        print("every promise was kept")
        return 0
    worst = summary.failures[0]
    print(f"\n{worst.transcript}\n\nscripts/simulate --replay {worst.seed}   shows this again")
    return 1


def _tell(done: int) -> None:
    print(f"\r{done} seeds", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
