"""What an effect is, and what it gets to work with.

An effect is one verb. ``run`` observes, acts, observes again and returns the fields that it found for
the event that ends its step; performing it twice is harmless. ``undo`` is safe when ``run`` never
happened, or happened by halves.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import structlog

from events.errors import CancelledError, PermanentError
from events.records import PlacementRecord
from hostd.engine import Engine
from hostd.layer_tracker import LayerTracker
from hostd.openfiles import FileKey, OpenFile
from hostd.opening import Opening
from hostd.plan import View
from hostd.settings import HostSettings
from hostd.tracker import Tracker
from hostd.transport import Transport
from hostd.warm import WarmStart

Outcome = Mapping[str, Any] | None


class TrackingLostError(PermanentError):
    """The tracker cannot vouch for what changed; another round, comparing everything, mends it."""

    code = "tracking_lost"


class ContainerChangedError(PermanentError):
    """A person or the container itself stopped, removed, renamed or replaced the container."""

    code = "container_changed"


@dataclass
class Workbench:
    """The adapters of this process, shared by all its migrations."""

    settings: HostSettings
    engine: Engine
    transport: Transport
    trackers: dict[tuple[str, str], Tracker | LayerTracker] = field(default_factory=dict)
    """Running change trackers, by migration and mount destination; they die with the process."""
    open_files: dict[str, dict[FileKey, OpenFile]] = field(default_factory=dict)
    """What a container held open for writing right before it was stopped, by migration."""
    guarded: dict[str, str] = field(default_factory=dict)
    """Source containers that must stay down, by id, with the migration that says so."""
    manual_stops: dict[str, float] = field(default_factory=dict)
    """Containers that somebody stopped through Docker, with the monotonic time of it, by container id."""
    warm: dict[str, WarmStart] = field(default_factory=dict)
    """Containers on the way to, or at, their gate, by migration; they do not outlive the process."""
    openings: dict[str, Opening] = field(default_factory=dict)
    """Views of the source on their way, by migration; they do not outlive the process."""
    connections: dict[str, Opening] = field(default_factory=dict)
    """Connections to sources on their way, by migration."""
    why_cold: dict[str, str] = field(default_factory=dict)
    """Why a container that waited was sent away again before its start, by migration."""
    boot: str = ""
    place: Callable[[str, PlacementRecord], None] = lambda _container, _record: None
    """Writes ``placements/<container>`` unless it says so already. Raises StoreUnavailableError."""


@dataclass
class Context:
    """One step's surroundings."""

    migration: str
    view: View
    bench: Workbench
    cancelled: threading.Event
    log: structlog.stdlib.BoundLogger
    progress: Callable[[dict[str, Any]], None] = lambda _fields: None
    newest: Callable[[], View] | None = None
    """The stream as it is known by now: ``view`` is what the step began with."""
    places: dict[str, Path] = field(default_factory=dict)
    """Where volumes lie, as Docker has said during this step."""
    poke_after: float | None = None
    """Set by an effect that wants its step repeated after so many seconds without another event."""

    @property
    def host(self) -> str:
        """This host's name."""
        return self.bench.settings.name

    @property
    def directory(self) -> Path:
        """This migration's private directory on this host."""
        return self.bench.settings.state_dir / "migrations" / self.migration

    @property
    def bwlimit_kib(self) -> int:
        """The limit of transfers that is in force at this moment; a person may change it during a step."""
        return (self.newest() if self.newest is not None else self.view).bwlimit_kib

    def check_cancelled(self) -> None:
        """Raise CancelledError when the step is no longer wanted."""
        if self.cancelled.is_set():
            raise CancelledError("the step is no longer wanted")


class Effect(ABC):
    """A verb. Subclasses are stateless; what must last is on the host or in the stream."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Observe, act, observe. Raises TransientError, PermanentError, RefusedError, CancelledError."""

    def undo(self, context: Context) -> Outcome:
        """Take back whatever ``run`` may have done. The default suits verbs that leave nothing behind."""
        return None


def stop_evidence(context: Context) -> Path:
    """The file that says: the container was stopped by this migration, not by anybody else."""
    return context.directory / "stopping"


def stop_intended(context: Context) -> bool:
    """Whether the source's stop has been begun for this migration."""
    return stop_evidence(context).exists()


def note_stop(context: Context) -> None:
    """Evidence, on disk before the first act of the stop, that it is us who stop the container (A8).

    Between the disarming and the stop a reboot leaves the container down, and nobody but us brings it back.
    """
    context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with stop_evidence(context).open("wb") as file:
        file.write(msgspec.json.encode({"seq": context.view.seq}))
        file.flush()
        os.fsync(file.fileno())
