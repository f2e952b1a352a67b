"""Cut the link: afterwards nothing on this host refers to the source, which may be switched off."""

from __future__ import annotations

from typing import ClassVar

from hostd.effects.arrival import arrivals
from hostd.effects.base import Context, Effect, Outcome


class DetachRemote(Effect):
    """The union goes on with what is local; the container notices nothing."""

    name: ClassVar[str] = "detach_remote"

    def run(self, context: Context) -> Outcome:
        for arrival in arrivals(context):
            if not arrival.mount.single_file:
                arrival.union.detach_remote()
        return None
