"""Bring what is still remote, in the background, while the container works."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

from events.errors import PermanentError, TransientError
from hostd.effects.arrival import Arrival, arrivals, peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.limited import EndedError, pull
from hostd.placement import Placeholder
from hostd.priority import in_background
from hostd.process import destination_lock
from hostd.streams import FILE_WORK_BYTES, MAX_STREAMS, Pace, work_off
from hostd.transport import Progress, RsyncResult

BATCH_FILES = 2000
"""Right before each batch it is looked once more which of its files are still needed, so that what the container has
replaced or removed meanwhile is not fetched; it is also what an interruption loses at most."""
BATCH_BYTES = 512 * 1024 * 1024
"""The same, for large files. A larger one goes alone, and its part that has arrived survives an interruption."""
RATE_SECONDS = 10.0
"""The rate that is shown, and the remaining time by it, are of the last so many seconds."""


class FillReplica(Effect):
    """Each file appears in the replica by an atomic rename, under the name that the source has it by.

    One rsync at a time, or several where that was measured to be faster (``hostd/streams.py``).
    """

    name: ClassVar[str] = "fill_replica"

    def run(self, context: Context) -> Outcome:
        started = time.monotonic()
        everywhere = arrivals(context)
        for arrival in everywhere:
            _put_away(context, arrival)
        here = [arrival for arrival in everywhere if not arrival.union.state().settled]
        for arrival in here:
            arrival.union.admit()  # what an earlier attempt has brought
        wanted = [(arrival, arrival.union.remaining()) for arrival in here]
        tally = _Tally(context, [holder for _, holders in wanted for holder in holders])
        if tally.remaining_files:
            # The connection is shared with transfers that are in a hurry: it is opened before stepping back.
            context.bench.transport.check(peer_of_source(context))
            _look_at_source(context, wanted)
            in_background(lambda: _fill(context, tally, wanted))
        for arrival in here:
            arrival.union.let_go_of_server()
        tally.finished()
        return {
            "bytes_moved": tally.received_bytes,
            "files": tally.received_files,
            "duration_seconds": round(time.monotonic() - started, 3),
        }


def _put_away(context: Context, arrival: Arrival) -> None:
    """What a plain tree does not need. Neither the fill nor a way back waits for it; ``detach_remote`` does."""
    try:
        arrival.union.put_away()
    except TransientError as error:
        context.log.warning("what was opened to read the source through is still in use", reason=str(error))


def _look_at_source(context: Context, wanted: list[tuple[Arrival, list[Placeholder]]]) -> None:
    """What the container reads before it has arrived comes through a view, which may have died (D14)."""
    for arrival, holders in wanted:
        if holders and arrival.union.federable:
            arrival.attach_remote(context)


def _fill(context: Context, tally: _Tally, wanted: list[tuple[Arrival, list[Placeholder]]]) -> None:
    pace = Pace()
    for arrival, first in wanted:
        holders = first
        _wait_for_earlier_streams(context, arrival)
        while holders:
            work_off(
                batches(holders),
                partial(_fetch, context, arrival, tally),
                pace=pace,
                work=tally.work,
                alone=lambda: context.bwlimit_kib > 0,
            )
            left = arrival.union.remaining()
            if len(left) >= len(holders):
                raise PermanentError(
                    f"{left[0].path!r} of {arrival.mount.destination} should have {left[0].size} bytes, but what the "
                    f"source sends is not that: something has changed it there since the stop. {len(left)} files are "
                    "concerned; the container goes on, and reads them from the source"
                )
            holders = left
    if pace.rates:
        context.log.info("streams of the fill", streams=pace.streams, measured=pace.rates)


def _wait_for_earlier_streams(context: Context, arrival: Arrival) -> None:
    """Of an earlier life of this agent. The first one is waited for by whoever takes its number."""
    for stream in range(1, MAX_STREAMS):
        with destination_lock(context.bench.transport.run_dir, arrival.union.replica, context.cancelled, stream=stream):
            pass


def batches(holders: list[Placeholder]) -> Iterator[list[Placeholder]]:
    """In order, each within BATCH_FILES, and within BATCH_BYTES unless it is a single file."""
    batch: list[Placeholder] = []
    size_bytes = 0
    for holder in holders:
        if batch and (len(batch) >= BATCH_FILES or size_bytes + holder.size > BATCH_BYTES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(holder)
        size_bytes += holder.size
    if batch:
        yield batch


def _fetch(
    context: Context, arrival: Arrival, tally: _Tally, batch: list[Placeholder], stream: int, stop: threading.Event
) -> bool:
    """Bring what is needed of a batch. False when it was ended before, because one stream must do."""
    context.check_cancelled()
    union = arrival.union

    def ended() -> bool:
        return stop.is_set() or (stream > 0 and context.bwlimit_kib > 0)

    if ended():
        return False
    needed = union.remaining(batch)
    received = None
    if needed:
        try:
            received = pull(
                context,
                arrival,
                union.replica,
                wanted=lambda: [holder.path for holder in union.remaining(needed)],
                ended=ended,
                stream=stream,
                reread=True,
                basis=union.basis,
                on_progress=lambda progress: tally.show(arrival, stream, progress),
            )
        except EndedError:
            tally.drop(stream)
            return False
    union.admit(batch, on_disk=received is not None)
    tally.settle(batch, stream, received)
    return True


class _Tally:
    """What has arrived and what has not, over all mounts and streams; shown to people, monotone."""

    def __init__(self, context: Context, holders: list[Placeholder]) -> None:
        self._context = context
        self._lock = threading.Lock()
        self.remaining_bytes = sum(holder.size for holder in holders)
        self.remaining_files = len(holders)
        self.received_bytes = 0
        self.received_files = 0
        self._under_way: dict[int, Progress] = {}
        """By stream: how far its transfer is."""
        self._shown = Progress(bytes=0, files=0)
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def settle(self, batch: list[Placeholder], stream: int, received: RsyncResult | None) -> None:
        """The batch is done with: its files have arrived, or the container does not need them any more."""
        with self._lock:
            self._under_way.pop(stream, None)
            self.remaining_bytes -= sum(holder.size for holder in batch)
            self.remaining_files -= len(batch)
            if received is not None:
                self.received_bytes += received.bytes_received
                self.received_files += received.files

    def drop(self, stream: int) -> None:
        """The stream's transfer was ended; its batch comes again."""
        with self._lock:
            self._under_way.pop(stream, None)

    def work(self) -> float:
        """What has been done in all, in bytes and their equivalent."""
        with self._lock:
            done = self._done()
        return done.bytes + FILE_WORK_BYTES * done.files

    def _done(self) -> Progress:
        under_way = self._under_way.values()
        return Progress(
            bytes=self.received_bytes + sum(progress.bytes for progress in under_way),
            files=self.received_files + sum(progress.files for progress in under_way),
        )

    def show(self, arrival: Arrival, stream: int, progress: Progress) -> None:
        """The transfer of a batch under way has come so far."""
        with self._lock:
            self._under_way[stream] = progress
            done = self._done()
            done = Progress(bytes=max(self._shown.bytes, done.bytes), files=max(self._shown.files, done.files))
            self._shown = done
            rate = self._rate(done.bytes)
            under_way = list(self._under_way.values())
            remaining = max(0, self.remaining_bytes - sum(each.bytes for each in under_way))
            fields = {
                "step": "fill",
                "mount": arrival.mount.destination,
                "bytes": done.bytes,
                "files": done.files,
                "rate_bytes_per_second": int(rate),
                "remaining_bytes": remaining,
                "remaining_files": max(0, self.remaining_files - sum(each.files for each in under_way)),
                "streams": len(under_way),
                "bwlimit_kib": self._context.bwlimit_kib,
                "safe_to_switch_off_source": False,
            }
            if rate > 0:
                fields["remaining_seconds"] = round(remaining / rate, 1)
            self._context.progress(fields)

    def finished(self) -> None:
        """Nothing is missing any more, but the comparison with the source still is."""
        self._context.progress(
            {
                "step": "filled; waiting for the comparison with the source",
                "bytes": self.received_bytes,
                "files": self.received_files,
                "remaining_bytes": 0,
                "remaining_files": 0,
                "safe_to_switch_off_source": False,
                "finished": True,
            }
        )

    def _rate(self, done_bytes: int) -> float:
        now = time.monotonic()
        self._marks.append((now, done_bytes))
        while now - self._marks[0][0] > RATE_SECONDS and len(self._marks) > 2:
            self._marks.popleft()
        began, before = self._marks[0]
        return (done_bytes - before) / (now - began) if now > began else 0.0
