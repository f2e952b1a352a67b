"""Compare everything that arrived with the frozen source, by digest."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

from events.errors import PermanentError
from events.schema import SourceDigested, TreeDigest
from hostd.effects.arrival import Arrival, arrivals
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.manifests import fetched
from hostd.manifest import read_manifest, tree_digest
from hostd.priority import in_background
from hostd.verification import verify

MAX_NAMED = 20
FETCHED_AT_ONCE = 4


class VerifyTrees(Effect):
    """Any entry that differs, and that the container has not changed itself, ends in a hold: both copies stay."""

    name: ClassVar[str] = "verify_trees"

    def run(self, context: Context) -> Outcome:
        digested = context.view.facts["source_digested"]
        assert isinstance(digested, SourceDigested)
        trees = {tree.destination: tree for tree in digested.trees}
        files = size_bytes = changed = 0
        digests = {}
        here = arrivals(context)
        for arrival, manifest in zip(here, _manifests(context, here, trees), strict=True):
            destination = arrival.mount.destination
            if arrival.union.layer and arrival.union.layer_root() is None:
                context.log.warning("the container was removed by somebody, and its writable layer with it")
                digests[destination] = tree_digest(read_manifest(manifest))
                continue
            found = in_background(partial(verify, manifest, arrival.union, check=context.check_cancelled))
            if found.differences:
                named = "; ".join(difference.words for difference in found.differences[:MAX_NAMED])
                raise PermanentError(
                    f"{destination} differs from the frozen source in {found.difference_count} places: {named}. "
                    "Both copies are kept; the container goes on with what it has"
                )
            digests[destination] = found.digest
            files += found.files
            size_bytes += found.size_bytes
            changed += found.changed
        return {
            "files": files,
            "size_bytes": size_bytes,
            "changed_by_container": changed,
            "digests": digests,
        }


def _manifests(context: Context, here: list[Arrival], trees: dict[str, TreeDigest]) -> list[Path]:
    """The source's lists of all trees; several are brought at once, as each takes a connection some time to begin."""
    if missing := [a.mount.destination for a in here if a.mount.destination not in trees]:
        raise PermanentError(f"the source published no digests of {', '.join(missing)}")
    with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
        return list(pool.map(lambda arrival: fetched(context, trees[arrival.mount.destination].manifest), here))
