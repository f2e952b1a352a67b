"""One lab for all end-to-end tests; each test gets it clean and must leave it clean."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import pytest

from labkit import Lab
from tests.support.fleet import Fleet, bring_up

NAME = os.environ.get("CARGO_E2E_LAB", "e2e")
SUBNET = os.environ.get("CARGO_E2E_SUBNET", "10.77.8")


LOG_LINES = 60
SHORT_CHARACTERS = 1500


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failing test shows how the daemons' logs ended: the lab is gone when a person looks. Last, once more, what failed."""
    report = yield
    fleet = getattr(item, "funcargs", {}).get("fleet")
    if report.failed and isinstance(fleet, Fleet):
        fleet.spoilt = True
        for log in sorted(fleet.lab.spec.logs.glob("*.log")):
            if log.name.endswith("hostd.log") or log.name == "coordinator.log":
                tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                report.sections.append((f"the end of {log.name}", "\n".join(tail)))
        report.sections.append((f"in short: {item.name}, {report.when}", report.longreprtext[-SHORT_CHARACTERS:]))
    return report


@dataclass
class Ground:
    """The lab and the images on it, made anew after a test that left ruins."""

    lab: Lab
    images: dict[str, str]
    hosts: Sequence[str] | None = None
    """Names or descriptions, see ``Lab``; None for the usual two."""

    def rebuild(self) -> None:
        """Take everything down and up again."""
        self.lab.down()
        self.extend(self.hosts)

    def extend(self, hosts: Sequence[str] | None) -> None:
        """Bring up what these hosts lack; the usual two come first."""
        self.hosts = hosts
        self.lab = Lab(NAME, SUBNET, hosts=hosts)
        self.images = bring_up(self.lab)


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    Lab(NAME).down()
    lab = Lab(NAME, SUBNET)
    try:
        made = Ground(lab, bring_up(lab))
        yield made
    finally:
        Lab(NAME).down()


@pytest.fixture
def fleet(ground: Ground) -> Iterator[Fleet]:
    """Two hosts with agents, a coordinator, and nothing else."""
    yield from lent(ground)


def lent(ground: Ground) -> Iterator[Fleet]:
    """The hosts of ``ground`` for one test, after which they are clean, or made anew."""
    made = Fleet(ground.lab, ground.images)
    yield made
    sound = False
    try:
        made.close()
        sound = not made.spoilt
    finally:
        if not sound:  # whatever it left, inside of a daemon too, must not fail the next ones
            ground.rebuild()
