"""IPv6: networks with IPv6 subnets, fixed addresses, ports published on IPv6, and hosts that reach each other by it."""

from __future__ import annotations

import functools
from typing import Any

import docker.types
import pytest

from events import schema
from events.records import decode_placement
from labkit.host import Host
from labkit.waiting import wait_until
from tests.e2e.test_configuration import moved, start
from tests.e2e.test_image_and_networks import networks_of, reasons_of
from tests.support.fleet import Fleet
from tests.support.same_container import differences

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

ASK = """if 1:
    import http.client, sys
    asking = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=3)
    asking.request("GET", "/word")
    print(asking.getresponse().read().decode())
"""
SERVE = ["httpd", "-f", "-p", "[::]:7000", "-h", "/data"]
SUBNETS = ("10.205.0.0/24", "fd5c:0:0:5::/64")
FIXED = "fd5c:0:0:5::77"


def network(fleet: Fleet, name: str, *subnets: str, host: str = "alpha") -> Any:
    """A bridge network with these subnets; whatever has that name is removed from both hosts in the end."""
    pools = [docker.types.IPAMPool(subnet=subnet) for subnet in subnets]
    ipam = docker.types.IPAMConfig(pool_configs=pools)

    fleet.forget_network(name)
    return fleet.docker[host].networks.create(name, ipam=ipam, enable_ipv6=True)


def server(fleet: Fleet, name: str) -> Any:
    """A container with a fixed IPv6 address that answers on a port published on IPv6 and, elsewhere, on all addresses."""
    (fleet.volume("alpha", f"{name}-data") / "word").write_text(name)
    ports = [{"HostIp": "::1", "HostPort": "17200"}, {"HostIp": "", "HostPort": "17201"}]
    body = {
        "Cmd": SERVE,
        "StopSignal": "SIGKILL",  # the first process of a container ignores others that it does not handle
        "ExposedPorts": {"7000/tcp": {}},
        "HostConfig": {
            "NetworkMode": "six",
            "Binds": [f"{name}-data:/data"],
            "PortBindings": {"7000/tcp": ports},
            "Sysctls": {"net.ipv6.conf.all.forwarding": "0"},
        },
    }
    return start(fleet, name, body, six={"IPAMConfig": {"IPv6Address": FIXED}, "Aliases": ["www"]})


def answer(fleet: Fleet, host: str, address: str, port: int) -> str:
    """What the service says to a program on the host."""
    where = fleet.lab.host(host)
    said: dict[str, str] = {}

    def answers() -> bool:
        done = where.run([where.python, "-c", ASK, address, str(port)], check=False)
        said.update(words=done.stdout.strip(), trouble=done.stderr)
        return done.returncode == 0

    wait_until(answers, f"{address} port {port} does not answer on {host}", 10)
    return said["words"]


def test_a_container_keeps_its_ipv6_network_its_fixed_address_and_its_ports_on_ipv6(fleet: Fleet) -> None:
    """F10: the network is made with both subnets; the address is reached by it, and so are the ports."""
    network(fleet, "six", *SUBNETS)
    before = server(fleet, "sixth").attrs
    assert before["NetworkSettings"]["Networks"]["six"]["GlobalIPv6Address"] == FIXED
    assert answer(fleet, "alpha", FIXED, 7000) == "sixth"
    after = moved(fleet, "sixth").attrs
    assert differences(before, after) == []
    assert after["NetworkSettings"]["Networks"]["six"]["GlobalIPv6Address"] == FIXED
    for address, port in ((FIXED, 7000), ("::1", 17200), ("::1", 17201), ("127.0.0.1", 17201)):
        assert answer(fleet, "beta", address, port) == "sixth", address
    [made] = fleet.docker["beta"].networks.list(names=["six"])
    [original] = fleet.docker["alpha"].networks.list(names=["six"])
    for field in ("Driver", "IPAM", "EnableIPv6", "Options"):
        assert made.attrs[field] == original.attrs[field]
    found = fleet.store.get(fleet.keys.placement("sixth"))
    assert found is not None
    placement = decode_placement(found.value)
    assert placement.networks_ipv6 == {"six": FIXED}
    assert {port.host_ip for port in placement.ports} >= {"::1", "::"}


