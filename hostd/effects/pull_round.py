"""One pre-copy round: pull the data while the container still runs on the source."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

import msgspec

from events.schema import DirtyManifest, SyncArmed, SyncOrdered
from hostd.effects.arrival import Arrival, arrivals
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.limited import pull
from hostd.effects.manifests import entries_of
from hostd.effects.open_layer import withdraw_layer
from hostd.manifest import Entry
from hostd.transport import Progress, RsyncResult
from hostd.verification import remember_directories


class PullRound(Effect):
    """The first round copies everything; later ones what the source lists, or, distrusting, compare all.

    A round without contents lays out names and metadata only, so that the stop window need not (``postcopy``).
    """

    name: ClassVar[str] = "pull_round"

    def run(self, context: Context) -> Outcome:
        armed = context.view.sync_armed
        assert armed is not None
        order = context.view.facts["sync_ordered"]
        assert isinstance(order, SyncOrdered)
        started = time.monotonic()
        withdraw_layer(context, "another round was needed after it had begun to wait")
        moved = files = 0
        for arrival in arrivals(context):
            # Nothing of a writable layer can be federated, so its contents come now whatever the strategy.
            whole = order.contents or arrival.union.layer
            result = self._pull(context, arrival, armed) if whole else _lay_out(context, arrival, armed)
            remember_directories(arrival.union)
            moved += result.bytes_received if result else 0
            files += result.files if result else 0
        return {"bytes_moved": moved, "files": files, "duration_seconds": round(time.monotonic() - started, 3)}

    @staticmethod
    def _pull(context: Context, arrival: Arrival, armed: SyncArmed) -> RsyncResult | None:
        listed = _listed(arrival, armed)
        if arrival.mount.single_file or armed.round == 1 or armed.compare:
            plain = armed.plain is not msgspec.UNSET and arrival.mount.destination in armed.plain
            return _pull_all(context, arrival, compare=armed.compare, plain=plain)
        if listed is not None and listed.everything:  # a layer's, in a round without contents: what went must go
            return _pull_all(context, arrival, compare=True)
        if listed is None:
            return None
        return _pull_listed(context, arrival, listed)


def _listed(arrival: Arrival, armed: SyncArmed) -> DirtyManifest | None:
    return next((d for d in armed.dirty if d.destination == arrival.mount.destination), None)


def _pull_all(context: Context, arrival: Arrival, *, compare: bool, plain: bool = False) -> RsyncResult:
    return pull(
        context,
        arrival,
        arrival.union.upper_tree,
        single_file=arrival.mount.single_file,
        live=True,
        expect_entries=1 if arrival.mount.files else 0,
        checksum=compare,
        plain=plain,
        on_progress=teller(context, arrival, f"pre-copy round {context.view.round}"),
    )


def _pull_listed(context: Context, arrival: Arrival, listed: DirtyManifest) -> RsyncResult | None:
    entries = list(entries_of(context, listed))
    if not entries:
        return None
    # rsync does not see what else lies in a directory that was replaced: that goes first.
    arrival.union.prune(entries)
    names = listed_names(entries, layer=arrival.union.layer)
    if not names:
        return None
    return pull(
        context,
        arrival,
        arrival.union.upper_tree,
        files_from=names,
        live=True,
        reread=True,
        on_progress=teller(context, arrival, f"pre-copy round {context.view.round}"),
    )


def listed_names(entries: list[Entry], *, layer: bool) -> list[bytes]:
    """What a round is to bring of ``entries``, after what is gone was removed.

    Nothing that the list calls gone: what is there again since then, the next list has. Of a writable layer no file
    that is listed only as one of the names of its directory, either.
    """
    there = [entry for entry in entries if entry.kind != "-"]
    return [entry.path for entry in there if not layer or entry.kind != "f" or entry.stale or entry.size == 0]


def _lay_out(context: Context, arrival: Arrival, armed: SyncArmed) -> RsyncResult | None:
    """Make the whole tree here, with placeholders for contents.

    Files with several names are brought: a placeholder says under which name its contents lie, and the source may
    remove that one name before it stops without touching the others.
    """
    listed = _listed(arrival, armed)
    if arrival.mount.single_file or listed is None:
        return None
    entries = list(entries_of(context, listed))
    linked = [entry.path for entry in entries if entry.kind == "f" and entry.link_group and entry.size]
    result = None
    if linked:
        result = pull(
            context,
            arrival,
            arrival.union.upper_tree,
            files_from=linked,
            live=True,
            reread=True,
            on_progress=teller(context, arrival, "files with several names"),
        )
    here = [
        msgspec.structs.replace(entry, stale=False) if entry.kind == "f" and entry.link_group else entry
        for entry in entries
    ]
    context.check_cancelled()
    arrival.union.apply(here, everything=listed.everything)
    return result


def teller(context: Context, arrival: Arrival, step: str) -> Callable[[Progress], None]:
    """Shows how far a transfer is that copies towards the whole tree."""
    total = arrival.mount.size_bytes

    def tell(progress: Progress) -> None:
        context.progress(
            {
                "step": step,
                "mount": arrival.mount.destination,
                "bytes": progress.bytes,
                "total_bytes": total,
                "files": progress.files,
            }
        )

    return tell
