"""The container's very image must be on this host before anything stops.

A missing one is asked for (``image_wanted``); when the source has packed what is missing of it, it is fetched by
SSH and loaded. Nothing goes to a registry unless the request says so. The image may have another id here than on the
source, if the two keep images in different kinds of store: see hostd/image_identity.py and hostd/image_archive.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from events.errors import CargoError, PermanentError, RefusedError, TransientError
from events.schema import FileRef, ImagePacked, ImageWanted
from hostd.effects.arrival import peer_of_source
from hostd.effects.base import Context, Effect, Outcome
from hostd.effects.fetch_spec import load_spec
from hostd.engine_images import layers_of
from hostd.image_archive import complete, held_in, layers_present, pieces_of
from hostd.image_identity import is_same
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
    """On the source."""
    names: tuple[str, ...]
    """Tags that meant nothing here, and digests by which it may have been pulled."""
    identity: dict[str, Any] = {}


class ProvideImage(Effect):
    """Looks for the very image, by what it contains; brings it, with those of its names that are free."""

    name: ClassVar[str] = "provide_image"

    def run(self, context: Context) -> Outcome:
        if _find(context) is None:
            packed = context.view.facts.get("image_packed")
            wish = context.view.request.image
            if wish == "refuse":
                raise RefusedError([_missing(context)])
            if wish == "pull":
                _pull(context)
            elif not isinstance(packed, ImagePacked):
                return {ENDS_STEP: True, **_wanted(context)}
            else:
                _transfer(context, packed.archive)
        return {"warnings": _give_names(context)}

    def undo(self, context: Context) -> Outcome:
        """Remove the image that this migration brought, unless somebody uses it by now."""
        (context.directory / ARCHIVE).unlink(missing_ok=True)
        brought = _brought(context)
        engine = context.bench.engine
        image = None if brought is None else engine.image_of(brought.image_id, brought.identity, brought.names)
        if brought is None or image is None:
            return None
        image_id = str(image["Id"])
        users = [row.name for row in engine.containers() if row.image_id == image_id]
        if users:
            context.log.info("the image stays, it is in use", image=image_id, containers=users)
            return None
        for name in brought.names:
            if _id_of(engine.image_inspect(name)) == image_id:
                engine.image_remove(name)
        if not engine.image_remove(image_id):
            context.log.info("the image stays, it has other names or is built upon", image=image_id)
        return None


def _find(context: Context) -> dict[str, Any] | None:
    spec = load_spec(context)
    names = (*spec.image_digests, *spec.image_tags)
    return context.bench.engine.image_of(context.view.source_prepared.image_id, spec.image_identity, names)


def _wanted(context: Context) -> dict[str, Any]:
    """What of the image need not travel, because another image here has it."""
    layers = load_spec(context).image_layers
    present, other = _most_alike(context, layers)
    asked = {"image_id": context.view.source_prepared.image_id, "layers": layers[:present]}
    if not context.bench.engine.info().containerd_snapshotter:
        return asked
    # This store keeps the archive's parts: what is left out must be put back, so it must be here to be packed.
    if other is not None:
        held = held_in(context.bench.engine.save_image([other]), context.cancelled)
        while present and layers[present - 1] not in held.plain:
            present -= 1
        return {**asked, "layers": layers[:present], "blobs": tuple(sorted(held.stored - held.plain))}
    return {**asked, "blobs": ()}


def _most_alike(context: Context, layers: tuple[str, ...]) -> tuple[int, str | None]:
    """How many of the lowest layers an image here has at most, and the id of that image."""
    found: tuple[int, str | None] = (0, None)
    for image in context.bench.engine.images():
        present = layers_present(layers, layers_of(image))
        if present > found[0]:
            found = present, str(image["Id"])
    return found


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
    wanted = context.view.facts["image_wanted"]
    assert isinstance(wanted, ImageWanted)
    if wanted.blobs is not None and wanted.layers:
        layers = load_spec(context).image_layers
        _, other = _most_alike(context, layers)
        complete(file, layers, () if other is None else engine.save_image([other]), context.cancelled)
    engine.load_image(pieces_of(file, context.cancelled))
    file.unlink(missing_ok=True)
    if _find(context) is None:
        raise PermanentError(
            f"the archive that the source packed was loaded, but the image {context.view.source_prepared.image_id} is "
            "not there: it may have been removed at once. The container was not touched; bring the image there first"
        )


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
        if _find(context) is not None:
            return
        tried.append(f"{reference} is another image there")
        context.bench.engine.image_remove(reference)
    raise RefusedError(
        [f"the image {spec.image_id} could not be pulled: {'; '.join(tried) or 'it has no name in any registry'}"]
    )


def _note(context: Context) -> None:
    """Evidence, on disk before the act: the image was not here, and these names meant nothing here."""
    if _brought(context) is not None:
        return
    prepared = context.view.source_prepared
    spec = load_spec(context)
    names = tuple(
        name for name in (*prepared.image_tags, *spec.image_digests) if context.bench.engine.image_inspect(name) is None
    )
    place = _marker(context)
    draft = place.with_suffix(".part")
    draft.write_bytes(msgspec.json.encode(_Brought(prepared.image_id, names, spec.image_identity)))
    draft.replace(place)


def _give_names(context: Context) -> tuple[str, ...]:
    """Give a brought image its free names; warns of the others, and of digests that this host does not know."""
    brought, image = _brought(context), _find(context)
    if brought is None or image is None:
        return ()
    engine = context.bench.engine
    for name in brought.names:
        if "@" not in name and engine.image_inspect(name) is None:
            engine.image_tag(str(image["Id"]), name)
    taken = [
        f"the name {name} means another image on {context.host}, which keeps it"
        for name in context.view.source_prepared.image_tags
        if not _means(engine.image_inspect(name), brought)
    ]
    lost = [
        f"the image is not known as {digest} on {context.host}: the archive that it came in holds no digests of "
        "registries; pull it there if something asks for it by that name"
        for digest in load_spec(context).image_digests
        if not _means(engine.image_inspect(digest), brought)
    ]
    return (*taken, *lost)


def _means(image: Mapping[str, Any] | None, brought: _Brought) -> bool:
    return image is not None and is_same(image, brought.image_id, brought.identity)


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
