"""One line of plain words for each event, for timelines. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime

from events import schema
from events.schema import Data, Event


def size(number: float) -> str:
    """Bytes for people: ``412 MB``; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seconds_between(earlier: Event, later: Event) -> float:
    """Seconds by the authors' clocks; NaN when one of the times cannot be read. For people only: clocks may differ."""
    try:
        return (datetime.fromisoformat(later.at) - datetime.fromisoformat(earlier.at)).total_seconds()
    except (ValueError, TypeError):  # no time at all, or one with and one without a time zone
        return math.nan


def duration(seconds: float) -> str:
    """A duration for people: ``12 s``, ``4 min``, ``3 h``, ``2 days``."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


_PROGRESS: dict[str, Callable[[float], str]] = {
    "bytes": lambda number: f"{size(number)} moved",
    "files": lambda number: count(round(number), "file"),
    "total_bytes": lambda number: f"of {size(number)}",
    "rate_bytes_per_second": lambda number: f"{size(number)}/s",
    "remaining_bytes": lambda number: f"{size(number)} to come",
    "remaining_files": lambda number: f"in {count(round(number), 'file')}",
    "remaining_seconds": lambda number: f"about {duration(number)} left",
    "bwlimit_kib": lambda number: f"limited to {number:.0f} KiB/s" if number else "",
    "safe_to_switch_off_source": lambda safe: "the source may be switched off" if safe else "",
    "finished": lambda _finished: "",
}


MOST_TOLD = 1e18
"""More than any host holds: a larger number, or NaN, is no amount and is shown as it came."""


def progress(fields: Mapping[str, object]) -> str:
    """What a host says of a transfer, in words; fields that are not known here are shown as they are."""
    told = []
    for name, value in fields.items():
        known = _PROGRESS.get(name)
        if known is not None and isinstance(value, int | float) and 0 <= value < MOST_TOLD:
            told.append(known(value))
        else:
            told.append(str(value) if name in ("step", "phase", "mount") else f"{name} {value}")
    return ", ".join(filter(None, told))


def _ended(data: schema.SourceStopped | schema.SourceDigested) -> str:
    how = "had to be killed" if data.unclean else "stopped"
    return how if data.exit_code is None else f"{how}, exit code {data.exit_code}"


_STEPS: dict[str, str] = {
    "connect": "connects to the source",
    "prepare": "gets ready",
    "pack": "packs the layers of the image that the target lacks",
    "arm": "begins to note what changes from now on",
    "sync": "copies the data while the container runs",
    "serve": "serves the container's data to the target",
    "brace": "gets ready to take over, ahead of the stop",
    "get_ready": "brings the container's start as far as it can go before the stop",
    "stop": "stops the container",
    "unite": "takes over the list of what has changed, and prepares the container's data",
    "start": "starts the container",
    "guard": "sees that the container stays down",
    "fill": "brings the data that is still on the source",
    "supervise": "sees that the container goes on running",
    "verify": "compares everything with the source",
    "digest": "describes its data for the comparison",
    "release": "lets go",
    "settle": "keeps the container running, until its data is made a plain volume",
    "finalise": "makes the data a plain volume",
    "hand_over": "gives the container back to Docker, with its own restart policy",
    "clean": "removes what it made for the migration",
    "restore": "gives the container back to its own Docker, as it was",
    "carry": "takes over what the container wrote on the target",
    "revive": "starts the container again",
    "yield": "stops the container, and lists what it wrote",
    "offer": "offers what the container wrote to the source",
    "clear": "removes what it made for the migration",
}


def doing(why: str) -> str:
    """What an agent does, for people; ``why`` is its step with the effects of it, which are for ``replay``."""
    step = why.partition(":")[0]
    return f"{_STEPS[step]} (step {step})" if step in _STEPS else why


def _dirty(manifests: tuple[schema.DirtyManifest, ...]) -> str:
    files = sum(manifest.stale_files for manifest in manifests)
    return f"{count(files, 'file')}, {size(sum(manifest.stale_bytes for manifest in manifests))} changed"


def warnings(data: Data) -> tuple[str, ...]:
    """What a person should know of the container's move, as the agents found it."""
    return data.warnings if isinstance(data, schema.SourcePrepared | schema.TargetPrepared) else ()


def _notes(data: Data) -> str:
    return "".join(f"; note: {warning}" for warning in warnings(data))


