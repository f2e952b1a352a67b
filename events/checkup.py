"""What ``cargo-hostd check`` and ``cargo-coordinator check`` find, and how they say it.

A finding is a sentence about one thing, and what to do about it. What it must never do: change anything, or call
something well that was not looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Level = Literal["ok", "advice", "problem"]
"""``problem``: a migration cannot work, or not safely. ``advice``: it can, with less than there could be."""

EXIT_OK, EXIT_PROBLEMS = 0, 1
_SIGNS: dict[str, str] = {"ok": "  ok      ", "advice": "  advice  ", "problem": "  PROBLEM "}
INDENT = " " * 10


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. ``remedy`` is empty only when all is well."""

    about: str
    """A short name, stable for programs, such as ``rsync``."""
    level: Level
    says: str
    remedy: str = ""


def ok(about: str, says: str) -> Finding:
    """As it should be."""
    return Finding(about, "ok", says)


def advice(about: str, says: str, remedy: str) -> Finding:
    """It works, and could do better."""
    return Finding(about, "advice", says, remedy)


def problem(about: str, says: str, remedy: str) -> Finding:
    """It does not work like that."""
    return Finding(about, "problem", says, remedy)


def report(who: str, findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print them, the worst last, where a person looks. Returns the exit code."""
    problems = sum(finding.level == "problem" for finding in findings)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode({"ready": not problems, "findings": list(findings)}) + b"\n")
        sys.stdout.flush()
        return EXIT_PROBLEMS if problems else EXIT_OK
    for line in lines(findings):
        print(line)
    if problems:
        print(f"{who}: not ready, {problems} problem{'s' if problems > 1 else ''}")
    else:
        print(f"{who}: ready")
    return EXIT_PROBLEMS if problems else EXIT_OK


def lines(findings: Iterable[Finding]) -> list[str]:
    """For a terminal: one line a finding, one more for what to do."""
    order: list[Level] = ["ok", "advice", "problem"]
    told = []
    for finding in sorted(findings, key=lambda found: order.index(found.level)):
        told.append(f"{_SIGNS[finding.level]}{finding.about}: {finding.says}")
        if finding.remedy:
            told.append(f"{INDENT}→ {finding.remedy}")
    return told
