"""Give the container on the target back to Docker, with its own restart policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from events.keyspace import valid_migration_id
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.supervise_container import see_that_it_runs
from hostd.engine import Engine
from hostd.fold import sync_directory, write_durably
from hostd.own_file import read_own
from hostd.spec import MIGRATION_LABEL


class _Due(msgspec.Struct, frozen=True, array_like=True):
    container_id: str
    policy: str
    max_retries: int


class ReturnPolicy(Effect):
    """Only once ``finalised`` is durable: before that, a rollback takes back what is still under way here.

    A Docker that started the container by itself at the next boot, while the agent has to see to it and a person has
    vouched that the host is off, would run a second copy.
    """

    name: ClassVar[str] = "return_policy"

    def run(self, context: Context) -> Outcome:
        due = _place(context.directory)
        if not due.exists():
            return None  # done, or by an agent of an earlier version; the container is a person's by now
        record = read_own(due, _Due)
        if _set(context.bench.engine, record):
            # Docker starts nothing of which it did not see the end, and nobody supervises it from here on.
            see_that_it_runs(context, record.container_id)
        _done(due)
        return None


def note_policy_due(context: Context, container_id: str) -> None:
    """Before ``finalised`` is appended: the container's own policy is still to be returned."""
    context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    prepared = context.view.source_prepared
    due = _Due(container_id, prepared.restart_policy, prepared.restart_max_retries)
    write_durably(_place(context.directory), msgspec.msgpack.encode(due))


def return_first(context: Context, inspected: Mapping[str, Any]) -> bool:
    """Before a container moves on: return its policy, if the migration that brought it here has not yet. Whether it had to.

    Else the next migration would take "no" for the container's own. Raises what Docker says.
    """
    earlier = str(((inspected.get("Config") or {}).get("Labels") or {}).get(MIGRATION_LABEL, ""))
    due = _place(context.directory.parent / earlier)
    if earlier == context.migration or not valid_migration_id(earlier) or not due.exists():
        return False
    record = read_own(due, _Due)
    if record.container_id != inspected.get("Id"):
        return False
    _set(context.bench.engine, record)
    _done(due)
    return True


def _set(engine: Engine, record: _Due) -> bool:
    """Whether the container is there."""
    if engine.inspect(record.container_id) is None:
        return False
    engine.set_restart_policy(record.container_id, record.policy, record.max_retries)
    return True


def _done(due: Path) -> None:
    due.unlink(missing_ok=True)
    sync_directory(due.parent)


def _place(directory: Path) -> Path:
    return directory / "policy-due"
