"""Runs targets over many inputs, within bounds, and keeps every input that one of them did not bear.

A target is a function of bytes. It may raise errors of ``events.errors``, which it swallows itself where it goes on
afterwards; anything else is a finding, as is an input that takes too long, or more memory than ``LIMIT_BYTES``.
"""

from __future__ import annotations

import hashlib
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from events.errors import CargoError
from tests.fuzz.mutation import Form, make

SLOW_SECONDS = 5.0
"""Of a processor, for one input: the largest ones are half a megabyte, and the machine may be busy."""
LIMIT_BYTES = 2 * 1024**3
"""Address space of a long run. A parser that can be made to ask for more ends in MemoryError, which is a finding."""
TELL_SECONDS = 10.0


@dataclass(frozen=True)
class Target:
    """One reader of what others wrote. ``run`` raises nothing but CargoError, whatever it is given."""

    name: str
    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    form: Form = "bytes"
    weight: int = 4
    """Its share of a run over all targets; what touches a file system has a smaller one."""


@dataclass
class Report:
    """What came of one target."""

    target: str
    inputs: int = 0
    accepted: int = 0
    """Inputs that no error answered."""
    seconds: float = 0.0
    findings: dict[str, bytes] = field(default_factory=dict)
    """The first input of each kind of finding, by what it was."""


def inputs(target: Target, seed: int, count: int, first: int = 0) -> Iterator[bytes]:
    """The inputs ``first`` to ``first + count - 1`` of a target under a seed; the good ones come first of all."""
    for number in range(first, first + count):
        if number < len(target.seeds):
            yield target.seeds[number]
        else:
            yield make(target.seeds, target.form, random.Random(f"{target.name}/{seed}/{number}"))


def attempt(target: Target, raw: bytes) -> tuple[bool, str]:
    """Whether the target took the input, and what was wrong with the target; empty when nothing."""
    began = time.process_time()
    taken = True
    try:
        target.run(raw)
    except CargoError:
        taken = False
    except Exception as error:  # whatever it is, it is what is looked for
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/fuzz/campaign" not in frame.filename
        ]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
        ours = next(
            (f"{Path(f.filename).name}:{f.name}" for f in reversed(frames) if "/site-packages/" not in f.filename), ""
        )
        return False, f"{type(error).__name__} in {where}" + (f" (from {ours})" if ours and ours != where else "")
    if (took := time.process_time() - began) > SLOW_SECONDS:
        return taken, f"took more than {SLOW_SECONDS:g} s ({took:.0f})"
    return taken, ""


def run(
    target: Target, count: int, seed: int = 0, first: int = 0, tell: Callable[[Report], None] | None = None
) -> Report:
    """Give a target so many inputs."""
    report = Report(target.name)
    began = told = time.monotonic()
    for raw in inputs(target, seed, count, first):
        taken, problem = attempt(target, raw)
        report.inputs += 1
        report.accepted += taken
        if problem and problem not in report.findings:
            report.findings[problem] = raw
        if tell is not None and time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            report.seconds = told - began
            tell(report)
    report.seconds = time.monotonic() - began
    return report


def keep(report: Report, directory: Path) -> list[Path]:
    """Put the findings' inputs into files: ``TARGET-DIGEST``, so that ``replay`` knows whose they are."""
    files = []
    for raw in report.findings.values():
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"{report.target}-{hashlib.sha256(raw).hexdigest()[:12]}"
        file.write_bytes(raw)
        files.append(file)
    return files


def bound_memory(limit_bytes: int = LIMIT_BYTES) -> None:
    """From here on this process may not have more. For runs of their own only: it cannot be taken back."""
    sys.setrecursionlimit(1000)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
