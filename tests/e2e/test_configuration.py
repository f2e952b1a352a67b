"""The container arrives as the one it was: every option that Docker takes, compared field by field, and what is refused."""

from __future__ import annotations

import json
import os
import stat
from typing import Any

import pytest

from events import schema
from labkit.waiting import wait_until
from tests.e2e.test_image_and_networks import network, reasons_of
from tests.support.fleet import Container, Fleet
from tests.support.oracle import LABEL
from tests.support.same_container import differences

pytestmark = [pytest.mark.lab, pytest.mark.timeout(150)]

SLEEP = ["sh", "-c", "trap 'exit 0' TERM INT USR1; sleep 100000 & wait"]
SECOND = 1_000_000_000
MEGABYTE = 1 << 20
PROFILE = json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO"}]})
FIXED_PORTS = {
    "HostConfig.PublishAllPorts": "the ports that Docker chose are asked for by their numbers, so clients still find them",
    "HostConfig.PortBindings.7001/tcp[0].HostPort": "as above",
    "HostConfig.PortBindings.7002/tcp[0].HostPort": "as above",
    "HostConfig.PortBindings.7003/tcp[0].HostPort": "as above",
    "HostConfig.PortBindings.7005/tcp": "as above",
    "Mounts[0].Mode": "Docker shows one for a volume that is asked for by name",
    "HostConfig.Binds": "a volume without a name is asked for by the name that Docker gave it",
}

EVERYTHING: dict[str, Any] = {
    "Hostname": "inside",
    "Domainname": "example.net",
    "User": "0:7",
    "Env": ["TOKEN=hush", "EMPTY=", "LINES=a\nb"],
    "WorkingDir": "/tmp",
    "Entrypoint": ["/bin/sh"],
    "Cmd": ["-c", "trap 'exit 0' USR1; sleep 100000 & wait"],
    "ExposedPorts": {"9999/udp": {}},
    "Labels": {"team": "web", "odd.label": "a=b, c"},
    "StopSignal": "SIGUSR1",
    "StopTimeout": 7,
    "MacAddress": "02:42:0a:00:00:77",
    "Healthcheck": {
        "Test": ["CMD-SHELL", "test -d /proc"],
        "Interval": 5 * SECOND,
        "Timeout": 3 * SECOND,
        "Retries": 4,
        "StartPeriod": SECOND,
    },
    "HostConfig": {
        "NetworkMode": "front",
        "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 5},
        "CapAdd": ["NET_ADMIN", "SYS_PTRACE"],
        "CapDrop": ["MKNOD"],
        "SecurityOpt": ["no-new-privileges", f"seccomp={PROFILE}"],
        "GroupAdd": ["12", "nogroup"],
        "Dns": ["10.77.255.1"],
        "DnsOptions": ["ndots:3"],
        "DnsSearch": ["example.net"],
        "ExtraHosts": ["peer:10.1.2.3", "six:fd00::7"],
        "Init": True,
        "IpcMode": "shareable",
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "3", "labels": "team"}},
        "Memory": 256 * MEGABYTE,
        "MemoryReservation": 64 * MEGABYTE,
        "MemorySwap": 512 * MEGABYTE,
        "CpuShares": 512,
        "CpuPeriod": 50000,
        "CpuQuota": 40000,
        "CpusetCpus": "0",
        "CpusetMems": "0",
        "PidsLimit": 200,
        "OomScoreAdj": 300,
        "ShmSize": 32 * MEGABYTE,
        "Sysctls": {"net.core.somaxconn": "512", "net.ipv4.ip_unprivileged_port_start": "80"},
        "Ulimits": [{"Name": "nofile", "Soft": 512, "Hard": 1024}, {"Name": "core", "Soft": 0, "Hard": 0}],
        "Devices": [{"PathOnHost": "/dev/fuse", "PathInContainer": "/dev/moved", "CgroupPermissions": "rw"}],
        "DeviceCgroupRules": ["c 42:* rmw"],
        "Tmpfs": {"/scratch": "rw,noexec,size=4m,mode=1770"},
        "Binds": ["everything-data:/data"],
        "Mounts": [
            {"Type": "tmpfs", "Target": "/more-scratch", "TmpfsOptions": {"SizeBytes": MEGABYTE, "Mode": 0o700}},
            {"Type": "volume", "Source": "everything-more", "Target": "/more", "ReadOnly": True},
        ],
        "MaskedPaths": ["/proc/kcore", "/proc/keys"],
        "ReadonlyPaths": ["/proc/bus"],
        "PortBindings": {"7000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "17000"}]},
    },
}

