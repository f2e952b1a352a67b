"""Two hundred migrations back and forth: what the three daemons hold does not grow."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.support.fleet import Fleet

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(7200)]

MIGRATIONS = int(os.environ.get("CARGO_SOAK_MIGRATIONS", "200"))
WARM = 0.2
"""Part of the run before the first measurement counts: caches fill, lazily imported modules arrive."""
GROWTH_KIB = 6 * 1024
"""What the second half may hold more than the first: the noise of an allocator, far below 200 leaks of 64 KiB each."""
GROWTH_DESCRIPTORS = 4


@dataclass(frozen=True)
class Held:
    """What a process holds at a moment between two migrations."""

    resident_kib: int
    descriptors: int
    threads: int


def held(pid: int) -> Held:
    """As the kernel counts it."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return Held(int(status["VmRSS"].split()[0]), descriptors, int(status["Threads"]))


def test_two_hundred_migrations_back_and_forth_leave_memory_and_descriptors_flat(fleet: Fleet) -> None:
    """P13: neither the coordinator nor an agent keeps anything of a migration that has ended."""
    (fleet.volume("alpha", "soak-data") / "goods").write_bytes(os.urandom(200_000))
    fleet.sleeper("soak", volumes={"soak-data": {"bind": "/data"}})
    [before] = fleet.describe_seen("alpha", "soak", "/data")
    daemons = {"coordinator": fleet.lab.coordinator, "alpha": fleet.alpha.hostd, "beta": fleet.beta.hostd}
    seen: dict[str, list[Held]] = {name: [] for name in daemons}
    record = os.environ.get("CARGO_SOAK_RECORD")
    here, there = "alpha", "beta"
    for number in range(1, MIGRATIONS + 1):
        migration = f"soak-{number}"
        fleet.wait_listed(here, "soak")
        fleet.request(migration, "soak", here, there, on_release="remove", max_rounds=2)
        fleet.wait_end(migration, "completed")
        fleet.control(migration, "finalise")
        fleet.wait_for(migration, "finalised")
        here, there = there, here
        for name, daemon in daemons.items():
            assert daemon.pid is not None
            seen[name].append(held(daemon.pid))
        if record:
            line = {"number": number} | {name: asdict(kept[-1]) for name, kept in seen.items()}
            with Path(record).open("a") as file:
                file.write(json.dumps(line) + "\n")
    [after] = fleet.describe_seen(here, "soak", "/data")
    assert before == after
    fleet.oracle.assert_one_runner()
    fleet.wait_inbox_empty([f"soak-{number}" for number in range(1, MIGRATIONS + 1)])
    for name, kept in seen.items():
        counted = kept[int(len(kept) * WARM) :]
        middle = len(counted) // 2
        early, late = counted[:middle], counted[middle:]

        def grown(field: str, early: list[Held] = early, late: list[Held] = late) -> float:
            return statistics.median(getattr(h, field) for h in late) - statistics.median(
                getattr(h, field) for h in early
            )

        assert grown("resident_kib") <= GROWTH_KIB, f"{name} grows: {kept[:: max(1, len(kept) // 20)]}"
        assert grown("descriptors") <= GROWTH_DESCRIPTORS, f"{name} leaks descriptors: {kept[-1]}, {kept[0]}"
        assert grown("threads") <= GROWTH_DESCRIPTORS, f"{name} leaks threads: {kept[-1]}, {kept[0]}"
