"""User-defined networks: what travels of their definition, and whether the target can have them.

A bridge network lives on one host, so the container's networks are looked for on the target by name, and created
there when they are missing. What must not happen: that a network of another kind is taken for the container's, that
a new one covers addresses in use there, or that a fixed address is found to be taken only at the start.

A subnet that Docker picked from its own pool means nothing to anybody, so it is not asked for again; the target's
Docker picks one. Pure: no I/O, no clock.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from hostd.docker_json import View, view

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

BUILT_IN_NETWORKS = ("default", "bridge", "host", "none", "")
OUR_LABELS = ("cargo.migration", "cargo.source")
"""They say which migration made a network, so they do not travel to the next host."""
_DOCKERS_POOLS = (
    (ipaddress.IPv4Network("172.16.0.0/12"), 16),
    (ipaddress.IPv4Network("192.168.0.0/16"), 20),
)
"""Where Docker takes a subnet from when nobody names one, and how large those are:
https://github.com/moby/moby/blob/v20.10.24/libnetwork/ipamutils/utils.go"""


class IpamRangeView(View, frozen=True, kw_only=True):
    """One entry of ``IPAM.Config``."""

    subnet: str | None = None
    ip_range: str | None = msgspec.field(name="IPRange", default=None)
    gateway: str | None = None
    auxiliary_addresses: dict[str, str] | None = None


class IpamView(View, frozen=True, kw_only=True):
    """``IPAM`` of a network."""

    driver: str | None = None
    options: dict[str, str] | None = None
    config: tuple[IpamRangeView, ...] | None = None


class NetworkView(View, frozen=True, kw_only=True):
    """``docker network inspect``, and what travels of it."""

    driver: str = ""
    enable_ipv6: bool | None = msgspec.field(name="EnableIPv6", default=False)
    internal: bool | None = False
    attachable: bool | None = False
    config_only: bool | None = False
    ipam: IpamView | None = msgspec.field(name="IPAM", default=None)
    options: dict[str, str] | None = None
    labels: dict[str, str] | None = None


