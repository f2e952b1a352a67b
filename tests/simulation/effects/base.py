"""What every effect gets to work with, and what it may raise."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from events.errors import CancelledError, PermanentError, TransientError
from hostd.plan import View
from tests.simulation.world import VOLUME, Container, Host, Union, Volume, World

if TYPE_CHECKING:
    from tests.simulation.agents import Agent

Outcome = dict[str, Any] | None
Performance = Generator[None, None, Outcome]
DESTINATION = "/data"
ROOT = "/"
MIB = 1024 * 1024


class TrackingLostError(PermanentError):
    """As in the product."""

    code = "tracking_lost"


class ContainerChangedError(PermanentError):
    """As in the product."""

    code = "container_changed"


@dataclass
class Ctx:
    """One step's surroundings."""

    migration: str
    view: View
    agent: Agent
    cancelled: bool = False
    poke_after: float | None = None

    @property
    def host(self) -> Host:
        return self.agent.host

    @property
    def world(self) -> World:
        return self.agent.host.world

    @property
    def files(self) -> dict[str, Any]:
        """This migration's durable directory, made if absent."""
        return self.host.files.setdefault(self.migration, {})

    @property
    def request_target(self) -> Host:
        return self.world.hosts[self.view.requested.request.target]

    @property
    def request_source(self) -> Host:
        return self.world.hosts[self.view.requested.request.source]

    def check_cancelled(self) -> None:
        if self.cancelled:
            raise CancelledError("the step is no longer wanted")

    def docker(self) -> None:
        """Every call of the engine passes here."""
        if not self.host.docker:
            raise TransientError("the Docker daemon does not answer")

    def need_link(self) -> None:
        """Every transfer passes here."""
        if not self.world.linked("alpha", "beta"):
            raise TransientError("the other host cannot be reached by SSH")

    def stop_intended(self) -> bool:
        return "stopping" in self.host.files.get(self.migration, {})

    def source_container(self) -> Container | None:
        self.docker()
        return self.host.containers.get(self.view.source_prepared.container_id)

    def our_container(self) -> Container | None:
        self.docker()
        found = self.host.find(self.migration)
        return found if found is not None and found.name == self.view.source_prepared.container_name else None

    def volume(self) -> Volume:
        self.docker()
        volume = self.host.volumes.get(VOLUME)
        if volume is None:
            raise PermanentError(f"the volume has gone from {self.host.name}")
        return volume

    def union(self) -> Union:
        union = self.volume().union
        if union is None:
            raise PermanentError("there is no stage")
        return union


def nothing(_ctx: Ctx) -> Performance:
    yield
    return None


def set_policy(container: Container, policy: str) -> None:
    container.policy = policy
