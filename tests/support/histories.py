"""Builds legal histories for tests of the pure cores: events as the real authors would append them."""

from __future__ import annotations

from events import schema
from events.schema import Data, Event, FileRef, Stamp, next_event

REF = FileRef(path="/var/lib/cargo/x", size_bytes=1, sha256="0" * 64)
REQUEST = schema.Request(container="web", source="alpha", target="beta")
COORDINATOR, SOURCE, TARGET = "coordinator/c1", "hostd/alpha", "hostd/beta"
AUTHOR = {"coordinator": COORDINATOR, "source": SOURCE, "target": TARGET}


def prepared(**fields: object) -> schema.SourcePrepared:
    """A typical ``source_prepared``."""
    base: dict[str, object] = {
        "container_id": "c" * 64,
        "container_name": "web",
        "spec": REF,
        "image_id": "sha256:1",
        "image_tags": ("web:1",),
        "mounts": (schema.Mount(kind="volume", name="data", destination="/data", tree="/v/data/_data"),),
        "ports": (),
        "restart_policy": "always",
        "address": "10.0.0.1",
    }
    return schema.SourcePrepared(**(base | fields))  # type: ignore[arg-type]


SAMPLES: dict[str, Data] = {
    "requested": schema.Requested(request=REQUEST, container_id="c" * 64),
    "rejected": schema.Rejected(reasons=("no",), request_key="x", request_text="{}"),
    "prepare_ordered": schema.PrepareOrdered(),
    "source_prepared": prepared(),
    "image_wanted": schema.ImageWanted(image_id="sha256:1"),
    "image_packed": schema.ImagePacked(archive=REF, layers=1),
    "target_prepared": schema.TargetPrepared(container_id="d" * 64),
    "sync_ordered": schema.SyncOrdered(round=1, why="first"),
    "sync_armed": schema.SyncArmed(round=1),
    "sync_finished": schema.SyncFinished(round=1, bytes_moved=10, files=1, duration_seconds=0.1),
    "brace_ordered": schema.BraceOrdered(why="converged"),
    "target_braced": schema.TargetBraced(start="warm"),
    "cutover_ordered": schema.CutoverOrdered(why="converged"),
    "source_stopped": schema.SourceStopped(exit_code=0, unclean=False, stopped_at="t", dirty=()),
    "target_claimed": schema.TargetClaimed(),
    "target_started": schema.TargetStarted(container_id="d" * 64, started_at="t"),
    "health_reported": schema.HealthReported(status="healthy"),
    "source_digested": schema.SourceDigested(trees=()),
    "fill_finished": schema.FillFinished(bytes_moved=0, files=0, duration_seconds=0.0),
    "verified": schema.Verified(files=1, size_bytes=1, changed_by_container=0),
    "release_ordered": schema.ReleaseOrdered(),
    "source_released": schema.SourceReleased(kept_as="web.cargo-m"),
    "completed": schema.Completed(),
    "finalise_ordered": schema.FinaliseOrdered(),
    "finalised": schema.Finalised(),
    "abort_ordered": schema.AbortOrdered(reason="a person asked for it"),
    "source_restored": schema.SourceRestored(running=True),
    "target_cleaned": schema.TargetCleaned(),
    "aborted": schema.Aborted(),
    "rollback_ordered": schema.RollbackOrdered(reason="a person asked for it"),
    "target_asserted_off": schema.TargetAssertedOff(who="ada"),
    "target_stopped": schema.TargetStopped(exit_code=0),
    "carried_back": schema.CarriedBack(bytes_moved=0, files=0),
    "rolled_back": schema.RolledBack(),
    "step_failed": schema.StepFailed(step="prepare", reason="disk full", retrying=False, attempt=1, advice="make room"),
    "step_recovered": schema.StepRecovered(step="prepare"),
    "control_refused": schema.ControlRefused(control="abort", reason="too late"),
    "paused": schema.Paused(),
    "resumed": schema.Resumed(),
    "bwlimit_ordered": schema.BwlimitOrdered(kib=1024),
}

HAPPY_PATH = [
    "requested",
    "prepare_ordered",
    "source_prepared",
    "target_prepared",
    "sync_ordered",
    "sync_armed",
    "sync_finished",
    "brace_ordered",
    "target_braced",
    "cutover_ordered",
    "source_stopped",
    "target_claimed",
    "target_started",
    "source_digested",
    "fill_finished",
    "verified",
    "release_ordered",
    "source_released",
    "completed",
]


class History:
    """A growing, chained stream."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, what: str | Data, *, by: str | None = None, epoch: int = 1, boot: str = "boot") -> Event:
        """Append a sample by its type's name, or a payload, written by the author that may."""
        data = SAMPLES[what] if isinstance(what, str) else what
        name = schema.TYPE_OF[type(data)]
        author = by or AUTHOR[schema.EVENT_TYPES[name].authors[0]]
        number = len(self.events) + 1
        stamp = Stamp(uuid=f"u{number}", at="2030-01-01T00:00:00.000Z", by=author, boot=boot, epoch=epoch)
        previous = self.events[-1] if self.events else None
        event = next_event(previous, data, cause=len(self.events), stamp=stamp)
        self.events.append(event)
        return event

    def up_to(self, name: str) -> History:
        """Append the happy path through its first event called ``name``."""
        for step in HAPPY_PATH:
            self.add(step)
            if step == name:
                return self
        raise AssertionError(name)