PRIVATE_NOTHING: dict[str, Any] = {
    "Tty": True,
    "OpenStdin": True,
    "StdinOnce": True,
    "Cmd": SLEEP,
    "HostConfig": {
        "NetworkMode": "none",
        "PidMode": "host",
        "IpcMode": "host",
        "UTSMode": "host",
        "CgroupnsMode": "host",
        "UsernsMode": "host",
        "CgroupParent": "/cargo-configuration",
        "ReadonlyRootfs": True,
        "LogConfig": {"Type": "none", "Config": {}},
        "RestartPolicy": {"Name": "unless-stopped", "MaximumRetryCount": 0},
        "NanoCpus": 500_000_000,
        "OomScoreAdj": 10,
    },
}

PUBLISHED: dict[str, Any] = {
    "Cmd": SLEEP,
    "ExposedPorts": {f"{port}/tcp": {} for port in range(7000, 7006)} | {"7006/udp": {}},
    "Volumes": {"/anonymous": {}},
    "HostConfig": {
        "PublishAllPorts": True,
        "PortBindings": {
            "7000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "17100"}],
            "7001/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}],
            "7002/tcp": [{"HostIp": "", "HostPort": "17110-17119"}],
            "7003/tcp": [{"HostIp": "127.0.0.1", "HostPort": "17120-17129"}],
            "7004/tcp": [{"HostIp": "127.0.0.1", "HostPort": "17131"}, {"HostIp": "0.0.0.0", "HostPort": "17132"}],
            "7006/udp": [{"HostIp": "127.0.0.1", "HostPort": "17140"}],
        },
    },
}


def start(fleet: Fleet, name: str, body: dict[str, Any], on: str = "alpha", **endpoints: Any) -> Container:
    """A container on a host, asked for in the very words of Docker's API; ``endpoints`` by network."""
    api = fleet.docker[on].api
    first = body["HostConfig"].get("NetworkMode")
    labels = {**body.get("Labels", {}), LABEL: name}
    wiring = {"EndpointsConfig": {first: endpoints[first]}} if first in endpoints else {}
    request = {**body, "Image": fleet.images["busybox"], "Labels": labels, "NetworkingConfig": wiring}
    made = api._result(api._post_json(api._url("/containers/create"), data=request, params={"name": name}), json=True)
    assert not made["Warnings"], made
    for other, endpoint in endpoints.items():
        if other != first:
            line = {"Container": made["Id"], "EndpointConfig": endpoint}
            api._raise_for_status(api._post_json(api._url("/networks/{0}/connect", other), data=line))
    container: Container = fleet.docker[on].containers.get(made["Id"])
    container.start()
    fleet.wait_listed(on, name)
    return fleet.present(on, name)


def moved(fleet: Fleet, name: str, source: str = "alpha", target: str = "beta", **more: Any) -> Container:
    """The container on the target, on plain volumes and under its own restart policy."""
    policy = fleet.policy(source, name)
    fleet.migrate(f"{name}-1", name, source=source, target=target, **more)
    if "finalised" not in fleet.types(f"{name}-1"):
        fleet.control(f"{name}-1", "finalise")
    fleet.wait_for(f"{name}-1", "finalised")
    fleet.wait_running(target, name)
    fleet.wait_policy(target, name, policy)
    fleet.assert_sound(f"{name}-1")
    return fleet.present(target, name)