def test_an_ipv6_subnet_that_is_in_use_on_the_target_is_refused_with_the_reason(fleet: Fleet) -> None:
    """F10: found before anything stops."""
    network(fleet, "six", *SUBNETS)
    network(fleet, "theirs", "10.206.0.0/24", "fd5c::/48", host="beta")
    server(fleet, "crowded")
    fleet.request("crowded-1", "crowded")
    events = fleet.wait_end("crowded-1", "aborted")
    assert "its subnet fd5c:0:0:5::/64 overlaps fd5c::/48 of the network 'theirs' there" in reasons_of(events)
    assert "source_stopped" not in {event.type for event in events}
    assert fleet.running("alpha", "crowded")
    assert "six" not in networks_of(fleet, "beta")


def reach_by_ipv6(fleet: Fleet) -> None:
    """Until the test ends, the hosts' agents and sshds know each other by IPv6 addresses, and by no others."""
    for number, host in enumerate(fleet.lab.hosts, 2):
        address = f"fd5c:0:0:77::{number}"
        host.run(["ip", "-6", "address", "add", f"{address}/64", "dev", "eth0", "nodad"])
        for file, word in (("/etc/cargo/hostd.cfg", "address = "), ("/etc/cargo/ssh/sshd_config", "ListenAddress ")):
            host.run(["sed", "-i", f"s/^{word}{host.spec.address}$/{word}{address}/", file])
            host.run(["grep", "-q", address, file])
        host.sshd.stop()
        host.sshd.start(wait=False)
        host.hostd.stop()
        host.hostd.start()
        fleet.at_end(functools.partial(by_ipv4_again, host, address))

        def known(host: Host = host, address: str = address) -> bool:
            found = fleet.store.get(fleet.keys.host(host.spec.name))
            return found is not None and address in found.value.decode()

        wait_until(known, f"{host.spec.name} is not registered with {address}", 15)


def by_ipv4_again(host: Host, address: str) -> None:
    for file in ("/etc/cargo/hostd.cfg", "/etc/cargo/ssh/sshd_config"):
        host.run(["sed", "-i", f"s/{address}$/{host.spec.address}/", file])
    host.run(["ip", "-6", "address", "del", f"{address}/64", "dev", "eth0"])
    host.sshd.stop()
    host.sshd.start()
    host.hostd.stop()
    host.hostd.start()


def test_hosts_that_reach_each_other_by_ipv6_alone_move_a_container_and_bring_it_back(fleet: Fleet) -> None:
    """Rounds, the specification, what is read through the union, digests, and what is carried back: all by SSH over IPv6."""
    place = fleet.volume("alpha", "sixhosts-data")
    (place / "file").write_bytes(b"contents" * 10_000)
    fleet.sleeper("sixhosts", volumes={"sixhosts-data": {"bind": "/data"}})
    fleet.execute("alpha", "sixhosts", "echo layer > /in-the-layer")
    reach_by_ipv6(fleet)
    fleet.wait_listed("alpha", "sixhosts")
    events = fleet.migrate("sixhosts-1", "sixhosts", strategy="postcopy")
    claimed = next(event.data for event in events if isinstance(event.data, schema.TargetClaimed))
    assert claimed.remainder == "federated"
    assert fleet.execute("beta", "sixhosts", "wc -c < /data/file; cat /in-the-layer").split() == ["80000", "layer"]
    found = fleet.store.get(fleet.keys.placement("sixhosts"))
    assert found is not None
    assert decode_placement(found.value).address == "fd5c:0:0:77::3"
    fleet.execute("beta", "sixhosts", "echo more >> /data/file; echo here > /made")
    fleet.control("sixhosts-1", "rollback")
    fleet.wait_end("sixhosts-1", "rolled_back")
    assert fleet.execute("alpha", "sixhosts", "wc -c < /data/file; cat /made").split() == ["80005", "here"]
    fleet.assert_sound("sixhosts-1")
