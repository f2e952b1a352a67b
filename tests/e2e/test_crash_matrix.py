"""A1-A4, P7: every failpoint that the machines have, killed there and failed there, on real parts.

The list is generated from the machines' own tables, so a new step is in the matrix the moment it exists. After
each crash the process is started again, the migration must end, and what independent parties saw must agree:
the Docker daemons (never two runners), an outside client (nothing acknowledged is lost), the raw history.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from events.schema import EVENT_TYPES, TERMINAL_PHASES
from hostd import source, target
from hostd.plan import Plan
from labkit.process import Process
from labkit.waiting import wait_until
from labkit.witness import Witness, wait_until_answering
from tests.support.fleet import ON_A_UNION, Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

PORT = 6379
SCENARIO_OF_STEP = {
    "yield": "rollback",
    "carry": "rollback",
    "revive": "rollback",
    "clear": "rollback",
    "restore": "abort",
    "clean": "abort",
    "settle": "finalise",
    "finalise": "finalise",
    "hand_over": "finalise",
}
SCENARIO_OF_ORDER = {
    "abort_ordered": "abort",
    "aborted": "abort",
    "rollback_ordered": "rollback",
    "rolled_back": "rollback",
    "finalise_ordered": "finalise",
}
NOT_IN_A_SCENARIO = {
    "rejected",
    "step_failed",
    "step_recovered",
    "control_refused",
    "paused",
    "resumed",
    "target_asserted_off",
}
"""Orders of the coordinator that none of the scenarios leads to; the simulator passes through them."""
END_OF = {"plain": "completed", "rollback": "rolled_back", "abort": "aborted", "finalise": "finalised"}


@dataclass(frozen=True)
class Case:
    """One fault at one point of one process, on the way that passes there."""

    process: str
    point: str
    action: str
    scenario: str

    def __str__(self) -> str:
        return f"{self.point}={self.action}"


def _points(plan: Plan, process: str) -> list[tuple[str, str, str]]:
    found = []
    for step in plan.steps.values():
        scenario = SCENARIO_OF_STEP.get(step.name, "plain")
        if not step.undo:
            for effect, moment in itertools.product(step.effects, ("before_effect", "after_effect")):
                found.append((process, f"{plan.role}.{effect}:{moment}", scenario))
        if step.conclude is not None and step.name != "settle":
            found += [(process, f"{plan.role}.{step.name}:{m}", scenario) for m in ("before_event", "after_event")]
    return found


def matrix() -> list[Case]:
    """Every point with kill and with error, each once, on the first scenario that passes it."""
    points = _points(source.PLAN, "hostd/alpha") + _points(target.PLAN, "hostd/beta")
    for name, row in EVENT_TYPES.items():
        if "coordinator" in row.authors and name not in NOT_IN_A_SCENARIO:
            scenario = SCENARIO_OF_ORDER.get(name, "plain")
            points += [("coordinator", f"coordinator.{name}:{m}", scenario) for m in ("before_event", "after_event")]
    once: dict[str, tuple[str, str, str]] = {}
    for point in sorted(points, key=lambda found: found[2] != "plain"):
        once.setdefault(point[1], point)
    return [
        Case(process, point, action, scenario)
        for process, point, scenario in once.values()
        for action in ("kill", "error(on demand)")
        if not (process == "coordinator" and action != "kill")
    ]


def _process(fleet: Fleet, name: str) -> Process:
    if name == "coordinator":
        return fleet.lab.coordinator
    return fleet.lab.host(name.partition("/")[2]).hostd


def _arm(fleet: Fleet, case: Case) -> None:
    """By environment: in force from the process's first moment on, and gone when it is started again."""
    process = _process(fleet, case.process)
    process.stop()
    process.start(env={"CARGO_FAILPOINTS": f"{case.point}={case.action}@1"})
    fleet.at_end(process.restart)  # the last event may be seen before the kill that comes with it


