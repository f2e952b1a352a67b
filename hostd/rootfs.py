"""Where a container's writable layer lies on this host: the adapter for the engine's store of layers.

An engine keeps a container's root as an overlay of the image's layers and one *upper* directory. That directory is the
one thing of an engine's store that is ever looked into here, and it is found by what the engine itself says of the
container, never by guessing at its files (F11). It is changed only while nothing has it mounted: the container was
created and never started, or has stopped.

One function for each kind of store: Docker's own ``overlay2`` names the upper directory in ``inspect``; containerd's is
asked for the mounts of the container's snapshot (``ctr snapshots mounts``, which mounts nothing). With any other kind the
layer is not found, and the source refuses to leave it behind in silence.

Flow: ``hostd/effects/measure_mounts.py`` finds the source's, ``hostd/effects/open_layer.py`` the target's.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from events.errors import PermanentError, TransientError
from hostd import mounts
from hostd.engine_calls import EngineInfo

STAGES = "cargo"
"""Directory in the store's root for layers on their way: on the file system of the layers, and in the same mount."""


CONTAINERD_SOCKETS = (Path("/run/docker/containerd/containerd.sock"), Path("/run/containerd/containerd.sock"))
"""Of the containerd that Docker runs itself, and of one that the host runs for it."""
CTR_TIMEOUT_SECONDS = 20
SNAPSHOT_DEPTH = 3
"""``parents[3]`` of a snapshot's directory is containerd's root."""
CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


class UnknownStoreError(PermanentError):
    """The engine keeps its layers in a way that is not known here."""


def upper_directory(inspected: Mapping[str, Any], info: EngineInfo) -> Path:
    """The writable layer of the container that ``inspected`` describes. Raises UnknownStoreError, PermanentError."""
    driver = inspected.get("GraphDriver") or {}
    if driver.get("Name") == "overlay2":
        return _checked(_overlay2(driver, info), Path(info.data_root))
    if info.containerd_snapshotter and info.storage_driver in ("overlayfs", ""):
        upper = _containerd(str(inspected.get("Id") or ""))
        return _checked(upper, upper.parents[SNAPSHOT_DEPTH])
    store = "containerd's image store" if info.containerd_snapshotter else f"the storage driver {info.storage_driver!r}"
    raise UnknownStoreError(f"with {store} it is not known where a container's writable layer lies")


def _overlay2(driver: Mapping[str, Any], info: EngineInfo) -> Path:
    """Docker's own store: ``<data root>/overlay2/<id>/diff``, as ``inspect`` says."""
    upper = Path(str((driver.get("Data") or {}).get("UpperDir") or ""))
    if upper.name != "diff" or upper.parent.parent != Path(info.data_root) / "overlay2":
        raise PermanentError(
            f"Docker says that the container's writable layer is {str(upper)[:200]!r}, which cannot be"
        )
    return upper


def _containerd(container_id: str) -> Path:
    """containerd's store: ``<root>/io.containerd.snapshotter.v1.overlayfs/snapshots/<n>/fs``."""
    if not CONTAINER_ID.fullmatch(container_id):
        raise PermanentError(f"{container_id[:80]!r} is no container's id")
    words = "its socket is not where Docker has it"
    for socket in CONTAINERD_SOCKETS:
        if not socket.exists():
            continue
        line = ["ctr", "--address", str(socket), "--namespace", "moby", "snapshots", "--snapshotter", "overlayfs"]
        try:
            done = subprocess.run(
                [*line, "mounts", "/nowhere", container_id], stdin=subprocess.DEVNULL, capture_output=True,
                timeout=CTR_TIMEOUT_SECONDS, check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            words = str(error)[:300]
            continue
        for option in done.stdout.decode("utf-8", "surrogateescape").strip().rpartition(" ")[2].split(","):
            name, _, value = option.partition("=")
            upper = Path(value)
            if name != "upperdir" or not upper.is_absolute() or len(upper.parts) <= SNAPSHOT_DEPTH + 2:
                continue
            if upper.name == "fs" and upper.parents[1].name == "snapshots":
                return upper
        words = "its answer names no writable layer"
    raise UnknownStoreError(f"containerd does not say where the container's writable layer lies: {words}")


def _checked(upper: Path, root: Path) -> Path:
    """``upper``, if it is a directory below ``root`` without a symlink on the way."""
    if ".." in upper.parts or root not in upper.parents:
        raise PermanentError(f"the container's writable layer {str(upper)[:200]!r} is not in Docker's {root}")
    try:
        found = upper.lstat()
    except OSError as error:
        raise PermanentError(
            f"the container's writable layer {upper} cannot be looked at: {error.strerror}. The agent must see "
            "Docker's data root under the same path as Docker does."
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise PermanentError(f"the container's writable layer {upper} is not a directory")
    if Path(os.path.realpath(upper)) != Path(os.path.realpath(root)) / upper.relative_to(root):
        raise PermanentError(f"a symlink leads to the container's writable layer {upper}; it was not touched")
    return upper


_LAYER_OF_ITS_OWN = re.compile(rb"[0-9a-f]{64}/diff")


def require_unused(upper: Path) -> None:
    """Raise TransientError while an overlay is mounted with this upper directory: then it is the kernel's."""
    if points := _mounted_at(upper):
        raise TransientError(
            f"the writable layer {upper} is still mounted at {os.fsdecode(points[0])}; stop the container "
            "first. Nothing was changed."
        )


def unmount_left(upper: Path) -> None:
    """Unmount the root file system of a container that does not run, and whose gate is shut.

    A Docker that was killed while it waited for a start has forgotten that it mounted it. Raises TransientError while
    anything uses it.
    """
    for point in _mounted_at(upper, surely=True):
        mounts.unmount(point)


def _mounted_at(upper: Path, *, surely: bool = False) -> list[bytes]:
    """Where overlays are mounted with this upper directory; ``surely``: and not with another one whose name ends alike."""
    wanted, points = os.fsencode(upper), []
    for record in mounts.read_mountinfo():
        if record.kind != "overlay":
            continue
        for option in record.options.split(b","):
            name, _, value = option.partition(b"=")
            # Docker shortens long option strings by relative paths: ``<id>/diff``.
            shortened = b"/" in value and wanted.endswith(b"/" + value)
            shortened = shortened and (not surely or _LAYER_OF_ITS_OWN.fullmatch(value) is not None)
            if name == b"upperdir" and (value == wanted or shortened):
                points.append(record.point)
    return points


def layer_stage(upper: Path, name: str) -> Path:
    """The directory for the layer ``name`` on its way to or from ``upper``; it may not exist."""
    root = upper.parents[2] if upper.name == "diff" else upper.parents[SNAPSHOT_DEPTH]
    return root / STAGES / name


def remove_empty_stages(stage: Path) -> None:
    """After the layer's ``stage`` has gone: its parent too, when no other layer is on its way."""
    if stage.parent.name != STAGES:
        return
    try:
        stage.parent.rmdir()
    except OSError:
        return
