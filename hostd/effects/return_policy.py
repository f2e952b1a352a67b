"""Give the container on the target back to Docker, with its own restart policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from events.errors import TransientError
from events.keyspace import valid_migration_id
from hostd.effects.arrival import our_container
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.supervise_container import see_that_it_runs
from hostd.fold import write_durably
from hostd.spec import MIGRATION_LABEL


class ReturnPolicy(Effect):
    """Only once ``finalised`` is durable: until then a rollback may be ordered, and a person may vouch that this host is off.

    A Docker that started the container by itself at the next boot would then run a second copy of it.
    """

    name: ClassVar[str] = "return_policy"

    def run(self, context: Context) -> Outcome:
        if not _due(context.directory).exists():
            return None  # done, or by an agent of an earlier version; the container is a person's by now
        container_id = our_container(context)
        if container_id is not None and context.bench.engine.inspect(container_id) is not None:
            prepared = context.view.source_prepared
            context.bench.engine.set_restart_policy(container_id, prepared.restart_policy, prepared.restart_max_retries)
            # Docker starts nothing of which it did not see the end, and nobody supervises it from here on.
            see_that_it_runs(context, container_id)
        _due(context.directory).unlink()
        return None


def note_policy_due(context: Context) -> None:
    """Before ``finalised`` is appended: the container's own policy is still to be returned."""
    context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(_due(context.directory), b"")


def require_policy_returned(context: Context, inspected: Mapping[str, Any]) -> None:
    """Before a container moves on: what Docker says of its policy is its own. Raises TransientError."""
    earlier = str(((inspected.get("Config") or {}).get("Labels") or {}).get(MIGRATION_LABEL, ""))
    if valid_migration_id(earlier) and _due(context.directory.parent / earlier).exists():
        raise TransientError(
            f"{context.host} is just giving the container its own restart policy back, which ends the migration {earlier}"
        )


def _due(directory: Path) -> Path:
    return directory / "policy-due"
