"""rsync under the limit that is in force. Not an effect: shared by those that pull.

A person may change the limit during a transfer. rsync cannot be told, so it is stopped and started again with the
new one; what it had of a large file stays in the partial directory and is not fetched twice.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from events.errors import CancelledError
from hostd.effects.arrival import Arrival, peer_of_source
from hostd.effects.base import Context
from hostd.federation import Union
from hostd.transport import Progress, RsyncResult


class EndedError(Exception):
    """The transfer was ended by ``ended``. What it had of a large file stays for the next one."""


class _Interrupt(threading.Event):
    """Set when the step is no longer wanted, or when another limit is in force than the transfer began with."""

    def __init__(self, context: Context, kib: int, ended: Callable[[], bool]) -> None:
        super().__init__()
        self._context = context
        self._kib = kib
        self._ended = ended

    def is_set(self) -> bool:
        return self._context.cancelled.is_set() or self._context.bwlimit_kib != self._kib or self._ended()


def _never() -> bool:
    return False


def _partial(union: Union, stream: int) -> Path:
    """Parts of files lie there by their last names, so two transfers must not share it."""
    if stream == 0:
        return union.partial
    own = union.stage / f"{union.partial.name}-{stream}"
    own.mkdir(mode=0o700, exist_ok=True)
    return own


def pull(
    context: Context,
    arrival: Arrival,
    destination: Path,
    *,
    on_progress: Callable[[Progress], None],
    wanted: Callable[[], list[bytes]] | None = None,
    ended: Callable[[], bool] = _never,
    stream: int = 0,
    **options: Any,
) -> RsyncResult:
    """``Transport.rsync_pull`` of the arrival's tree, with its temporary directories; repeated for each new limit.

    ``wanted`` gives the ``files_from`` of each repetition, so that what has arrived is not listed again.
    ``bytes_received`` includes what interrupted transfers brought. Progress never goes back. Of several transfers into one
    destination each has a ``stream`` of its own; ``ended`` is asked often and ends this one, with EndedError.
    """
    union = arrival.union
    before = Progress(bytes=0, files=0)
    while True:
        kib = context.bwlimit_kib
        seen = before

        def tell(progress: Progress, so_far: Progress = before) -> None:
            nonlocal seen
            seen = Progress(bytes=so_far.bytes + progress.bytes, files=so_far.files + progress.files)
            on_progress(seen)

        if wanted is not None:
            options["files_from"] = wanted()
        try:
            result = context.bench.transport.rsync_pull(
                peer_of_source(context),
                arrival.mount.tree,
                destination,
                temp_dir=union.incoming,
                partial_dir=_partial(union, stream),
                stream=stream,
                layer=union.layer,
                bwlimit_kib=kib,
                on_progress=tell,
                cancelled=_Interrupt(context, kib, ended),
                **options,
            )
        except CancelledError:
            context.check_cancelled()
            if ended():
                raise EndedError from None
            before = seen
            context.log.info("transfer begun again with another limit", kib=context.bwlimit_kib)
            continue
        return dataclasses.replace(
            result, bytes_received=result.bytes_received + before.bytes, files=result.files + before.files
        )