def test_a_container_that_uses_every_option_is_the_same_on_the_target(fleet: Fleet) -> None:
    """P11, F10: process, rights, limits, devices, health, log, names, addresses in two networks."""
    network(fleet, "front", "10.203.0.0/24", labels={"team": "web"})
    network(fleet, "back", "10.204.0.0/24", internal=True)
    before = start(
        fleet,
        "everything",
        EVERYTHING,
        front={"IPAMConfig": {"IPv4Address": "10.203.0.7"}, "Aliases": ["www", "shop"]},
        back={"IPAMConfig": {"IPv4Address": "10.204.0.9"}, "Aliases": ["store"]},
    )
    assert before.attrs["NetworkSettings"]["Networks"]["front"]["MacAddress"] == EVERYTHING["MacAddress"]
    after = moved(fleet, "everything")
    assert differences(before.attrs, after.attrs, fixed_addresses=True) == []
    # Of the container's own process: what Docker starts beside it gets its limits by a race within old versions of runc.
    limits = "grep '^Max open files' /proc/1/limits"
    inside = fleet.execute(
        "beta", "everything", f"id -u; hostname; {limits}; cat /proc/sys/net/core/somaxconn; ls /dev/moved"
    )
    assert inside.split() == ["0", "inside", "Max", "open", "files", "512", "1024", "files", "512", "/dev/moved"]


def test_a_container_without_any_isolation_is_the_same_on_the_target(fleet: Fleet) -> None:
    """Options that exclude those of the other container: the host's namespaces, no network, a read-only root."""
    before = start(fleet, "open", PRIVATE_NOTHING)
    after = moved(fleet, "open")
    assert differences(before.attrs, after.attrs) == []


def test_ports_that_docker_chose_are_the_same_numbers_on_the_target(fleet: Fleet) -> None:
    before = start(fleet, "published", PUBLISHED)
    after = moved(fleet, "published")
    assert after.attrs["NetworkSettings"]["Ports"] == before.attrs["NetworkSettings"]["Ports"]
    assert all(before.attrs["NetworkSettings"]["Ports"].values())
    assert differences(before.attrs, after.attrs, apart_from=FIXED_PORTS) == []


def test_what_the_target_cannot_give_is_refused_by_name_and_left_out_with_consent(fleet: Fleet) -> None:
    """F10, P14: found before anything stops; what a person agreed to is in the history."""
    for name in ("kept", "only-here"):
        for host in ("alpha", "beta") if name == "kept" else ("alpha",):
            os.mknod(fleet.lab.host(host).path(f"/srv/{name}"), stat.S_IFCHR | 0o600, os.makedev(1, 3))
    devices = [
        {"PathOnHost": f"/srv/{name}", "PathInContainer": f"/dev/{name}", "CgroupPermissions": "rwm"}
        for name in ("kept", "only-here")
    ]
    start(fleet, "short", {"Cmd": SLEEP, "HostConfig": {"Devices": devices}})
    fleet.request("short-1", "short")
    events = fleet.wait_end("short-1", "aborted")
    assert "the target has no device '/srv/only-here'" in reasons_of(events)
    assert 'put "device:/srv/only-here" into the request\'s "without"' in reasons_of(events)
    assert "source_stopped" not in {event.type for event in events}
    assert fleet.running("alpha", "short")
    fleet.assert_clean("beta", "short-1")

    events = fleet.migrate("short-2", "short", without=["device:/srv/only-here"])
    prepared = next(event.data for event in events if isinstance(event.data, schema.TargetPrepared))
    note = "the container is created without device:/srv/only-here, as the request allows"
    assert note in prepared.warnings
    [left] = fleet.present("beta", "short").attrs["HostConfig"]["Devices"]
    assert left["PathOnHost"] == "/srv/kept"
    for command in ("status", "history"):
        assert note in fleet.cargoctl(command, "short-2").stdout
    fleet.assert_sound("short-2")


