"""Serve the trees to the target by NFS, if that is how it is to look at them, for as long as it needs them.

A request, or this host's setting, chooses between sshfs, which needs nothing here, and NFS. What is chosen, and the
port, are in ``source_prepared``; from then on the history decides.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from events.errors import RefusedError
from hostd.effects.attach_remote import WITHOUT_UNION
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.shared import moving_mounts
from hostd.layer import ROOTFS
from hostd.nfs_server import NfsServer

LOOK_AGAIN_SECONDS = 15.0
"""A server that was killed is started again within this; the target's readers wait meanwhile."""


class ExportTrees(Effect):
    """Read-only, to the target's address only. Level-triggered: a reboot or a kill of the server is mended."""

    name: ClassVar[str] = "export_trees"

    def run(self, context: Context) -> Outcome:
        prepared = "source_prepared" in context.view.facts
        if not _wanted(context, prepared=prepared):
            return None
        target = context.view.requested.target_address
        if not target:
            raise RefusedError(["the target's address is not in the history, so nothing can be exported to it"])
        trees = _trees_of_event(context) if prepared else _trees_of_container(context)
        if not trees:
            return None
        settings = context.bench.settings
        server = server_of(context)
        context.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        port = server.serve(trees, client=target, address=settings.address, first_port=settings.nfs_port)
        if prepared:
            context.poke_after = LOOK_AGAIN_SECONDS
        return {"remote": "nfs", "remote_port": port}

    def undo(self, context: Context) -> Outcome:
        """Withdraw the exports: nobody has to look at the trees any more."""
        withdraw(context)
        return None


def server_of(context: Context) -> NfsServer:
    """This migration's own server, running or not."""
    return NfsServer(context.directory / "nfs")


def withdraw(context: Context) -> None:
    """End what serves the trees; harmless when nothing does."""
    server_of(context).withdraw()


def _wanted(context: Context, *, prepared: bool) -> bool:
    if prepared:
        return context.view.source_prepared.remote == "nfs"
    request = context.view.request
    return request.strategy not in WITHOUT_UNION and (request.remote or context.bench.settings.remote) == "nfs"


def _trees_of_event(context: Context) -> dict[int, str]:
    mounts = context.view.source_prepared.mounts
    return {number: mount.tree for number, mount in enumerate(mounts) if not mount.single_file and mount.kind != ROOTFS}


def _trees_of_container(context: Context) -> dict[int, str]:
    inspected: dict[str, Any] = context.bench.engine.inspect(context.view.requested.container_id) or {}
    mounts = moving_mounts(context, inspected)  # in the order of the event that they will be in
    return {number: mount.tree for number, mount in enumerate(mounts) if os.path.isdir(mount.tree)}