def words(data: Data) -> str:  # noqa: PLR0912 - one case an event, nothing else
    """What ``data`` says, in a few words."""
    match data:
        case schema.Requested():
            wish = data.request
            lack = f", without {', '.join(wish.without)}" if wish.without else ""
            return f"move {wish.container} from {wish.source} to {wish.target}, {wish.strategy}{lack}"
        case schema.Rejected():
            return "; ".join(data.reasons)
        case schema.SourcePrepared():
            total = sum(mount.size_bytes for mount in data.mounts)
            files = sum(mount.files for mount in data.mounts)
            return (
                f"{count(len(data.mounts), 'mount')}, {count(files, 'file')}, {size(total)}, changes are tracked"
                + _notes(data)
            )
        case schema.ImageWanted():
            return f"lacks the image {data.image_id[:19]}, has {len(data.layers)} of its layers"
        case schema.ImagePacked():
            return f"{count(data.layers, 'layer')}, {size(data.archive.size_bytes)}"
        case schema.TargetPrepared():
            return f"container {data.container_id[:12]} created, not started" + _notes(data)
        case schema.SyncOrdered() | schema.BraceOrdered() | schema.CutoverOrdered():
            return data.why
        case schema.SyncArmed():
            return (
                (f"comparing everything: {data.why}" if data.compare else _dirty(data.dirty))
                if (data.compare or data.dirty)
                else "tracking from here"
            )
        case schema.SyncFinished():
            return f"{size(data.bytes_moved)} in {count(data.files, 'file')}, {data.duration_seconds:.1f} s"
        case schema.TargetBraced():
            return "the container waits at its gate" if data.start == "warm" else f"it will start cold: {data.why_cold}"
        case schema.SourceStopped():
            return f"{_ended(data)}; {_dirty(data.dirty)} since the last round"
        case schema.TargetClaimed():
            return "point of no return" + (f"; {data.remainder_why}" if data.remainder_why else "")
        case schema.TargetStarted():
            ports = ", ".join(f"{port.host_ip}:{port.host_port}" for port in data.ports)
            return "runs" + (f" on {ports}" if ports else "")
        case schema.HealthReported():
            return data.status + (f": {data.log}" if data.log else "")
        case schema.FillFinished():
            return f"{size(data.bytes_moved)} in {count(data.files, 'file')}, {data.duration_seconds:.1f} s"
        case schema.SourceDigested():
            described = f"{count(sum(tree.files for tree in data.trees), 'file')} described by digest"
            return described if data.exit_code is None else f"{described}; the container {_ended(data)}"
        case schema.Verified():
            return (
                f"{count(data.files, 'file')}, {size(data.size_bytes)} equal; "
                f"{data.changed_by_container} changed by the container itself"
            )
        case schema.SourceReleased():
            return f"kept as {data.kept_as}" if data.kept_as else "removed"
        case schema.AbortOrdered() | schema.RollbackOrdered():
            return data.reason
        case schema.FinaliseOrdered():
            return data.why
        case schema.Finalised():
            return "plain volumes again" + (f", after {data.outage_seconds:.2f} s" if data.outage_seconds else "")
        case schema.TargetAssertedOff():
            return f"{data.who} vouches that the target is powered off"
        case schema.TargetStopped():
            return f"exit code {data.exit_code}; {_dirty(data.trees)} there"
        case schema.CarriedBack():
            return f"{size(data.bytes_moved)} in {count(data.files, 'file')}"
        case schema.SourceRestored():
            return data.note or ("runs again" if data.running else "left stopped, as it was")
        case schema.StepFailed():
            return f"{data.step}: {data.reason} ({data.advice})"
        case schema.StepRecovered():
            return data.step
        case schema.BwlimitOrdered():
            return f"transfers limited to {data.kib} KiB/s" if data.kib else "transfers not limited any more"
        case schema.ControlRefused():
            return f"{data.control}: {data.reason}"
        case schema.Paused() | schema.Resumed():
            return data.by_person or "a person asked for it"
    return _WORDS.get(type(data), "")


_WORDS: dict[type[Data], str] = {
    schema.PrepareOrdered: "both hosts get ready; the container runs on",
    schema.ReleaseOrdered: "everything is on the target: the source lets go",
    schema.Completed: "done: the container lives on the target",
    schema.TargetCleaned: "nothing of the migration is left there",
    schema.Aborted: "done: the container lives on the source, as before",
    schema.RolledBack: "done: the container lives on the source again",
}
"""Events that carry nothing else."""
