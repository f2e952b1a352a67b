"""Whether a container is the same as before its move: ``docker inspect`` compared field by field.

Whatever may differ stands in ``MAY_DIFFER``, with the reason; every other difference counts, in fields of today and of
tomorrow. The comparison is the tests' own and asks nothing of the product.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

SHORT_ID = 12
GATED_RUNTIME = "cargo"
"""runc behind a gate, for a warm start; it counts as runc."""
MAY_DIFFER = {
    "Id": "made anew by each engine",
    "Created": "when that was",
    "State": "process id, times of start and end",
    "RestartCount": "counted by each engine for its own container",
    "ResolvConfPath": "holds the id",
    "HostnamePath": "holds the id",
    "HostsPath": "holds the id",
    "LogPath": "holds the id",
    "GraphDriver": "where the engine keeps the writable layer",
    "Storage": "where the engine keeps the writable layer",
    "NetworkSettings.SandboxID": "made anew at each start",
    "NetworkSettings.SandboxKey": "made anew at each start",
    "NetworkSettings.EndpointID": "made anew at each start",
    "NetworkSettings.IPAddress": "given by each host's default bridge, in the order of starts",
    "NetworkSettings.GlobalIPv6Address": "given by each host's default bridge, in the order of starts",
    "NetworkSettings.MacAddress": "made from that address, unless it was fixed",
    "NetworkSettings.Networks.*.EndpointID": "made anew at each start",
    "NetworkSettings.Networks.*.NetworkID": "made by each engine",
    "NetworkSettings.Networks.*.IPAddress": "given by the network, unless it was fixed",
    "NetworkSettings.Networks.*.GlobalIPv6Address": "given by the network, unless it was fixed",
    "NetworkSettings.Networks.*.MacAddress": "made from that address, unless it was fixed",
    "NetworkSettings.Networks.*.DNSNames": "hold the short id",
    "Config.Labels.cargo.migration": "says which migration brought it",
    "Config.Labels.cargo.source": "says from where",
}
"""Field, ``*`` for any name: why it may differ."""


def described(inspected: Mapping[str, Any], *, fixed_addresses: bool = False) -> dict[str, Any]:
    """``inspected`` without what may differ, and in one order where Docker has none."""
    raw = copy.deepcopy(dict(inspected))
    own_id = str(raw["Id"])
    for field in MAY_DIFFER:
        if fixed_addresses and field.rpartition(".")[2] in ("IPAddress", "GlobalIPv6Address", "MacAddress"):
            continue
        head, _, label = field.partition("Config.Labels.")
        _forget(raw, ["Config", "Labels", label] if label and not head else field.split("."))
    if raw["Config"].get("Hostname") == own_id[:SHORT_ID]:
        raw["Config"]["Hostname"] = "(its short id)"
    for endpoint in raw["NetworkSettings"]["Networks"].values():
        # The engine adds the short id to the aliases in a network of a person's own.
        endpoint["Aliases"] = sorted(set(endpoint.get("Aliases") or ()) - {own_id[:SHORT_ID]}) or None
    if raw["HostConfig"].get("Runtime") == GATED_RUNTIME:
        raw["HostConfig"]["Runtime"] = "runc"
    policy = raw["HostConfig"]["RestartPolicy"]
    policy["Name"] = policy["Name"] or "no"  # one and the same; it becomes "no" when somebody sets it
    raw["Mounts"] = sorted(raw["Mounts"], key=lambda mount: str(mount["Destination"]))
    return raw


def _forget(raw: Any, way: list[str]) -> None:
    if not isinstance(raw, dict):
        return
    first, *rest = way
    names = list(raw) if first == "*" else [first]
    for name in names:
        if rest:
            _forget(raw.get(name), rest)
        else:
            raw.pop(name, None)


def changed(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """Every field in which two descriptions differ, in words; None and nothing are the same."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            yield from changed(before.get(name), after.get(name), f"{at}.{name}" if at else name)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from changed(one, other, f"{at}[{number}]")
    elif (before or None) != (after or None):
        yield f"{at}: {before!r} became {after!r}"


def differences(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    apart_from: Mapping[str, str] | None = None,
    fixed_addresses: bool = False,
) -> list[str]:
    """What is not the same, in words. ``apart_from`` are further fields that may differ, each with its reason."""
    found = changed(
        described(before, fixed_addresses=fixed_addresses), described(after, fixed_addresses=fixed_addresses)
    )
    return [words for words in found if words.partition(": ")[0] not in (apart_from or {})]
