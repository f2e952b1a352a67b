"""What ``check`` finds, each from made-up facts; and how it is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import checkup as coordinator_checkup
from coordinator import settings as coordinator_settings
from events import bus_check
from events.bus_check import Answer
from events.checkup import Finding, advice, lines, ok, problem, report
from events.errors import StoreUnavailableError
from events.keyspace import Keyspace
from events.memory import MemoryStore
from hostd import checkup, host_facts
from hostd import settings as host_settings
from hostd.engine_calls import EngineInfo
from hostd.host_facts import HostFacts, Neighbour, Place, Tool

ENGINE = EngineInfo(
    engine_version="20.10.24",
    api_version="1.41",
    storage_driver="overlay2",
    containerd_snapshotter=False,
    cgroup_version="2",
    live_restore=True,
    userns_remap=False,
    data_root="/var/lib/docker",
    host_name="alpha",
    kernel="6.1.0",
    architecture="x86_64",
    runtimes=("cargo", "runc"),
)
FACTS = HostFacts(
    kernel="6.1.0-13-amd64",
    file_systems=frozenset({"overlay", "fuse", "nfs4"}),
    watches=1_000_000,
    tools={name: Tool(f"/usr/bin/{name}") for name in host_facts.TOOLS},
    engine=ENGINE,
    sees_same_mounts=True,
    places=(Place("/var/lib/cargo", 100 << 30, 0.5, 10**6, 0.5),),
    nfs_server=True,
)


@pytest.fixture
def settings(tmp_path: Path) -> host_settings.HostSettings:
    file = tmp_path / "hostd.cfg"
    file.write_text("[host]\nname = alpha\naddress = 10.0.0.1\n[etcd]\nendpoints = 10.0.0.9:2379\n")
    return host_settings.load(file)


def engine(**changes: Any) -> EngineInfo:
    return msgspec.structs.replace(ENGINE, **changes)


def changed(**changes: Any) -> HostFacts:
    return replace(FACTS, **changes)


def wrong(findings: list[Finding]) -> dict[str, str]:
    return {finding.about: finding.level for finding in findings if finding.level != "ok"}


def test_a_host_that_has_everything_has_nothing_to_be_said_against_it(settings: host_settings.HostSettings) -> None:
    assert wrong(checkup.host_findings(settings, FACTS)) == {}


@pytest.mark.parametrize(
    ("facts", "about", "level"),
    [
        (changed(kernel="4.19.0"), "kernel", "problem"),
        (changed(kernel="odd"), "kernel", "problem"),
        (changed(file_systems=frozenset({"fuse", "nfs4"})), "overlay", "problem"),
        (changed(file_systems=frozenset({"overlay", "nfs4"})), "fuse", "problem"),
        (changed(fuse_trouble="No such file or directory"), "dev-fuse", "problem"),
        (changed(watches=8192), "inotify", "advice"),
        (changed(tools={**FACTS.tools, "sshfs": Tool()}), "sshfs", "problem"),
        (changed(tools={**FACTS.tools, "rsync": Tool("/b/rsync", works=False, said="unknown option")}), "rsync", "problem"),
        (changed(engine=None, engine_trouble="no socket"), "docker", "problem"),
        (changed(engine=engine(engine_version="19.03.1")), "docker", "problem"),
        (changed(engine=engine(storage_driver="vfs")), "docker-storage", "advice"),
        (changed(engine=engine(security=("rootless",))), "docker-rootless", "problem"),
        (changed(engine=engine(security=("apparmor",)), apparmor_parser=False), "docker-apparmor", "problem"),
        (changed(engine=engine(live_restore=False)), "docker-live-restore", "advice"),
        (changed(engine=engine(runtimes=("runc",))), "docker-runtime", "advice"),
        (changed(sees_same_mounts=False), "mount-namespace", "problem"),
        (changed(union_trouble=("no metacopy",)), "union", "problem"),
        (changed(places=(Place("/x", 1 << 20, 0.9, 0, 1.0),)), "space", "problem"),
        (changed(places=(Place("/x", 100 << 30, 0.05, 0, 1.0),)), "space", "advice"),
        (changed(places=(Place("/x", 100 << 30, 0.5, 100, 0.01),)), "space", "advice"),
        (changed(sshd_trouble="Connection refused"), "sshd", "problem"),
        (changed(identity_trouble="there is no /k"), "ssh-key", "problem"),
        (changed(identity_trouble="others than its owner may read /k"), "ssh-key", "problem"),
        (changed(known_hosts_trouble="there is no /h"), "known-hosts", "problem"),
        (changed(nfs_server=False), "nfs", "advice"),
        (changed(file_systems=frozenset({"overlay", "fuse"})), "nfs", "advice"),
    ],
)  # fmt: skip
def test_each_lack_is_found_alone_and_comes_with_a_remedy(
    settings: host_settings.HostSettings, facts: HostFacts, about: str, level: str
) -> None:
    """O13 among them: a private mount namespace, so that Docker would not see what is mounted."""
    findings = checkup.host_findings(settings, facts)
    assert wrong(findings) == {about: level}
    assert all(finding.remedy for finding in findings if finding.level != "ok")


def test_nfs_is_a_problem_only_for_a_host_that_is_configured_for_it(settings: host_settings.HostSettings) -> None:
    finding = checkup.nfs_finding(replace(settings, remote="nfs"), changed(nfs_server=False))
    assert finding.level == "problem"


def test_other_hosts_are_advised_on_and_make_no_host_unfit(settings: host_settings.HostSettings) -> None:
    findings = checkup.neighbour_findings(
        [
            Neighbour("beta", "10.0.0.2", 22, pinned=True, trouble=""),
            Neighbour("gamma", "10.0.0.3", 22, pinned=False, trouble=""),
            Neighbour("delta", "10.0.0.4", 22, pinned=True, trouble="Connection refused"),
        ],
        settings,
    )
    assert [finding.level for finding in findings] == ["ok", "advice", "advice"]
    assert ["gamma" in finding.says for finding in findings] == [False, True, False]


# --- the bus -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "about", "level"),
    [
        ([Answer("a:1", trouble="refused")], "etcd", "problem"),
        ([Answer("a:1", trouble="refused"), Answer("b:1", "3.5.1")], "etcd", "advice"),
        ([Answer("a:1", "3.3.25")], "etcd-version", "problem"),
        ([Answer("a:1", "what")], "etcd-version", "problem"),
        ([Answer("a:1", "3.4.23", healthy=False)], "etcd-health", "problem"),
        ([Answer("a:1", "3.4.23", skew_seconds=-5.0)], "clock", "advice"),
        ([Answer("a:1", "3.4.23", skew_seconds=0.4), Answer("b:1", "3.4.23", skew_seconds=600)], "clock", "problem"),
    ],
)
def test_what_is_wrong_with_the_bus_is_found(answers: list[Answer], about: str, level: str) -> None:
    assert wrong(bus_check.judge(answers)) == {about: level}


def test_a_bus_that_is_well_is_called_so() -> None:
    found = bus_check.judge([Answer("a:1", "3.4.23", skew_seconds=0.3)])
    assert wrong(found) == {}
    assert {finding.about for finding in found} == {"etcd", "etcd-version", "clock"}


class Refusing(MemoryStore):
    """Lets everybody read, and nobody write."""

    def transact(self, *_: Any) -> Any:
        raise StoreUnavailableError("etcd refuses this process: permission denied")


def test_a_missing_permission_is_told_from_the_one_that_is_there() -> None:
    store = Refusing(Keyspace())
    found = bus_check.permissions(store, reads=store.keys.requests, writes=store.keys.leader)
    assert wrong(found) == {"etcd-write": "problem"}
    assert "permission denied" in found[1].says


def test_trying_a_permission_changes_nothing() -> None:
    store = MemoryStore(Keyspace())
    key = store.keys.host("alpha")
    store.put(key, b"here")
    assert wrong(bus_check.permissions(store, reads=store.keys.requests, writes=key)) == {}
    found = store.get(key)
    assert found is not None and found.value == b"here"


def test_a_coordinator_without_an_endpoint_needs_an_etcd_to_run(tmp_path: Path) -> None:
    file = tmp_path / "c.cfg"
    file.write_text("[coordinator]\nclient_port = 1\npeer_port = 2\n")
    settings = coordinator_settings.load(file)
    found = coordinator_checkup.embedded_findings(settings, which=lambda _name: None)
    assert wrong(found) == {"etcd": "advice", "etcd-server": "problem"}


# --- saying it ---------------------------------------------------------------------------------------


def test_problems_come_last_and_each_remedy_below_its_finding() -> None:
    told = lines([problem("a", "is missing", "get it"), ok("b", "fine"), advice("c", "could be", "do this")])
    assert [line.strip() for line in told] == [
        "ok      b: fine", "advice  c: could be", "→ do this", "PROBLEM a: is missing", "→ get it",
    ]  # fmt: skip


def test_the_exit_code_says_whether_a_problem_was_found_and_advice_is_none(capsysbinary: Any) -> None:
    assert report("host x", [ok("b", "fine"), advice("c", "s", "r")], as_json=True) == 0
    told = json.loads(capsysbinary.readouterr().out)
    assert told["ready"] is True
    assert told["findings"][1] == {"about": "c", "level": "advice", "says": "s", "remedy": "r"}
    assert report("host x", [problem("b", "bad", "r")], as_json=False) == 1
    assert b"not ready, 1 problem" in capsysbinary.readouterr().out
