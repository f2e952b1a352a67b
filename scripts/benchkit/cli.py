"""The command line: which cases, at which scale, and what becomes of the figures."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table as Shown

from benchkit import agent, budgets, bus, fleet, link, outage, page, peers, service, touch, union
from benchkit.case import Case, Scale, Setting
from benchkit.disk import disk
from benchkit.figures import Table
from benchkit.stage import Stage
from labkit.errors import LabError
from labkit.lab import Lab

CASES = [outage.CASE, peers.CASE, link.CASE, service.CASE, union.CASE, touch.CASE, bus.CASE, fleet.CASE, agent.CASE]
DEFAULT_LAB = "bench"
DEFAULT_SUBNET = "10.77.20"
LATITUDE = 1.25
"""How much longer than expected a case may go on beginning further turns."""


class Run:
    """One run: brings the lab up when a case first asks for it, and takes it down at the end."""

    def __init__(self, scale: Scale, console: Console, lab: str, subnet: str) -> None:
        self._console = console
        self._names = (lab, subnet)
        self._stage: Stage | None = None
        self._leave = contextlib.ExitStack()
        self.setting = Setting(scale, lambda line: console.print(f"  {line}", style="dim"), self.stage)

    def stage(self) -> Stage:
        """The lab with its container."""
        if self._stage is None:
            self._console.print("  bringing the lab up", style="dim")
            name, subnet = self._names
            with contextlib.ExitStack() as stack:  # what fails half-way is taken down before the next case tries
                base = stack.enter_context(disk(name, self.setting.say))
                lab = stack.enter_context(Lab(name, subnet, base=base))
                self._stage = stack.enter_context(contextlib.closing(Stage(lab)))
                self._leave = stack.pop_all()
        return self._stage

    def close(self) -> None:
        """Leave nothing behind."""
        self._leave.close()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures Cargo on this machine, against what people do without it. It never asserts.",
        epilog="Exit codes: 0 measured, 1 a case could not be measured (the others were), 2 wrong usage.",
    )
    made.add_argument("--quick", action="store_true", help="small data sets and few turns")
    made.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--only", action="append", metavar="NAME", help="this case (may be repeated); see --list")
    made.add_argument("--list", action="store_true", help="name the cases, and how long each takes")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures of this run there")
    made.add_argument("--write", action="store_true", help="record the figures in docs/, and write the page and plots")
    made.add_argument("--page", action="store_true", help="only write page and plots again, from the recorded figures")
    made.add_argument("--lab", default=DEFAULT_LAB, metavar="NAME", help="the lab's name (default %(default)s)")
    made.add_argument("--subnet", default=DEFAULT_SUBNET, metavar="A.B.C", help="and its network (default %(default)s)")
    return made


def show(console: Console, table: Table) -> None:
    """A table on the terminal."""
    shown = Shown(*table.headings, title=table.title, box=None, title_justify="left")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)
    for note in table.notes:
        console.print(note, style="dim")
    console.print()


def measure(cases: list[Case], options: argparse.Namespace, console: Console) -> int:
    """Run the cases; returns how many could not be measured. Each is recorded as soon as it is done."""
    scale: Scale = "tiny" if options.tiny else "quick" if options.quick else "full"
    run = Run(scale, console, options.lab, options.subnet)
    done, failed = {}, 0
    try:
        for case in cases:
            console.print(f"[bold]{case.title}[/bold] ({case.name})")
            facts, ticks = page.machine(), page.processor_times()
            began = time.monotonic()
            run.setting.give_up_at = began + LATITUDE * (case.full_seconds if scale == "full" else case.quick_seconds)
            try:
                result = case.run(run.setting)
            except (LabError, TimeoutError, OSError) as error:
                failed += 1
                console.print(f"  could not be measured: {error}", style="red", markup=False)
                continue
            facts["taken_by_others"] = page.taken_by_others(ticks, page.processor_times())
            done[case.name] = page.recorded(case, scale, time.monotonic() - began, result, facts)
            for table in case.tables(result):
                show(console, table)
            if options.write:
                place = page.DOCS / page.FIGURES
                page.write_figures(place, {**page.read_figures(place), case.name: done[case.name]})
                page.write(CASES)
    finally:
        run.close()
    judged = budgets.table(done, measured_only=True)
    if judged.rows:
        show(console, judged)
    if options.json:
        page.write_figures(options.json, done)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    options = parser().parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    names = {case.name: case for case in CASES}
    if unknown := [name for name in options.only or () if name not in names]:
        print(f"scripts/bench: there is no case {', '.join(unknown)}; --list names them", file=sys.stderr)
        return 2
    if options.list:
        for case in CASES:
            console.print(f"{case.name:<9} {case.quick_seconds:>4} s --quick {case.full_seconds:>5} s   {case.title}")
        return 0
    if options.page:
        page.write(CASES)
        return 0
    if os.geteuid() != 0:
        print("scripts/bench: the lab needs root: use sudo", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that the lab is taken down
    return 1 if measure([names[name] for name in options.only or names], options, console) else 0
