"""Rolling back: list the target's trees, marking what the container changed since the cut-over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from events.schema import DirtyManifest, RollbackOrdered, SourceDigested
from hostd.effects.arrival import Arrival, arrivals
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.manifests import here_already
from hostd.manifest import Entry, write_manifest
from hostd.verification import changed_entries


class ListChanges(Effect):
    """The whole tree by name and metadata; contents only of what is not on the source under the same name already."""

    name: ClassVar[str] = "list_changes"

    def run(self, context: Context) -> Outcome:
        order = context.view.facts["rollback_ordered"]
        assert isinstance(order, RollbackOrdered)
        if order.discard_target_writes:
            return {"trees": ()}
        context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        here = [arrival for arrival in arrivals(context) if _is_there(context, arrival)]
        return {
            "trees": tuple(self._list(context, arrival, number) for number, arrival in enumerate(here)),
            "places": {arrival.mount.destination: str(_root(arrival)) for arrival in here},
        }

    @staticmethod
    def _list(context: Context, arrival: Arrival, number: int) -> DirtyManifest:
        files = size_bytes = 0

        def counted() -> Iterator[Entry]:
            nonlocal files, size_bytes
            for entry in changed_entries(arrival.union, context.directory, _digests(context, arrival)):
                context.check_cancelled()
                files += entry.stale
                size_bytes += entry.size if entry.stale else 0
                yield entry

        reference = write_manifest(context.directory / f"changes-{number}.manifest", counted())
        return DirtyManifest(
            destination=arrival.mount.destination,
            manifest=reference,
            stale_files=files,
            stale_bytes=size_bytes,
            everything=True,
        )


def _digests(context: Context, arrival: Arrival) -> Path | None:
    """The source's own description of the tree, if it was brought here for the comparison and is whole."""
    digested = context.view.facts.get("source_digested")
    trees = digested.trees if isinstance(digested, SourceDigested) else ()
    for tree in trees:
        if tree.destination == arrival.mount.destination:
            return here_already(context, tree.manifest)
    return None


def _root(arrival: Arrival) -> Path:
    return (arrival.union.layer_root() if arrival.union.layer else None) or arrival.union.place


def _is_there(context: Context, arrival: Arrival) -> bool:
    """A writable layer goes with its container when somebody removes that; the source then keeps its own as it is."""
    if not arrival.union.layer or arrival.union.layer_root() is not None:
        return True
    context.log.warning("the container was removed here, and what it had written outside of its mounts with it")
    return False
