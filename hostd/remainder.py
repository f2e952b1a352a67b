"""What becomes of contents that have not arrived when the source stops.

They are brought inside the stop window, so that the container starts on a plain tree, or they are federated: the
container starts at once and reads them through the union. Decided on the target as soon as it reads
``source_stopped``, from nothing but the history, so that it decides the same when it is asked again.

Very little is *at hand*: the open view of the source gives it within the time that a union costs, so it is tried before
anything else (``hostd/at_hand.py``), and what did not come of it goes the decided way.

Pure: no clock, no randomness, no I/O, no logging.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from events.schema import SyncFinished
from hostd.plan import View

MAX_FIXED_SECONDS = 1.0
"""Connecting, listing and flushing cost what the shortest round cost, but a round that copied much says nothing of
that beyond a second."""
SECONDS_A_FILE = 0.001
"""rsync opens, compares and renames some thousands of files a second on a small machine; this is on the safe side."""

AT_HAND_BYTES = 8 * 1024 * 1024
AT_HAND_FILES = 32
AT_HAND_SECONDS = 0.1
"""A union costs some 30 ms, and what is read through it first about as much again. What has not come within this does not
come soon, and is not worth more of an outage that otherwise depends on no link."""


@dataclass(frozen=True)
class Remainder:
    """The decision, and its reason in words."""

    kind: Literal["none", "finished", "federated"]
    why: str
    at_hand: bool = False
    """So little that the view of the source is asked for it first."""
    amount: str = ""
    """How much it is, in words."""


def decide(view: View) -> Remainder:
    """Whether the remainder is brought now. Call it only after ``source_stopped``."""
    # What no union can carry, a single file and the writable layer, is brought in the stop window in any case.
    brought = {
        mount.destination for mount in view.source_prepared.mounts if mount.single_file or mount.kind == "rootfs"
    }
    dirty = [listed for listed in view.dirty() if listed.destination not in brought]
    stale_bytes = sum(listed.stale_bytes for listed in dirty)
    stale_files = sum(listed.stale_files for listed in dirty)
    amount = f"{stale_bytes / 1e6:.1f} MB" if stale_bytes >= 10**5 else f"{stale_bytes} bytes"
    shown = f"{amount} in {stale_files} files"
    if view.strategy == "postcopy":
        return Remainder("federated", "postcopy: the contents follow while the container runs")
    if stale_files == 0:
        return Remainder("none", "all contents had arrived before the stop")
    if view.strategy in ("precopy", "cold"):
        return Remainder("finished", f"{view.strategy}: {shown} were brought while the container was stopped")
    kind, why = _within_budget(view, shown, stale_bytes, stale_files)
    # A limit is there to spare the link, and the view does not know of it.
    little = stale_bytes <= AT_HAND_BYTES and stale_files <= AT_HAND_FILES and view.bwlimit_kib == 0
    return Remainder(kind, why, little and _may_come_at_once(stale_bytes, view.rounds), shown)


def _may_come_at_once(stale_bytes: int, rounds: Iterable[SyncFinished]) -> bool:
    """Whether no round has shown that the link is too slow. One that moved little says nothing of the link."""
    telling = [done for done in rounds if done.bytes_moved >= AT_HAND_BYTES and done.duration_seconds > 0]
    rate = max((done.bytes_moved / done.duration_seconds for done in telling), default=0.0)
    return not rate or stale_bytes <= rate * AT_HAND_SECONDS


def _within_budget(
    view: View, shown: str, stale_bytes: int, stale_files: int
) -> tuple[Literal["finished", "federated"], str]:
    budget = view.downtime_budget_seconds
    if budget <= 0:
        return "federated", f"{shown} follow while the container runs"
    seconds = estimate(stale_bytes, stale_files, view.rounds, bwlimit_kib=view.bwlimit_kib)
    if seconds is None:
        return "federated", f"{shown} follow: how fast they would come was never measured"
    if seconds <= budget:
        return "finished", (
            f"{shown}, estimated at {seconds:.2f} s, were brought while the container was stopped: "
            f"within the downtime budget of {budget:g} s"
        )
    return (
        "federated",
        f"{shown} follow: bringing them first would take {seconds:.2f} s, the downtime budget is {budget:g} s",
    )


def estimate(
    stale_bytes: int, stale_files: int, rounds: Iterable[SyncFinished], *, bwlimit_kib: int = 0
) -> float | None:
    """Seconds that a last round would take, by the measure of the earlier ones; None if these measured nothing.

    The best rate counts: a round that had little to move says more about its fixed cost than about the link.
    """
    measured = [done for done in rounds if done.bytes_moved > 0 and done.duration_seconds > 0]
    if not measured:
        return None
    rate = max(done.bytes_moved / done.duration_seconds for done in measured)
    if bwlimit_kib:
        rate = min(rate, bwlimit_kib * 1024)
    fixed = min(MAX_FIXED_SECONDS, *(done.duration_seconds for done in measured))
    return fixed + stale_bytes / rate + stale_files * SECONDS_A_FILE
