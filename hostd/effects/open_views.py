"""Begin to open the read-only views of the source's trees, beside the rounds, which need none."""

from __future__ import annotations

import dataclasses
import threading
from functools import partial
from typing import ClassVar

from hostd.effects.attach_remote import WITHOUT_UNION, attach_all, call_off_opening, detach_all
from hostd.effects.base import Context, Effect, Outcome
from hostd.opening import Opening


class OpenViews(Effect):
    """Does not wait, and never fails: ``attach_remote`` waits for the end of it, and does again what did not come of it."""

    name: ClassVar[str] = "open_views"

    def run(self, context: Context) -> Outcome:
        openings = context.bench.openings
        under_way = openings.get(context.migration)
        if context.view.strategy in WITHOUT_UNION or (under_way is not None and not under_way.ended):
            return None

        def attach(called_off: threading.Event) -> None:
            attach_all(dataclasses.replace(context, cancelled=called_off, places={}))

        openings[context.migration] = Opening(context.migration, attach, partial(detach_all, context))
        return None

    def undo(self, context: Context) -> Outcome:
        """Nothing is mounted any more after this, so that what is can be unmounted."""
        call_off_opening(context)
        return None
