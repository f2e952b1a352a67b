"""Faults from outside at each phase of a migration: hosts without power, dead daemons, cut links, frozen processes.

The counterpart of the crash matrix, whose faults come from within. After each fault the migration must end by itself, and
what independent parties saw must agree: never two runners, nothing acknowledged lost, the history sound, nothing left behind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from events.schema import TERMINAL_PHASES
from labkit.waiting import wait_until
from labkit.witness import Witness, wait_until_answering
from tests.support.fleet import ON_A_UNION, VOLUMES, Fleet, differences, told
from tests.support.host_faults import (
    AROUND_THE_STOP,
    EVERYWHERE,
    HOLD_SECONDS,
    PHASES,
    VARIED,
    Fault,
    Phase,
    kill_helpers,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

PORT = 6379
END_SECONDS = 150.0
STARTING = ("disarmed", "stopped", "claimed")
"""Phases in which the target starts the container up to its gate, or has done so."""


@dataclass(frozen=True)
class Case:
    """One fault at one phase."""

    name: str
    fault: Fault
    phase: Phase

    def __str__(self) -> str:
        return f"{self.name}-{self.phase.name}"


CASES = [
    *(Case(name, fault, phase) for name, fault in EVERYWHERE.items() for phase in PHASES),
    *(Case(name, fault, phase) for name, fault in AROUND_THE_STOP.items() for phase in PHASES if phase.name in VARIED),
]
SAMPLE = {
    "source without power-disarmed",
    "target without power-stopped",
    "target and etcd cut, leases expire-stopped",
    "coordinator frozen, another takes over-stopped",
    "target's dockerd killed-stopped",
    "target's dockerd killed-fill",
}
"""What an ordinary run takes: each kind of fault once, where it hurts most."""


def service(fleet: Fleet, name: str) -> Witness:
    """A Redis on alpha that always restarts, and a client that writes to it from now on."""
    fleet.docker["alpha"].volumes.create(f"v{name}")
    fleet.run(
        name,
        image="redis",
        ports={f"{PORT}/tcp": PORT},
        volumes={f"v{name}": {"bind": "/data"}},
        restart_policy={"Name": "always"},
    )
    addresses = [fleet.alpha.spec.address, fleet.beta.spec.address]
    wait_until_answering(addresses[0], PORT)
    witness = Witness(addresses, PORT, pause_seconds=0.005)
    witness.start()
    fleet.at_end(witness.stop)
    return witness


def assert_safe(fleet: Fleet, migration: str, container: str, witness: Witness) -> str:
    """Wherever the migration ended: the service runs there alone, with every record. Returns how it ended."""
    types = fleet.types(migration)
    end = next(name for name in reversed(types) if name in TERMINAL_PHASES)
    home = "alpha" if end in ("aborted", "rolled_back") else "beta"
    other = {"alpha": "beta", "beta": "alpha"}[home]
    fleet.wait_running(home, container, 40)
    wait_until_answering(fleet.lab.host(home).spec.address, PORT)
    witness.wait_for_more(20)
    witness.stop()
    assert witness.missing_from(fleet.lab.host(home).spec.address) == []
    assert not fleet.running(other, container)
    fleet.oracle.settle({container: {home}})
    fleet.assert_sound(migration)
    if home == "alpha":
        fleet.wait_policy("alpha", container, "always")
        fleet.assert_clean("beta", migration)
    return end


def run(fleet: Fleet, case: Case) -> None:
    """A migration (and its way back, if the phase lies there) that the fault strikes in its phase."""
    phase = case.phase
    container = f"c{CASES.index(case)}"
    migration = f"{container}-1"
    witness = service(fleet, container)
    log = f"{phase.host}.hostd"
    fleet.failpoints(f"hostd/{phase.host}", f"{phase.point}=delay({HOLD_SECONDS})@1")
    since = fleet.log_size(log)
    # A dockerd that is killed while a warm start waits at its gate keeps the port of it (docs/limits.md).
    start = "cold" if "live-restore" in case.name else "warm"
    fleet.request(migration, container, max_rounds=2, start=start, **ON_A_UNION)
    if phase.rolling_back:
        fleet.wait_end(migration, "completed")
        fleet.control(migration, "rollback")
    fleet.wait_step(log, f'"point": "{phase.point}"', since, 60)
    if phase.name in STARTING and "live-restore" not in case.name:
        # A crash in the middle of Docker's start is another matter: it costs the port (test_warm_start).
        wait_until(lambda: fleet.at_gate("beta"), "the container does not come to its gate", 20)
    with case.fault(fleet):
        fleet.failpoints(f"hostd/{phase.host}", "")
        ends = {"rolled_back"} if phase.rolling_back else {"completed", "aborted"}
        wait_until(
            lambda: not ends.isdisjoint(fleet.types(migration)),
            f"{case}: {migration} never ended",
            END_SECONDS,
        )
        end = assert_safe(fleet, migration, container, witness)
    claimed = phase.name in ("claimed", "fill", "verify", "release")
    assert end == "completed" or not claimed, told(fleet.events(migration))


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in SAMPLE], ids=str)
def test_a_fault_from_outside_breaks_no_promise(fleet: Fleet, case: Case) -> None:
    """A5, A8, A10, A12, C1, C3, B5, P9, P10: the sample that every run takes."""
    run(fleet, case)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in CASES if str(case) not in SAMPLE], ids=str)
def test_a_fault_from_outside_at_any_phase_breaks_no_promise(fleet: Fleet, case: Case) -> None:
    """A5, A7, A8, A9, A10, A11, A12, A13, B1, B2, B5, B12, B16, C1, C2, C3, C4, C5, P1, P2, P9, P10, P13: all of it."""
    run(fleet, case)


@pytest.mark.parametrize(
    ("program", "host"), [("rsync", "beta"), pytest.param("rsync", "alpha", marks=pytest.mark.long)]
)
def test_a_transfer_that_is_killed_in_a_round_is_begun_again(fleet: Fleet, program: str, host: str) -> None:
    """A6, D3: the OOM killer takes rsync, on either side; what has arrived stays."""
    name = f"kill-{host}"
    place = fleet.volume("alpha", f"{name}-data")
    (place / "large").write_bytes(bytes(range(256)) * 8000)
    fleet.sleeper(name, volumes={f"{name}-data": {"bind": "/data"}})
    fleet.request(f"{name}-1", name, bwlimit_kib=700)
    fleet.wait_for(f"{name}-1", "sync_armed")
    kill_helpers(fleet, host, program)
    fleet.wait_for(f"{name}-1", "step_failed")
    fleet.wait_end(f"{name}-1", "completed")
    fleet.assert_sound(f"{name}-1")
    assert fleet.running("beta", name)


@pytest.mark.parametrize(
    "program",
    ["hostd.lower", pytest.param("sshfs", marks=pytest.mark.long), pytest.param("rsync", marks=pytest.mark.long)],
)
def test_helpers_that_are_killed_during_the_fill_cost_no_data(fleet: Fleet, program: str) -> None:
    """A6, D14: the link, the transfer, or the lower layer itself dies under the running container."""
    name = f"fill-{program.replace('.', '-')}"
    place = fleet.volume("alpha", f"{name}-data")
    for number in range(4):
        (place / f"f{number}").write_bytes(os.urandom(500_000))
    fleet.sleeper(name, volumes={f"{name}-data": {"bind": "/data"}})
    [before] = fleet.describe("alpha", f"{VOLUMES}/{name}-data/_data")
    fleet.request(f"{name}-1", name, strategy="postcopy", bwlimit_kib=200)
    fleet.wait_for(f"{name}-1", "target_started")
    kill_helpers(fleet, "beta", program)
    fleet.wait_end(f"{name}-1", "completed", timeout_seconds=90)
    fleet.wait_running("beta", name)
    fleet.assert_sound(f"{name}-1")
    [after] = fleet.describe_seen("beta", name, "/data")
    assert differences(before, after) == []
