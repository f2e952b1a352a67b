"""The lab's network: a hub with a bridge, one cable to each host, one cable to the machine.

The bridge lives in a network namespace of its own (held by a sleeping process), not in the machine's: so
neither the machine's firewall nor its forwarding settings matter or change, and all that the machine gets is
one interface with the lab's gateway address. Namespaces are held by processes alone, never by mounts, so they
end with them.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import CommandFailedError, LabError
from labkit.process import MARK, clean_environment, launch, live_pid, write_record
from labkit.spec import LabSpec

BRIDGE = "br0"
ETCD_PORTS = "2379-2479"
OUTSIDE = "outside"
"""Partition target: everything between a host and the machine's own namespace."""


def command(argv: Sequence[str], *, given: str | None = None) -> str:
    """Run a tool; returns what it printed. Raises CommandFailedError."""
    done = subprocess.run(argv, input=given, capture_output=True, text=True, check=False, env=clean_environment())
    if done.returncode != 0:
        raise CommandFailedError(list(argv), done.returncode, done.stdout, done.stderr)
    return done.stdout


def ip_batch(lines: Iterable[str], *, inside: int | None = None) -> None:
    """Run ``ip`` commands in one go, in the network namespace of process ``inside`` if given."""
    enter = [] if inside is None else ["nsenter", "-t", str(inside), "-n"]
    command([*enter, "ip", "-batch", "-"], given="\n".join(lines) + "\n")


def interface_exists(name: str) -> bool:
    """Whether the machine's own namespace has an interface of that name."""
    return Path(f"/sys/class/net/{name}").exists()


def remove_interface(name: str) -> None:
    """Delete an interface of the machine's namespace, if it is there. Its other end goes with it."""
    if interface_exists(name):
        try:
            ip_batch([f"link del {name}"])
        except CommandFailedError:  # it may have gone by itself meanwhile, with the namespace of its other end
            if interface_exists(name):
                raise


def routes_in_the_way(spec: LabSpec) -> list[str]:
    """The machine's own networks that overlap the lab's subnet, in words."""
    wanted = ipaddress.ip_network(f"{spec.subnet}.0/24")
    found = []
    for route in json.loads(command(["ip", "-json", "-4", "route", "show"]) or "[]"):
        target = route.get("dst", "default")
        if target == "default" or route.get("dev") == spec.prefix:
            continue
        if ipaddress.ip_network(target, strict=False).overlaps(wanted):
            found.append(f"{target} on {route.get('dev')}")
    return found


def hardware_address(address: str) -> str:
    """A locally administered one, made from the IPv4 address so that it outlasts a reboot of the host."""
    return "02:ca:" + ":".join(f"{int(part):02x}" for part in address.split("."))


class Hub:
    """The bridge and its cables."""

    def __init__(self, spec: LabSpec) -> None:
        self._spec = spec
        self._record = spec.records / "hub.json"

    @property
    def pid(self) -> int | None:
        """Of the process that holds the hub's namespace."""
        return live_pid(self._record)

    def start(self) -> None:
        """Make bridge and gateway address, unless they are there."""
        spec = self._spec
        if self.pid is not None and interface_exists(spec.prefix):
            return
        pid = self.pid or launch(
            {
                "kind": "boot",
                "namespaces": ["net"],
                "argv": ["sleep", "infinity"],
                "env": clean_environment() | {MARK: str(spec.root)},
                "log": str(spec.logs / "hub.log"),
            }
        )
        write_record(self._record, pid)
        remove_interface(spec.prefix)
        ip_batch(
            [
                f"link add {spec.prefix} type veth peer name root netns {pid}",
                f"addr add {spec.gateway}/24 dev {spec.prefix}",
                f"link set {spec.prefix} up",
            ]
        )
        ip_batch(
            [
                "link set lo up",
                f"link add {BRIDGE} type bridge forward_delay 0",
                f"link set {BRIDGE} up",
                f"link set root master {BRIDGE}",
                "link set root up",
            ],
            inside=pid,
        )

    def plug(self, host: str, address: str, host_pid: int) -> None:
        """Run a cable to the namespace of ``host_pid`` and give that end its address."""
        hub = self.pid
        if hub is None:
            raise LabError("the lab's network is down; run `up`")
        self.unplug(host)
        ip_batch([f"link add {host} netns {hub} type veth peer name eth0 netns {host_pid}"])
        ip_batch([f"link set {host} master {BRIDGE}", f"link set {host} up"], inside=hub)
        ip_batch(
            [
                "link set lo up",
                f"link set eth0 address {hardware_address(address)}",
                f"addr add {address}/24 dev eth0",
                "link set eth0 up",
                f"route add default via {self._spec.gateway}",
            ],
            inside=host_pid,
        )

    def unplug(self, host: str) -> None:
        """Take the cable away at once: nothing that dies later is heard of."""
        if self.is_plugged(host):
            ip_batch([f"link del {host}"], inside=self.pid)

    def is_plugged(self, host: str) -> bool:
        """Whether that host's cable is there."""
        hub = self.pid
        if hub is None:
            return False
        links = json.loads(command(["nsenter", "-t", str(hub), "-n", "ip", "-json", "link", "show"]))
        return any(link["ifname"] == host for link in links)


@dataclass(frozen=True)
class Cut:
    """One partition, seen from the host that drops the packets."""

    peer: str
    """Name of a host, ``etcd`` or ``outside``."""
    one_way: bool = False
    """Only what leaves is dropped; what comes in still arrives."""


def cut_rules(cuts: Iterable[Cut], addresses: dict[str, str], gateway: str) -> str:
    """The nft script for ``cuts``. It replaces the whole table, and applying it twice is harmless.

    ``prerouting`` before connection tracking and ``postrouting`` see containers' traffic too, not only the
    host's own.
    """
    out, into = [], []
    for cut in cuts:
        if cut.peer == "etcd":
            leaves = f"ip daddr {gateway} tcp dport {ETCD_PORTS}"
            arrives = f"ip saddr {gateway} tcp sport {ETCD_PORTS}"
        else:
            address = gateway if cut.peer == OUTSIDE else addresses[cut.peer]
            leaves, arrives = f"ip daddr {address}", f"ip saddr {address}"
        out.append(f"    {leaves} drop")
        if not cut.one_way:
            into.append(f"    {arrives} drop")
    return "\n".join(
        [
            "table ip cargo_lab {}",
            "delete table ip cargo_lab",
            "table ip cargo_lab {",
            "  chain out {",
            "    type filter hook postrouting priority -150; policy accept;",
            *out,
            "  }",
            "  chain into {",
            "    type filter hook prerouting priority -450; policy accept;",
            *into,
            "  }",
            "}",
            "",
        ]
    )