def _drive(fleet: Fleet, case: Case, migration: str) -> None:
    """Ask for what the scenario needs next, whatever has happened so far."""
    types = fleet.types(migration)
    key = fleet.keys.control(migration)
    if case.scenario == "abort" and "source_prepared" in types and not {"abort_ordered", "target_claimed"} & set(types):
        fleet.store.put_if_absent(key, b"abort")
    if case.scenario == "rollback" and "completed" in types and "rollback_ordered" not in types:
        fleet.store.put_if_absent(key, b"rollback")
    if case.scenario == "finalise" and "completed" in types and not {"finalise_ordered", "finalised"} & set(types):
        fleet.store.put_if_absent(key, b"finalise")


def _ended(fleet: Fleet, case: Case, migration: str) -> bool:
    types = fleet.types(migration)
    if case.scenario in ("rollback", "finalise") and types and types[-1] == "completed":
        return False
    return any(name in types for name in TERMINAL_PHASES - {"completed"}) or (
        case.scenario in ("plain", "abort") and "completed" in types
    )


def _run(fleet: Fleet, case: Case) -> None:
    name = f"m{abs(hash(str(case))) % 10**9}"
    container = f"c{name}"
    fleet.docker["alpha"].volumes.create(f"v{name}")
    fleet.run(
        container,
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
    _arm(fleet, case)
    fleet.wait_listed("alpha", container)
    # What is stale comes at once, or through a union: a crash meets either.
    fleet.request(name, container, max_rounds=2, **(ON_A_UNION if case.action == "kill" else {}))
    process = _process(fleet, case.process)

    def progressed() -> bool:
        if not process.running:
            process.start()
        _drive(fleet, case, name)
        return _ended(fleet, case, name)

    wait_until(progressed, f"{case}: {fleet.types(name)} never ended", 120)
    types = fleet.types(name)
    end = next(event for event in reversed(types) if event in TERMINAL_PHASES)
    assert end in {END_OF[case.scenario], "aborted", "finalised", "completed"}, types
    home = "alpha" if end in ("aborted", "rolled_back") else "beta"
    wait_until(lambda: fleet.running(home, container), f"{container} does not run on {home}", 30)
    witness.wait_for_more(20)
    witness.stop()
    assert witness.missing_from(fleet.lab.host(home).spec.address) == []
    fleet.assert_sound(name)
    if home == "alpha":
        fleet.wait_policy("alpha", container, "always")
        fleet.assert_clean("beta", name)
    elif end == "finalised":

        def returned() -> bool:
            if not process.running:
                process.start()
            return fleet.policy("beta", container) == "always"

        wait_until(returned, "the policy did not come back", 20)


SAMPLE = {
    "source.stop_container:after_effect=kill",
    "source.stop:before_event=kill",
    "target.unite:after_event=kill",
    "target.start_container:after_effect=kill",
    "source.carry_back:after_effect=kill",
    "coordinator.cutover_ordered:after_event=kill",
}
"""What an ordinary run takes of the matrix: the points around the cut-over and the way back."""


@pytest.mark.parametrize("case", [case for case in matrix() if str(case) in SAMPLE], ids=str)
def test_a_crash_at_the_worst_moments_breaks_no_promise(fleet: Fleet, case: Case) -> None:
    """A1, A2, A3, A4: the sample of the matrix that every run takes."""
    _run(fleet, case)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in matrix() if str(case) not in SAMPLE], ids=str)
def test_a_fault_at_any_point_breaks_no_promise(fleet: Fleet, case: Case) -> None:
    """A1, A2, A3, A4, P7: the whole matrix."""
    _run(fleet, case)


def test_the_matrix_has_every_order_of_the_coordinator() -> None:
    orders = {name for name, row in EVENT_TYPES.items() if "coordinator" in row.authors}
    covered = {case.point.partition(".")[2].partition(":")[0] for case in matrix() if case.process == "coordinator"}
    assert orders - covered == NOT_IN_A_SCENARIO & orders