def test_a_container_whose_namespace_another_one_shares_is_refused_by_both_names(fleet: Fleet) -> None:
    """F10: neither can move alone."""
    fleet.sleeper("owner")
    fleet.sleeper("sharer", network_mode="container:owner")
    for name, words in (("sharer", "network namespace of another container, 'owner'"), ("owner", "'sharer' uses the")):
        fleet.wait_listed("alpha", name)

        def known(name: str = name, words: str = words) -> bool:
            found = fleet.store.get(fleet.keys.inventory_item("alpha", name))
            return found is not None and words in found.value.decode()

        wait_until(known, f"the inventory does not say that {name} shares", 15)
        fleet.request(f"{name}-1", name)
        [rejected] = fleet.wait_end(f"{name}-1", "rejected")
        assert isinstance(rejected.data, schema.Rejected)
        assert words in "; ".join(rejected.data.reasons)


SPARING_RUNTIME = """#!/bin/sh
# runc without a capability that a machine may lack for itself, and so cannot give to a privileged container.
for word do
    case $word in */process.json | */runc-process*) file=$word ;; *) file=$word/config.json ;; esac
    [ -f "$file" ] && sed -i 's/"CAP_SYS_RESOURCE",//g' "$file"
done
exec runc "$@"
"""
POWERS = "mount -t tmpfs none /mnt; grep -c ' /mnt tmpfs' /proc/mounts; umount /mnt; test -c /dev/fuse; ls /dev | wc -l"


def offer_runtime(fleet: Fleet, host: str, name: str, program: str) -> None:
    """The host's dockerd knows one more runtime, until the test ends."""
    where = fleet.lab.host(host)
    place, file = where.path(f"/srv/{name}"), where.path("/etc/docker/daemon.json")
    before = file.read_text()
    place.write_text(program)
    place.chmod(0o755)

    def take(text: str, known: bool) -> None:
        file.write_text(text)
        where.run(["sh", "-c", "kill -HUP $(cat /run/docker.pid)"])
        wait_until(
            lambda: (name in fleet.docker[host].info()["Runtimes"]) is known, f"{host} does not read its runtimes", 10
        )

    told = json.loads(before)
    told["runtimes"] = {**told.get("runtimes", {}), name: {"path": f"/srv/{name}"}}
    take(json.dumps(told), known=True)
    fleet.at_end(lambda: take(before, known=False))


def remove_all(fleet: Fleet) -> None:
    for client in fleet.docker.values():
        for container in client.containers.list(all=True):
            container.remove(force=True)


def test_a_privileged_container_is_the_same_on_the_target_and_a_person_is_told(fleet: Fleet) -> None:
    """F10, P14: with all its rights; what it may depend on is for a person to know."""
    for host in ("alpha", "beta"):
        offer_runtime(fleet, host, "sparing", SPARING_RUNTIME)
    fleet.at_end(lambda: remove_all(fleet))  # while their runtime is known
    options = {"Privileged": True, "Runtime": "sparing", "PidMode": "host", "Binds": ["mighty-data:/data"]}
    before = start(fleet, "mighty", {"Cmd": SLEEP, "HostConfig": options})
    powers = fleet.execute("alpha", "mighty", f"mkdir -p /mnt; {POWERS}")
    assert powers.split()[0] == "1"
    after = moved(fleet, "mighty", privileged=True)
    assert differences(before.attrs, after.attrs) == []
    assert fleet.execute("beta", "mighty", POWERS) == powers
    prepared = next(event.data for event in fleet.events("mighty-1") if isinstance(event.data, schema.SourcePrepared))
    note = "the container is privileged and may depend on the source host in any way"
    assert note in prepared.warnings
    assert note in fleet.cargoctl("status", "mighty-1").stdout
