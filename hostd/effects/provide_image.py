"""The container's very image must be on this host before anything stops."""

from __future__ import annotations

from typing import ClassVar

from events.errors import RefusedError
from hostd.effects.base import Context, Effect, Outcome


class ProvideImage(Effect):
    """Looks for the image by its id, which names its contents."""

    name: ClassVar[str] = "provide_image"

    def run(self, context: Context) -> Outcome:
        prepared = context.view.source_prepared
        if context.bench.engine.image_inspect(prepared.image_id) is None:
            called = ", ".join(prepared.image_tags) or prepared.image_id
            raise RefusedError(
                [
                    f"the image {called} ({prepared.image_id}) is not on {context.host}; "
                    f"bring it there first, for example: docker save {called.split(',')[0]} on the source, "
                    f"docker load on {context.host}"
                ]
            )
        return None
