"""The container's very image must be on this host before anything stops.

A missing one is asked for (``image_wanted``); when the source has packed what is missing of it, it is fetched by
SSH and loaded. Nothing goes to a registry unless the request says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import msgspec

from events.errors import CargoError, PermanentError, RefusedError, TransientError
from events.schema import FileRef, ImagePacked
from hostd.effects.arrival import peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.fetch_spec import load_spec
from hostd.image_archive import layers_present, pieces_of
from hostd.transport import Progress
from hostd.turn import ENDS_STEP

ARCHIVE = "image.tar"
BROUGHT = "image-brought.json"
"""Written before an image is brought: what an abort may remove. Without it the image was here before."""
SPACE_FACTOR = 3
"""The archive, Docker's own unpacked copy of it while it loads, and the layers."""
MAX_ARCHIVE_BYTES = 256 * 1024**3


class _Brought(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    image_id: str
    names: tuple[str, ...]


class ProvideImage(Effect):
    """Looks for the image by its id, which names its contents; brings it, with those of its names that are free."""

    name: ClassVar[str] = "provide_image"

    def run(self, context: Context) -> Outcome:
        engine = context.bench.engine
        image_id = context.view.source_prepared.image_id
        if engine.image_inspect(image_id) is None:
            packed = context.view.facts.get("image_packed")
            wish = context.view.request.image
            if wish == "refuse":
                raise RefusedError([_missing(context)])
            if wish == "pull":
                _pull(context)
            elif not isinstance(packed, ImagePacked):
                layers = load_spec(context).image_layers
                present = layers_present(layers, engine.image_layers())
                return {ENDS_STEP: True, "image_id": image_id, "layers": layers[:present]}
            else:
                _transfer(context, packed.archive)
        return {"warnings": _give_names(context)}

    def undo(self, context: Context) -> Outcome:
        """Remove the image that this migration brought, unless somebody uses it by now."""
        (context.directory / ARCHIVE).unlink(missing_ok=True)
        brought = _brought(context)
        if brought is None:
            return None
        engine = context.bench.engine
        users = [row.name for row in engine.containers() if row.image_id == brought.image_id]
        if users:
            context.log.info("the image stays, it is in use", image=brought.image_id, containers=users)
            return None
        for name in brought.names:
            if _id_of(engine.image_inspect(name)) == brought.image_id:
                engine.image_remove(name)
        if not engine.image_remove(brought.image_id):
            context.log.info("the image stays, it has other names or is built upon", image=brought.image_id)
        return None


def _missing(context: Context) -> str:
    prepared = context.view.source_prepared
    called = ", ".join(prepared.image_tags) or prepared.image_id
    return (
        f"the image {called} ({prepared.image_id}) is not on {context.host}, and the request forbids to bring it; "
        "load it there first, or ask for the migration without 'image: refuse'"
    )


def _transfer(context: Context, archive: FileRef) -> None:
    engine = context.bench.engine
    free_bytes = engine.disk_free().free_bytes
    if archive.size_bytes * SPACE_FACTOR > free_bytes:
        raise RefusedError(
            [
                f"{context.host} has {free_bytes} bytes free, loading the image needs about "
                f"{archive.size_bytes * SPACE_FACTOR}"
            ]
        )
    file = context.directory / ARCHIVE

    def tell(progress: Progress) -> None:
        context.progress({"phase": "image", "bytes": progress.bytes, "total_bytes": archive.size_bytes})

    context.bench.transport.fetch(
        peer_of_source(context), archive, file, cancelled=context.cancelled, limit_bytes=MAX_ARCHIVE_BYTES,
        on_progress=tell, bwlimit_kib=context.view.bwlimit_kib,
    )  # fmt: skip
    _note(context)
    engine.load_image(pieces_of(file, context.cancelled))
    file.unlink(missing_ok=True)
    _require(context, "the archive that the source packed was loaded, but")


def _pull(context: Context) -> None:
    spec = load_spec(context)
    _note(context)
    tried = []
    free = tuple(name for name in spec.image_tags if context.bench.engine.image_inspect(name) is None)
    for reference in (*spec.image_digests, *free):
        try:
            context.bench.engine.pull_image(reference)
        except TransientError:
            raise
        except CargoError as error:
            tried.append(str(error))
            continue
        if context.bench.engine.image_inspect(spec.image_id) is not None:
            return
        tried.append(f"{reference} is another image there")
        context.bench.engine.image_remove(reference)
    raise RefusedError(
        [f"the image {spec.image_id} could not be pulled: {'; '.join(tried) or 'it has no name in any registry'}"]
    )


def _require(context: Context, after: str) -> None:
    image_id = context.view.source_prepared.image_id
    if context.bench.engine.image_inspect(image_id) is None:
        raise PermanentError(
            f"{after} the image {image_id} is not there under this id: the two hosts' Docker may keep images in "
            "different kinds of store. Bring the image there first"
        )


def _note(context: Context) -> None:
    """Evidence, on disk before the act: the image was not here, and these names meant nothing here."""
    if _brought(context) is not None:
        return
    prepared = context.view.source_prepared
    names = tuple(name for name in prepared.image_tags if context.bench.engine.image_inspect(name) is None)
    place = _marker(context)
    draft = place.with_suffix(".part")
    draft.write_bytes(msgspec.json.encode(_Brought(prepared.image_id, names)))
    draft.replace(place)


def _give_names(context: Context) -> tuple[str, ...]:
    """Give a brought image its free names; warns of the others."""
    brought = _brought(context)
    if brought is None:
        return ()
    engine = context.bench.engine
    for name in brought.names:
        if engine.image_inspect(name) is None:
            engine.image_tag(brought.image_id, name)
    return tuple(
        f"the name {name} means another image on {context.host}, which keeps it"
        for name in context.view.source_prepared.image_tags
        if _id_of(engine.image_inspect(name)) != brought.image_id
    )


def _marker(context: Context) -> Path:
    return context.directory / BROUGHT


def _brought(context: Context) -> _Brought | None:
    try:
        return msgspec.json.decode(_marker(context).read_bytes(), type=_Brought)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise PermanentError(f"{_marker(context)} cannot be read: {error}; the image is left as it is") from error


def _id_of(image: dict[str, Any] | None) -> str:
    return str((image or {}).get("Id", ""))
