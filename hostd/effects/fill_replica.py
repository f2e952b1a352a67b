"""Bring what is still remote, in the background, while the container works."""

from __future__ import annotations

import time
from typing import ClassVar

from hostd.effects.arrival import Arrival, arrivals, peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.transport import Progress

BATCH_FILES = 2000
"""After each batch the list is made anew, so that what the container has replaced or removed meanwhile is
not fetched; it is also what an interruption loses at most."""


class FillReplica(Effect):
    """Each file appears in the replica by an atomic rename, under the name that the source has it by."""

    name: ClassVar[str] = "fill_replica"

    def run(self, context: Context) -> Outcome:
        started = time.monotonic()
        moved = files = 0
        for arrival in arrivals(context):
            if arrival.union.state().settled:
                continue
            while wanted := arrival.union.fill_list():
                context.check_cancelled()
                received, count = self._fetch(context, arrival, wanted[:BATCH_FILES], len(wanted))
                moved += received
                files += count
        return {
            "bytes_moved": moved,
            "files": files,
            "duration_seconds": round(time.monotonic() - started, 3),
        }

    @staticmethod
    def _fetch(context: Context, arrival: Arrival, batch: list[bytes], remaining: int) -> tuple[int, int]:
        union = arrival.union

        def tell(progress: Progress) -> None:
            context.progress(
                {
                    "step": "fill",
                    "mount": arrival.mount.destination,
                    "bytes": progress.bytes,
                    "files_remaining": max(0, remaining - progress.files),
                }
            )

        result = context.bench.transport.rsync_pull(
            peer_of_source(context),
            arrival.mount.tree,
            union.replica,
            temp_dir=union.incoming,
            partial_dir=union.partial,
            files_from=batch,
            delete=False,
            reread=True,
            basis=union.basis,
            bwlimit_kib=context.view.requested.request.bwlimit_kib,
            on_progress=tell,
            cancelled=context.cancelled,
        )
        return result.bytes_received, result.files
