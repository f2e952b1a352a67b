"""Is that the same image? Its id alone does not say: Docker's own store calls an image by the digest of its
configuration, containerd's store by the digest of its manifest (or index), and a manifest changes with the way its layers are
packed. So beside the id stands what both stores tell alike: the layers by their contents, and the configuration.

Two images with the same layers, platform, configuration, author and moment of creation are the same for every container.
Must never call images the same that only share a name. Pure: no I/O. Made on the source by hostd/spec.py, compared on the
target by hostd/engine_images.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONFIG_FIELDS = (
    "ArgsEscaped",
    "Cmd",
    "Entrypoint",
    "Env",
    "ExposedPorts",
    "Healthcheck",
    "Labels",
    "OnBuild",
    "Shell",
    "StopSignal",
    "User",
    "Volumes",
    "WorkingDir",
)
"""What an image's configuration can say to a container. Docker's own store also shows leftovers of the container that the
image was committed from (``Hostname``, ``AttachStdout``, …), which no container inherits; containerd's does not."""
NO_TIME = ("", "0001-01-01T00:00:00Z")


def identity_of(image: Mapping[str, Any]) -> dict[str, Any]:
    """What of an inspected image is the same in every store; the values are Docker's JSON."""
    config, root = image.get("Config"), image.get("RootFS")
    said = config if isinstance(config, dict) else {}
    created = image.get("Created") or ""
    layers = root.get("Layers") if isinstance(root, dict) else None
    return {
        "architecture": image.get("Architecture") or "",
        "variant": image.get("Variant") or "",
        "os": image.get("Os") or "",
        "author": image.get("Author") or "",
        "created": "" if created in NO_TIME else created,
        "layers": list(layers) if isinstance(layers, list | tuple) else [],
        "config": {name: said[name] for name in CONFIG_FIELDS if said.get(name)},  # unset, null and empty are one
    }


def is_same(image: Mapping[str, Any], image_id: str, identity: Mapping[str, Any]) -> bool:
    """Whether the inspected ``image`` is the one with this id, or, in another kind of store, this identity.

    An empty ``identity`` (a specification of before there was one) leaves the id alone to decide.
    """
    return image.get("Id") == image_id or (bool(identity) and identity_of(image) == identity)
