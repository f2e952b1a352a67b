"""Pack what the target lacks of the container's image. The container goes on running meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from events.errors import PermanentError, RefusedError
from events.schema import ImageWanted
from hostd.effects.base import Context, Effect, Outcome
from hostd.image_archive import layers_missing, layers_to_leave_out, pack
from hostd.spec_file import read_spec

ARCHIVE = "image.tar"


class PackImage(Effect):
    """Leaves the archive in this migration's directory, with which it goes.

    The image is packed by its id, without names: what they are is in the history, and the target gives them only
    where they mean nothing else there.
    """

    name: ClassVar[str] = "pack_image"

    def run(self, context: Context) -> Outcome:
        wanted = context.view.facts["image_wanted"]
        assert isinstance(wanted, ImageWanted)
        prepared = context.view.source_prepared
        if wanted.image_id != prepared.image_id:
            raise PermanentError(f"the target asks for the image {wanted.image_id!r}, which is not the container's")
        layers = read_spec(context.directory / "spec.json", prepared.spec).image_layers
        size_bytes = _check_space(context, prepared.image_id)
        without = layers_to_leave_out(layers, wanted.layers)
        packed = pack(
            _told(context, context.bench.engine.save_image([prepared.image_id]), size_bytes),
            context.directory / ARCHIVE,
            without,
            context.cancelled,
            blobs=wanted.blobs,
        )
        _check_whole(context, layers, without)
        return {
            "archive": packed.archive,
            "layers": len(layers) - len(wanted.layers),
            "left_out_bytes": packed.left_out_bytes,
        }


def _check_space(context: Context, image_id: str) -> int:
    """The image's size as Docker tells it, bytes. Raises PermanentError when that may not fit."""
    size_bytes = int((context.bench.engine.image_inspect(image_id) or {}).get("Size") or 0)
    free_bytes = shutil.disk_usage(context.directory).free
    if size_bytes > free_bytes:
        raise PermanentError(
            f"{context.host} has {free_bytes} bytes free in {context.directory}, packing the image may need {size_bytes}"
        )
    return size_bytes


def _check_whole(context: Context, layers: Sequence[str], without: frozenset[str]) -> None:
    """containerd's store may lack parts of an image that runs, and ``docker save`` says nothing of it."""
    missing = set(layers_missing(context.directory / ARCHIVE, layers).values()) - without
    if missing:
        (context.directory / ARCHIVE).unlink()
        raise RefusedError(
            [
                f"Docker on {context.host} runs the image, but has not kept all parts of it, so it cannot be carried to the "
                f"target (missing: {', '.join(sorted(missing))}); bring the image to the target first, or ask with "
                "'image: pull'"
            ]
        )


def _told(context: Context, pieces: Iterable[bytes], total_bytes: int) -> Iterator[bytes]:
    """Say how much of the image has been read; layers that do not travel are read too."""
    done_bytes = 0
    for piece in pieces:
        done_bytes += len(piece)
        context.progress({"phase": "image", "bytes": done_bytes, "total_bytes": max(total_bytes, done_bytes)})
        yield piece
