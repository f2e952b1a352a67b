"""``scripts/coverage-of-faults``: rows of the fault catalogue, the tests that name them, and how those went.

A test that checks a row begins its docstring with the row's id: ``D12: …`` or ``P6, B15: …``. Test files are parsed, never
imported. Each row also says how its tests went when they last ran: ``scripts/test`` keeps what ``pytest --junitxml`` writes
in ``build/test-results``, and ``--results`` names other such files.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[2]
CATALOGUE = REPOSITORY.parent / "shared" / "FAULTS.md"
"""Where the catalogue lies in a full workspace; without it the list in ROWS is used."""
ROWS = Path(__file__).with_name("rows.json")
RESULTS = REPOSITORY / "build" / "test-results"
PAGE = REPOSITORY / "docs" / "fault-coverage.md"
MARK = re.compile(r"\s*([A-Z]\d{1,2}(?:(?:\s*[,/]\s*|\s+)[A-Z]\d{1,2})*)\s*:")
ROW = re.compile(r"\|\s*([A-Z]\d{1,2})\s*\|\s*(.+?)\s*\|")
MOST_WORDS = 110
GROUPS = {
    "P": "Properties",
    "A": "Process and host",
    "B": "etcd",
    "C": "Network and SSH",
    "D": "Copying and file system",
    "O": "Overlay",
    "F": "Docker objects and requests",
    "E": "What etcd promises",
}


class Checked(NamedTuple):
    """One test function."""

    file: str
    name: str
    rows: tuple[str, ...]


def catalogue(file: Path) -> dict[str, str]:
    """Id and short text of every row, in the order of the catalogue."""
    rows: dict[str, str] = {}
    for line in file.read_text().splitlines():
        found = ROW.match(line)
        if found:
            text = re.sub(r"[*`]", "", found[2]).replace("\\|", "|")
            rows[found[1]] = text if len(text) <= MOST_WORDS else text[: MOST_WORDS - 1].rstrip() + "…"
    return rows


def known_rows() -> dict[str, str]:
    """The catalogue, or the list kept beside this file."""
    if CATALOGUE.exists():
        return catalogue(CATALOGUE)
    rows: dict[str, str] = json.loads(ROWS.read_text())
    return rows


def checks_in(directory: Path) -> list[Checked]:
    """Every test below ``directory``, with the rows that its docstring names first."""
    found = []
    for file in sorted(directory.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                mark = MARK.match(ast.get_docstring(node) or "")
                rows = tuple(re.findall(r"[A-Z]\d{1,2}", mark[1])) if mark else ()
                found.append(Checked(str(file.relative_to(directory.parent)), node.name, rows))
    return found


def results_in(file: Path) -> dict[tuple[str, str], str]:
    """``passed``, ``failed`` or ``skipped`` of each test function that ran, by file and name; the worst of its cases."""
    order = ("passed", "skipped", "failed")
    found: dict[tuple[str, str], str] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        result = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        where = case.get("classname", "").replace(".", "/") + ".py"
        key = (where, case.get("name", "").partition("[")[0])
        found[key] = max(found.get(key, "passed"), result, key=order.index)
    return found


def last_results(files: list[Path]) -> dict[tuple[str, str], str]:
    """How each test function went when it last ran. ``files`` in the order of the runs; a run of a part changes a part."""
    found: dict[tuple[str, str], str] = {}
    for file in files:
        found |= results_in(file)
    return found


def page(rows: dict[str, str], tests: list[Checked], results: dict[tuple[str, str], str]) -> str:
    """The whole page."""
    by_row: dict[str, list[Checked]] = defaultdict(list)
    for test in tests:
        for row in test.rows:
            by_row[row].append(test)
    covered = [row for row in rows if by_row[row]]
    marked = sum(1 for test in tests if test.rows)
    went = [[results.get((test.file, test.name)) for test in by_row[row]] for row in covered]
    passed = sum(1 for of_row in went if "passed" in of_row and "failed" not in of_row)
    failed = sum(1 for of_row in went if "failed" in of_row)
    ran = f" In the last runs here, tests of {passed} rows passed, and of {failed} some failed." if results else ""
    parts = [
        "# Faults, and the tests that check them\n",
        "Written by `scripts/coverage-of-faults`, which reads the docstrings of the tests. A row is a property (P), a fault",
        "(A to F, O) or a rule of etcd (E); a test that checks one names it first in its docstring.\n",
        f"{len(covered)} of {len(rows)} rows are named by a test; {marked} of {len(tests)} tests name a row.{ran}\n",
    ]
    for letter, title in GROUPS.items():
        own = [row for row in rows if row[0] == letter]
        if not own:
            continue
        done = sum(1 for row in own if by_row[row])
        parts += [
            f"## {letter}: {title} ({done} of {len(own)})\n",
            "| row | what | tests | result |",
            "|---|---|---|---|",
        ]
        parts += [_line(row, rows[row], by_row[row], results) for row in own]
        parts.append("")
    strange = sorted(set(by_row) - set(rows))
    if strange:
        parts.append(f"Named by tests, but in no row: {', '.join(strange)}.\n")
    return "\n".join(parts)


def _line(row: str, text: str, tests: list[Checked], results: dict[tuple[str, str], str]) -> str:
    names = "<br>".join(f"`{test.file.removeprefix('tests/')}` {test.name.removeprefix('test_')}" for test in tests)
    ran = Counter(results.get((test.file, test.name), "not run") for test in tests)
    result = ", ".join(f"{number} {word}" for word, number in sorted(ran.items())) if results else str(len(tests) or "")
    return f"| {row} | {text.replace('|', chr(92) + '|')} | {names or '-'} | {result} |"


def main(arguments: list[str] | None = None) -> int:
    """Write the page and say what it comes to. Returns 1 when fewer rows than asked for are covered."""
    parser = argparse.ArgumentParser(
        prog="scripts/coverage-of-faults",
        description="Lists which fault of the catalogue is checked by which test; writes docs/fault-coverage.md.",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="XML",
        action="append",
        help="what `pytest --junitxml` wrote, oldest first (default: what scripts/test has kept in build/test-results)",
    )
    parser.add_argument("--at-least", type=int, default=0, metavar="N", help="fail when fewer rows are covered")
    parser.add_argument("--json", action="store_true", help="print row → test → last result, and write nothing")
    options = parser.parse_args(arguments)
    rows = known_rows()
    tests = checks_in(REPOSITORY / "tests")
    try:
        results = last_results(options.results or sorted(RESULTS.glob("*.xml")))
    except (OSError, ElementTree.ParseError) as error:
        print(f"scripts/coverage-of-faults: a file of results cannot be read: {error}", file=sys.stderr)
        return 2
    by_row = {
        row: {
            f"{test.file}::{test.name}": results.get((test.file, test.name), "not run")
            for test in tests
            if row in test.rows
        }
        for row in rows
    }
    covered = sum(1 for named in by_row.values() if named)
    if options.json:
        print(json.dumps(by_row, indent=2))
    else:
        if CATALOGUE.exists():
            ROWS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        PAGE.write_text(page(rows, tests, results))
        missing = [row for row, named in by_row.items() if not named]
        print(f"{covered} of {len(rows)} rows are named by a test; docs/fault-coverage.md lists them")
        print(f"without a test: {' '.join(missing)}")
    return 1 if covered < options.at_least else 0


if __name__ == "__main__":
    sys.exit(main())
