"""Bring the container's specification from the source. It holds environment values, so it goes by SSH."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

from events.errors import PermanentError, RefusedError
from hostd.effects.arrival import peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.fidelity import known_name, stripped
from hostd.spec import ContainerSpec
from hostd.spec_file import read_spec

SPEC_FILE = "spec.json"


class FetchSpec(Effect):
    """Fetches and checks the file that ``source_prepared`` names."""

    name: ClassVar[str] = "fetch_spec"

    def run(self, context: Context) -> Outcome:
        context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        reference = context.view.source_prepared.spec
        context.bench.transport.fetch(peer_of_source(context), reference, _file(context), cancelled=context.cancelled)
        load_spec(context)
        return None

    def undo(self, context: Context) -> Outcome:
        """Forget everything kept here about the migration."""
        if context.directory.exists():
            shutil.rmtree(context.directory)
        return None


def _file(context: Context) -> Path:
    return context.directory / SPEC_FILE


def arriving_spec(context: Context) -> ContainerSpec:
    """The specification without what the request consents to leave behind. Raises RefusedError, PermanentError."""
    without = context.view.requested.request.without
    if unknown := [name for name in without if not known_name(name)]:
        raise RefusedError([f'"without" names {name!r}, which is nothing to go without' for name in unknown])
    return stripped(load_spec(context), without)


def load_spec(context: Context) -> ContainerSpec:
    """The specification, which must be the one the source recorded, of the container it recorded."""
    prepared = context.view.source_prepared
    spec = read_spec(_file(context), prepared.spec)
    if spec.name != prepared.container_name or spec.container_id != prepared.container_id:
        raise PermanentError("the specification is of another container than the history says; not used")
    return spec