def definition(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What ``docker network create`` needs to make the network ``raw`` again. Raises PermanentError."""
    seen = view(NetworkView, raw, "a network")
    labels = {key: value for key, value in (seen.labels or {}).items() if key not in OUR_LABELS}
    built: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(seen, labels=labels))
    return built


def create_body(
    name: str, wanted: Mapping[str, Any], endpoint: Mapping[str, Any] | None, labels: Mapping[str, str]
) -> dict[str, Any]:
    """The body of ``POST /networks/create`` for the network ``name``; ``endpoint`` is the container's on it.

    Raises PermanentError when ``wanted``, which another host wrote, is no definition of a network.
    """
    seen = view(NetworkView, wanted, f"the network {name!r}")
    ipam = seen.ipam or IpamView()
    ranges = _asked_ranges(seen, endpoint)
    return {
        "Name": name,
        "CheckDuplicate": True,
        "Driver": "bridge",
        "EnableIPv6": bool(seen.enable_ipv6),
        "Internal": bool(seen.internal),
        "Attachable": bool(seen.attachable),
        "IPAM": {"Driver": ipam.driver or "default", "Options": ipam.options, "Config": ranges},
        "Options": seen.options or {},
        "Labels": {**(seen.labels or {}), **labels},
    }


def network_names(networks: Iterable[str], network_mode: str) -> list[str]:
    """The user-defined networks among a container's endpoints and the one that it starts in."""
    return sorted({name for name in (network_mode, *networks) if name not in BUILT_IN_NETWORKS})


def existing_problems(
    name: str, wanted: Mapping[str, Any] | None, endpoint: Mapping[str, Any] | None, found: Mapping[str, Any]
) -> Iterator[str]:
    """Why the target's network ``found`` cannot take the place of the source's ``wanted``."""
    theirs = view(NetworkView, found, f"the network {name!r}").driver
    ours = view(NetworkView, wanted, f"the network {name!r}").driver if wanted is not None else theirs
    if ours != theirs:
        yield f"the target's network {name!r} is of the driver {theirs!r}, the source's of {ours!r}"
    taken = _taken(found)
    for address in fixed_addresses(endpoint):
        if not any(address in subnet for subnet in subnets(found)):
            yield f"the container's fixed address {address} is outside of the target's network {name!r}"
        elif address in taken:
            yield (
                f"the container's fixed address {address} is in use in the target's network {name!r}, "
                f"by the container {taken[address]!r}"
            )


def creation_problems(
    name: str,
    wanted: Mapping[str, Any] | None,
    endpoint: Mapping[str, Any] | None,
    networks: Mapping[str, Mapping[str, Any]],
    host_addresses: Sequence[str] = (),
) -> Iterator[str]:
    """Why the network ``name``, which the target lacks, could not be created there.

    ``networks`` are those that it has, ``host_addresses`` what it must go on reaching outside of containers.
    """
    if wanted is None:
        yield f"the network {name!r} does not exist on the target; create it with 'docker network create'"
        return
    seen = view(NetworkView, wanted, f"the network {name!r}")
    if seen.driver != "bridge" or seen.config_only:
        yield (
            f"the network {name!r} does not exist on the target and is of the driver {seen.driver!r}; only bridge "
            "networks are created by a migration, so create it there first"
        )
        return
    if seen.ipam is not None and seen.ipam.driver not in (None, "", "default"):
        yield f"the network {name!r} takes its addresses from the driver {seen.ipam.driver!r}; create it there first"
    for asked in _parsed(entry.get("Subnet") for entry in _asked_ranges(seen, endpoint)):
        for other, raw in sorted(networks.items()):
            for subnet in subnets(raw):
                if asked.version == subnet.version and asked.overlaps(subnet):
                    yield (
                        f"the network {name!r} cannot be created on the target: its subnet {asked} overlaps {subnet} "
                        f"of the network {other!r} there"
                    )
        for address in _addresses(host_addresses):
            if address in asked:
                yield (
                    f"the network {name!r} cannot be created on the target: its subnet {asked} holds {address}, "
                    "by which the hosts reach each other"
                )


def differing_subnets(name: str, wanted: Mapping[str, Any] | None, found: Mapping[str, Any]) -> list[str]:
    """What a person should know when the target's network of that name has other addresses."""
    if wanted is None or set(subnets(wanted)) == set(subnets(found)):
        return []
    here = ", ".join(map(str, subnets(found))) or "none"
    there = ", ".join(map(str, subnets(wanted))) or "none"
    return [f"the target's network {name!r} has the subnet {here}, the source's had {there}; it was not changed"]


def fixed_addresses(endpoint: Mapping[str, Any] | None) -> Iterator[IpAddress]:
    """The addresses that a person fixed for ``endpoint``; what is no address is left to Docker to refuse."""
    config = (endpoint or {}).get("IPAMConfig")
    for key in ("IPv4Address", "IPv6Address"):
        value = config.get(key) if isinstance(config, dict) else None
        if value:
            with contextlib.suppress(ValueError):
                yield ipaddress.ip_address(value)


def subnets(network: Mapping[str, Any]) -> list[IpNetwork]:
    """The subnets of a network as inspected, as far as they can be read."""
    ipam = network.get("IPAM")
    configs = ipam.get("Config") if isinstance(ipam, dict) else None
    return list(
        _parsed(config.get("Subnet") for config in configs if isinstance(config, dict))
        if isinstance(configs, list | tuple)
        else ()
    )


def _asked_ranges(seen: NetworkView, endpoint: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """``IPAM.Config`` without what Docker had picked by itself and nobody depends on."""
    fixed = any(True for _ in fixed_addresses(endpoint))
    ranges = (seen.ipam.config if seen.ipam is not None else None) or ()
    found: list[dict[str, Any]] = []
    for entry in ranges:
        if not fixed and _picked_by_docker(entry):
            continue
        asked = {
            "Subnet": entry.subnet,
            "IPRange": entry.ip_range,
            "Gateway": entry.gateway,
            "AuxiliaryAddresses": entry.auxiliary_addresses,
        }
        found.append({key: value for key, value in asked.items() if value})
    return found


def _picked_by_docker(entry: IpamRangeView) -> bool:
    """Docker shows a gateway for a subnet of its own choice, and names neither range nor reserved addresses."""
    if entry.ip_range or entry.auxiliary_addresses or not entry.gateway:
        return False
    for subnet in _parsed((entry.subnet,)):
        if isinstance(subnet, ipaddress.IPv4Network) and entry.gateway == str(subnet.network_address + 1):
            return any(subnet.prefixlen == length and subnet.subnet_of(pool) for pool, length in _DOCKERS_POOLS)
    return False


def _taken(found: Mapping[str, Any]) -> dict[IpAddress, str]:
    """Addresses in use, by the name of the running container; only a single network's description has them."""
    containers = found.get("Containers")
    taken: dict[IpAddress, str] = {}
    for row in containers.values() if isinstance(containers, dict) else ():
        for key in ("IPv4Address", "IPv6Address"):
            value = row.get(key) if isinstance(row, dict) else None
            for address in _addresses((str(value or "").partition("/")[0],)):
                taken[address] = str(row.get("Name", ""))
    return taken


def _parsed(texts: Iterable[Any]) -> Iterator[IpNetwork]:
    for text in texts:
        with contextlib.suppress(ValueError, TypeError):
            yield ipaddress.ip_network(text, strict=False)


def _addresses(texts: Iterable[str]) -> Iterator[IpAddress]:
    for text in texts:
        with contextlib.suppress(ValueError):
            yield ipaddress.ip_address(text)
