"""``python -m tests.fuzz``: see ``scripts/fuzz``."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from events.errors import CargoError
from tests.fuzz import campaign
from tests.fuzz.targets import TARGETS

BATCH = 5000
"""Inputs a target gets in its turn, so that a run that is broken off has looked at all of them."""


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when nothing was found."""
    names = ", ".join(TARGETS)
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Broken and hostile input for everything that reads what another program wrote.",
        epilog=f"Targets: {names}",
    )
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N", help="in all (default: 100000)")
    parser.add_argument("--only", action="append", metavar="NAME", help="this target only; may be given several times")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="decides all inputs (default: 0)")
    parser.add_argument(
        "--keep", type=Path, default=Path("build/fuzz"), metavar="DIR", help="where inputs go that found something"
    )
    parser.add_argument(
        "--replay", type=Path, nargs="+", metavar="FILE", help="give kept inputs once more, and show what happens"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only or () if name not in TARGETS]
    if unknown:
        parser.error(f"there is no target {unknown[0]!r}; there are: {names}")
    if options.replay:
        return _replay(options.replay)
    campaign.bound_memory()
    return _run([TARGETS[name] for name in options.only or TARGETS], options.inputs, options.seed, options.keep)


def _run(targets: list[campaign.Target], wanted: int, seed: int, directory: Path) -> int:
    total = {target.name: campaign.Report(target.name) for target in targets}
    shares = sum(target.weight for target in targets)
    goals = {target.name: -(-wanted * target.weight // shares) for target in targets}
    while open_ones := [target for target in targets if total[target.name].inputs < goals[target.name]]:
        for target in open_ones:
            whole = total[target.name]
            count = min(BATCH, goals[target.name] - whole.inputs)
            part = campaign.run(target, count, seed, whole.inputs)
            for file in campaign.keep(part, directory):
                print(f"{target.name}: FOUND, kept as {file}", flush=True)
            whole.inputs += part.inputs
            whole.accepted += part.accepted
            whole.seconds += part.seconds
            whole.findings |= part.findings
        done, seconds = sum(r.inputs for r in total.values()), sum(r.seconds for r in total.values())
        print(f"{done} of {sum(goals.values())} inputs, {done / max(seconds, 0.001):.0f} a second", flush=True)
    print(f"\n{'target':<16}{'inputs':>9}{'accepted':>10}{'a second':>10}  found")
    for report in total.values():
        rate = report.inputs / max(report.seconds, 0.001)
        found = "; ".join(report.findings) or "nothing"
        print(f"{report.target:<16}{report.inputs:>9}{report.accepted:>10}{rate:>10.0f}  {found}")
    return 1 if any(report.findings for report in total.values()) else 0


def _replay(files: list[Path]) -> int:
    worst = 0
    for file in files:
        target = TARGETS[file.name.rpartition("-")[0]]
        raw = file.read_bytes()
        print(f"{file}: {len(raw)} bytes: {raw[:200]!r}")
        try:
            target.run(raw)
        except CargoError as error:
            print(f"  refused: {error}")
        except Exception:  # what it is, is what is asked for
            worst = 1
            traceback.print_exc()
        else:
            print("  accepted")
    return worst


if __name__ == "__main__":
    sys.exit(main())
