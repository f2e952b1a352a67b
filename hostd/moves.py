"""What of this host may be moved at all, as its own configuration declares, whoever asks.

The section ``[moves]`` names containers, volumes and binds by patterns, in two lists each: what may move, and what may not
although the first list has it. It holds for what leaves this host and for what comes to it, and is asked in ``prepare``, before
anything is stopped; a refusal names the pattern. A privileged container moves by its request's consent only, and never where the
host says so.

Must never be asked about less than what the container would get: on the target that is the request that is made of Docker, since
the specification is another host's word. Pure.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

PRIVILEGED = "privileged"
"""What a request's ``without`` calls it."""
SYSTEM_PLACES = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/proc",
    "/root/.ssh",
    "/run",
    "/sbin",
    "/sys",
    "/usr",
    "/var/lib/cargo",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/run",
)
"""Where no container's data lies, and where data of another host could become this host's programs or rights."""


class Place(NamedTuple):
    """A mount of the container, as a person named it."""

    kind: Literal["volume", "bind"]
    name: str
    real: str = ""
    """Of a bind: its path with this host's symlinks resolved; empty when nobody looked."""


@dataclass(frozen=True)
class Moves:
    """The section ``[moves]``. A pattern of a name is as in a shell (``*``, ``?``, ``[…]``), of a bind a directory with
    such patterns for its parts, and stands for all that is below it."""

    containers: tuple[str, ...] = ("*",)
    not_containers: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ("*",)
    not_volumes: tuple[str, ...] = ()
    binds: tuple[str, ...] = ("/",)
    not_binds: tuple[str, ...] = SYSTEM_PLACES
    privileged: Literal["ask", "never"] = "ask"


def refusals(moves: Moves, host: str, container: str, places: Iterable[Place]) -> list[str]:
    """Why ``host`` lets a container of this name with these mounts neither go nor come, in words."""
    found = list(_named(host, "container", container, moves.containers, moves.not_containers))
    for place in places:
        if place.kind == "volume":
            found += _named(host, "volume", place.name, moves.volumes, moves.not_volumes)
            continue
        for path in dict.fromkeys(filter(None, (place.name, place.real))):
            shown = path if path == place.name else f"{place.name}, which is {path} there,"
            if pattern := _covering(path, moves.not_binds):
                found.append(f"{host} does not let the bind {shown} be moved: its setting not_binds has {pattern}")
            elif not _covering(path, moves.binds):
                found.append(
                    f"{host} does not let the bind {shown} be moved: its setting binds has only {_listed(moves.binds)}"
                )
    return list(dict.fromkeys(found))


def privilege_refusal(moves: Moves, host: str, host_config: Mapping[str, Any], consented: bool) -> list[str]:
    """Why ``host`` lets a container with this ``HostConfig`` neither go nor come, as far as its privilege goes."""
    if not host_config.get("Privileged"):
        return []
    if moves.privileged == "never":
        return [f"{host} moves no privileged containers: its setting privileged is never"]
    if consented:
        return []
    return [
        "the container is privileged, so whoever controls it controls its host; to move it with that right put "
        f'"privileged": true into the request, to create it on the target without it "{PRIVILEGED}" into "without"'
    ]


def undeclared(host_config: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """What the specification, which another host wrote, asks of the target although its mounts do not name it.

    ``known`` are paths of binds and names of volumes. Without this, a specification could take any directory of the target,
    or another container's volumes and namespaces.
    """
    fine = {posixpath.normpath(name) for name in known if name}
    asked = [*_binds(host_config.get("Binds")), *_mounts(host_config.get("Mounts"))]
    found = [source or "a volume without a name" for source in asked if posixpath.normpath(source or ".") not in fine]
    found += [f"the volumes of {name}" for name in _texts(host_config.get("VolumesFrom"))]
    found += [
        f"{name} {mode}" for name in _MODES if (mode := str(host_config.get(name) or "")).startswith("container:")
    ]
    return [
        f"the specification asks the target for {what!r}, which is none of the container's mounts; it was not used"
        for what in dict.fromkeys(found)
    ]


_MODES = ("NetworkMode", "PidMode", "IpcMode")


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def _binds(value: Any) -> Iterator[str]:
    for bind in _texts(value):
        source, colon, _ = bind.partition(":")
        yield source if colon else ""


def _mounts(value: Any) -> Iterator[str]:
    for mount in value if isinstance(value, list | tuple) else ():
        if isinstance(mount, dict) and mount.get("Type") != "tmpfs":
            yield str(mount.get("Source") or "")


def _named(host: str, what: str, name: str, allowed: tuple[str, ...], denied: tuple[str, ...]) -> Iterator[str]:
    pattern = next((pattern for pattern in denied if fnmatchcase(name, pattern)), None)
    if pattern is not None:
        yield f"{host} does not let the {what} {name!r} be moved: its setting not_{what}s has {pattern}"
    elif not any(fnmatchcase(name, pattern) for pattern in allowed):
        yield f"{host} does not let the {what} {name!r} be moved: its setting {what}s has only {_listed(allowed)}"


def _covering(path: str, patterns: tuple[str, ...]) -> str:
    """The first of ``patterns`` that ``path`` is or lies below; empty when none is."""
    parts = _parts(path)
    for pattern in patterns:
        wanted = _parts(pattern)
        if len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted)):
            return pattern
    return ""


def _parts(path: str) -> list[str]:
    return [part for part in posixpath.normpath("/" + path.lstrip("/")).split("/") if part]


def _listed(patterns: tuple[str, ...]) -> str:
    return ", ".join(patterns) or "nothing"
