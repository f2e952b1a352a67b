"""What this host mounts again at its boot before Docker starts any container: the unions that stood when it went down.

``cargo-hostd mounts``. Whoever finds the empty place below a union's mount may take it for the data, so the mounts
come first, from this host's own records: without etcd, without the network, and without the source, for whose contents
readers wait until the agent has opened the view of it again. Docker starts no container that stands on a union by
itself; this is for the others that use its volumes, and for what people and supervisors start.

What it must never do: mount what did not stand. A union says so itself, in its stage (``Union.stood``); the record in
the migration's directory only tells where that stage is, and outlives it without harm. Nothing is decided here: whether
a union should go on standing, the history says, and the agent takes it down if not.

Flow: ``mount_union`` and ``supervise_container`` note → boot → ``mount_again`` → docker → agent.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from events.errors import CargoError
from hostd.federation import Union

RECORD = "unions"
"""File of the migration."""


class _Where(msgspec.Struct, frozen=True, array_like=True):
    stage: bytes
    place: bytes


@dataclass(frozen=True)
class Mounted:
    """What became of one union. ``trouble`` is empty when it stands, in words otherwise."""

    migration: str
    place: Path
    trouble: str = ""


def note(directory: Path, unions: Iterable[Union]) -> None:
    """Remember, in the migration's ``directory``, where its unions are. Costs a read when that is known already."""
    places = [_Where(os.fsencode(union.stage), os.fsencode(union.place)) for union in unions if union.federable]
    record, wanted = directory / RECORD, msgspec.msgpack.encode(places)
    if (record.exists() and record.read_bytes() == wanted) or not places:
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = record.with_suffix(".new")
    draft.write_bytes(wanted)  # if it is lost in a crash, the agent mounts, after Docker has started
    os.replace(draft, record)


def mount_again(state_dir: Path, *, patience_seconds: float) -> list[Mounted]:
    """Mount what stood and does not stand now; harmless when repeated. One that fails does not keep the others."""
    done = []
    for record in sorted((state_dir / "migrations").glob(f"*/{RECORD}")):
        migration = record.parent.name
        try:
            places = msgspec.msgpack.decode(record.read_bytes(), type=list[_Where])
        except (OSError, msgspec.MsgspecError) as error:
            done.append(Mounted(migration, record, f"the record cannot be read: {error}"))
            continue
        for where in places:
            union = Union(
                Path(os.fsdecode(where.stage)), Path(os.fsdecode(where.place)), patience_seconds=patience_seconds
            )
            if not union.stood() or union.state().placed:
                continue
            done.append(Mounted(migration, union.place, _mount(union)))
    return done


def _mount(union: Union) -> str:
    try:
        union.mount_lower()
        union.mount_merged()
    except (CargoError, OSError) as error:
        return str(error)
    return ""
