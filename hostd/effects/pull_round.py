"""One pre-copy round: pull the data while the container still runs on the source."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from events.schema import DirtyManifest, SyncArmed
from hostd.effects.arrival import Arrival, arrivals, peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.manifests import entries_of
from hostd.transport import Progress, RsyncResult
from hostd.verification import remember_directories


class PullRound(Effect):
    """The first round copies everything; later ones what the source lists, or, distrusting, compare all."""

    name: ClassVar[str] = "pull_round"

    def run(self, context: Context) -> Outcome:
        armed = context.view.sync_armed
        assert armed is not None
        started = time.monotonic()
        moved = files = 0
        for arrival in arrivals(context):
            result = self._pull(context, arrival, armed)
            remember_directories(arrival.union)
            moved += result.bytes_received if result else 0
            files += result.files if result else 0
        return {
            "bytes_moved": moved,
            "files": files,
            "duration_seconds": round(time.monotonic() - started, 3),
        }

    def _pull(self, context: Context, arrival: Arrival, armed: SyncArmed) -> RsyncResult | None:
        listed = next((d for d in armed.dirty if d.destination == arrival.mount.destination), None)
        if arrival.mount.single_file or armed.round == 1 or armed.compare:
            return self._pull_all(context, arrival, compare=armed.compare)
        if listed is None:
            return None
        return self._pull_listed(context, arrival, listed)

    def _pull_all(self, context: Context, arrival: Arrival, *, compare: bool) -> RsyncResult:
        union = arrival.union
        return context.bench.transport.rsync_pull(
            peer_of_source(context),
            arrival.mount.tree,
            union.upper_tree,
            temp_dir=union.incoming,
            partial_dir=union.partial,
            single_file=arrival.mount.single_file,
            live=True,
            expect_entries=1 if arrival.mount.files else 0,
            checksum=compare,
            bwlimit_kib=context.view.requested.request.bwlimit_kib,
            on_progress=self._teller(context, arrival),
            cancelled=context.cancelled,
        )

    def _pull_listed(self, context: Context, arrival: Arrival, listed: DirtyManifest) -> RsyncResult | None:
        paths = [entry.path or b"." for entry in entries_of(context, listed)]
        if not paths:
            return None
        union = arrival.union
        return context.bench.transport.rsync_pull(
            peer_of_source(context),
            arrival.mount.tree,
            union.upper_tree,
            temp_dir=union.incoming,
            partial_dir=union.partial,
            files_from=paths,
            live=True,
            reread=True,
            bwlimit_kib=context.view.requested.request.bwlimit_kib,
            on_progress=self._teller(context, arrival),
            cancelled=context.cancelled,
        )

    @staticmethod
    def _teller(context: Context, arrival: Arrival) -> Callable[[Progress], None]:
        total = arrival.mount.size_bytes

        def tell(progress: Progress) -> None:
            context.progress(
                {
                    "step": f"pre-copy round {context.view.round}",
                    "mount": arrival.mount.destination,
                    "bytes": progress.bytes,
                    "total_bytes": total,
                    "files": progress.files,
                }
            )

        return tell
