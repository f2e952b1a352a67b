"""The adapter's part for images as objects: what is here, by what names. See hostd/engine.py for the rules.

Packing and loading are streams and stand in hostd/engine.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from events.errors import PermanentError
from hostd.engine_calls import Calls, MissingError, NameTakenError
from hostd.image_identity import is_same


class ImageCalls(Calls):
    """Images of one engine."""

    def images(self) -> Iterator[dict[str, Any]]:
        """The descriptions of all images, intermediate ones included."""
        what = "listing images"
        for row in self._json_list("GET", "/images/json", query={"all": "1"}, what=what):
            with contextlib.suppress(MissingError):  # removed meanwhile
                yield self._json("GET", "/images/{0}/json", str(row.get("Id")), what=what)

    def image_inspect(self, reference: str) -> dict[str, Any] | None:
        """The description of the image with this id, tag or digest, or None."""
        try:
            return self._json("GET", "/images/{0}/json", reference, what=f"looking for the image {reference!r}")
        except MissingError:
            return None

    def image_of(self, image_id: str, identity: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, Any] | None:
        """The description of the image with this id, or else of the one with this identity (hostd/image_identity.py),
        which a store of the other kind calls by another id; None when it is not here.

        ``names`` are tried first: containerd's store does not list an image of which it has not all parts, such as one
        that was pulled while some of its layers were here.
        """
        found = self.image_inspect(image_id)
        if found is not None or not identity:
            return found
        named = (self.image_inspect(name) for name in names)
        known = (image for image in named if image is not None)
        return next((image for image in (*known, *self.images()) if is_same(image, image_id, identity)), None)

    def image_tag(self, image_id: str, reference: str) -> None:
        """Give the image one more name. An image that had the name loses it."""
        repository, tag = split_reference(reference)
        self._call(
            "POST", "/images/{0}/tag", image_id, query={"repo": repository, "tag": tag},
            what=f"calling the image {image_id} {reference!r}",
        )  # fmt: skip

    def image_remove(self, reference: str) -> bool:
        """Remove a name, and with its last name the image; or the image itself, by id. Absent is fine.

        Never forced: says False when the image is in use, has other names, or others are built on it.
        """
        try:
            self._call(
                "DELETE", "/images/{0}", reference, query={"force": "0", "noprune": "1"},
                what=f"removing the image {reference!r}",
            )  # fmt: skip
        except MissingError:
            return True
        except NameTakenError:
            return False
        return True


def layers_of(image: dict[str, Any]) -> tuple[str, ...]:
    """The diff ids of an inspected image, lowest first."""
    layers = (image.get("RootFS") or {}).get("Layers") or ()
    return tuple(str(layer) for layer in layers)


def split_reference(reference: str) -> tuple[str, str]:
    """Repository and tag of ``registry:5000/team/web:1``. Raises PermanentError for a name without a tag."""
    repository, colon, tag = reference.rpartition(":")
    if not colon or not repository or "/" in tag or "@" in reference:
        raise PermanentError(f"{reference[:200]!r} is no name of an image with a tag")
    return repository, tag
