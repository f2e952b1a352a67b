"""The lab itself: what it promises to tests and to people who use it by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from labkit import CommandFailedError, Host, Lab, LabError
from labkit.leftovers import describe, marked_processes
from labkit.process import started_ticks
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until

pytestmark = pytest.mark.lab

NAME, SUBNET = "labtest", "10.78.1"
OTHER, OTHER_SUBNET = "labother", "10.78.2"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    Lab(NAME).down()
    with Lab(NAME, SUBNET, agents=False) as made:
        yield made


@pytest.fixture
def other() -> Iterator[Lab]:
    """A second lab, for tests that end with its ruin."""
    Lab(OTHER).down()
    made = Lab(OTHER, OTHER_SUBNET, ("alpha",), agents=False)
    yield made
    made.down()


def command(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``scripts/lab`` without its set-up."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "scripts")} | (env or {})
    argv = [sys.executable, "-P", "-m", "labkit", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, timeout=120)


def pids(lab: Lab) -> dict[str, int | None]:
    daemons = [lab.etcd.members[0], *(d for h in lab.hosts for d in (h.sshd, h.dockerd))]
    return {d.name: d.pid for d in daemons} | {host.spec.name: host.pid for host in lab.hosts}


def reaches(host: Host, address: str) -> bool:
    return host.run(["busybox", "ping", "-c1", "-W1", address], check=False).returncode == 0


def answer(address: str, key: str) -> bytes | None:
    """What a Redis says, once it does."""
    client = redis.Redis(address, 6379, socket_timeout=2)
    said: list[bytes | None] = []

    def asked() -> bool:
        try:
            said.append(client.get(key))  # type: ignore[arg-type]
        except redis.RedisError:
            return False
        return True

    try:
        wait_until(asked, f"no Redis answers at {address}", 20)
    finally:
        client.close()
    return said[0]


def start_redis(host: Host, name: str, volume: str) -> None:
    image = host.load_image("redis")
    client = host.docker_client()
    volumes = {volume: {"bind": "/data", "mode": "rw"}}
    client.containers.run(image, name=name, detach=True, ports={"6379/tcp": 6379}, volumes=volumes)
    client.close()


# --- up ---------------------------------------------------------------------------------------


def test_up_a_second_time_changes_nothing(lab: Lab) -> None:
    before = pids(lab)
    assert None not in before.values()
    lab.up()
    Lab(NAME).up()
    assert pids(lab) == before


def test_up_starts_again_what_has_died(lab: Lab) -> None:
    lab.host("beta").sshd.kill()
    lab.etcd.kill()
    lab.up()
    assert lab.status()["up"]


def test_each_host_has_its_own_name_processes_network_and_directories(lab: Lab) -> None:
    alpha, beta = lab.host("alpha"), lab.host("beta")
    alpha.run(["sh", "-c", "echo mine > /srv/note; echo mine > /etc/note; echo mine > /tmp/note"])
    assert alpha.path("/srv/note").read_text() == "mine\n"
    assert not Path("/etc/note").exists()
    for host in (alpha, beta):
        assert host.run(["hostname"]).stdout == f"{host.spec.name}\n"
        assert host.spec.address in host.run(["ip", "-4", "addr", "show", "eth0"]).stdout
        assert host.run(["cat", "/proc/1/comm"]).stdout == "tini\n"
    assert "note" not in beta.run(["ls", "/srv", "/tmp"]).stdout.split()
    assert beta.run(["cat", "/etc/note"], check=False).returncode != 0


def test_the_project_and_its_python_are_visible_on_every_host(lab: Lab) -> None:
    ran = lab.host("alpha").run([sys.executable, "-c", "import msgspec"], cwd=str(REPOSITORY))
    assert ran.returncode == 0


def test_odd_bytes_survive_the_way_in_and_out(lab: Lab) -> None:
    name = b"/srv/odd \xff'$(x)"
    lab.host("alpha").run([b"touch", b"--", name])
    listed = lab.host("alpha").run(["ls", "-1", "--", name]).stdout
    assert os.fsencode(listed) == name + b"\n"
    assert lab.host("alpha").path(name).exists()


def test_a_path_that_is_not_private_to_the_host_has_no_outside_view(lab: Lab) -> None:
    for path in ("/usr/bin/env", "/etc/passwd", "relative", "/var/../usr", "/variant"):
        with pytest.raises(LabError, match="private directory"):
            lab.host("alpha").path(path)


def test_a_failing_command_tells_what_it_said(lab: Lab) -> None:
    with pytest.raises(CommandFailedError, match="the reason") as caught:
        lab.host("alpha").run(["sh", "-c", "echo the reason >&2; exit 7"])
    assert caught.value.returncode == 7


def test_killing_a_command_from_outside_ends_it_on_the_host(lab: Lab) -> None:
    alpha = lab.host("alpha")
    child = alpha.popen(["sh", "-c", "echo $$ > /run/victim; exec sleep 600"])
    wait_until(lambda: alpha.path("/run/victim").exists(), "the command does not start", 10)
    inner = alpha.path("/run/victim").read_text().strip()
    child.kill()
    child.wait()
    gone = ["sh", "-c", f"! grep -qs sleep /proc/{inner}/cmdline"]
    wait_until(lambda: alpha.run(gone, check=False).returncode == 0, "the command lives on", 10)


# --- ssh --------------------------------------------------------------------------------------


def test_hosts_reach_each_other_by_ssh_with_pinned_keys(lab: Lab) -> None:
    alpha, beta = lab.host("alpha"), lab.host("beta")
    assert alpha.ssh(beta, ["hostname"]).stdout == "beta\n"
    assert beta.ssh(alpha, ["printf", "%s", "a b'c"]).stdout == "a b'c"


def test_a_host_whose_key_is_not_the_pinned_one_is_refused(lab: Lab) -> None:
    alpha, beta = lab.host("alpha"), lab.host("beta")
    known = alpha.path("/etc/cargo/ssh/known_hosts")
    right = known.read_text()
    own = next(line for line in right.splitlines() if "alpha" in line).split(maxsplit=1)[1]
    try:
        known.write_text(f"{beta.spec.address},beta {own}\n")
        refused = alpha.ssh(beta, ["hostname"], check=False)
        known.write_text("")
        unknown = alpha.ssh(beta, ["hostname"], check=False)
    finally:
        known.write_text(right)
    assert (refused.returncode, unknown.returncode) == (255, 255)
    assert "IDENTIFICATION HAS CHANGED" in refused.stderr
    assert "verification failed" in unknown.stderr


def test_a_host_does_not_let_in_a_key_that_it_does_not_know(lab: Lab) -> None:
    alpha = lab.host("alpha")
    assert alpha.ssh(alpha, ["hostname"], check=False).returncode == 255


# --- docker, power and partitions --------------------------------------------------------------


def test_a_service_with_data_outlasts_a_power_cut(lab: Lab) -> None:
    alpha = lab.host("alpha")
    start_redis(alpha, "store", "store-data")
    assert answer(alpha.spec.address, "key") is None
    redis.Redis(alpha.spec.address).set("key", "kept")
    inside = alpha.path("/var/lib/docker/volumes/store-data/_data/appendonlydir")
    assert inside.is_dir()
    namespace = str(Path(f"/proc/{alpha.pid}/ns/pid").readlink())

    alpha.power_cut()
    assert not alpha.running
    assert not alpha.dockerd.running
    assert not processes_in({namespace})
    assert inside.is_dir()
    with pytest.raises(LabError, match="is off"):
        alpha.run(["true"])
    alpha.power_cut()  # harmless when off

    alpha.boot()
    client = alpha.docker_client()
    assert client.containers.get("store").status == "exited"
    client.containers.get("store").start()
    assert answer(alpha.spec.address, "key") == b"kept"
    client.containers.get("store").remove(force=True)
    client.close()


def test_a_partition_separates_two_hosts_until_healed(lab: Lab) -> None:
    alpha, beta = lab.host("alpha"), lab.host("beta")
    assert reaches(alpha, beta.spec.address)
    alpha.cut(beta)
    assert not reaches(alpha, beta.spec.address)
    assert not reaches(beta, alpha.spec.address)
    assert reaches(alpha, lab.spec.gateway)
    alpha.heal(beta)
    assert reaches(alpha, beta.spec.address)


def test_a_one_way_partition_still_lets_the_other_be_heard(lab: Lab) -> None:
    alpha, beta = lab.host("alpha"), lab.host("beta")

    hear = f"""if 1:
        import socket
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.bind(({alpha.spec.address!r}, 999))
        open("/run/said", "wb").write(s.recv(99))"""
    shout = f"""if 1:
        import socket
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.sendto(b"heard", ({alpha.spec.address!r}, 999))"""
    alpha.spawn("listener", ["/usr/bin/python3", "-c", hear])
    alpha.cut("beta", one_way=True)
    try:
        assert not reaches(beta, alpha.spec.address)

        def heard() -> bool:
            beta.run(["/usr/bin/python3", "-c", shout])
            return alpha.run(["cat", "/run/said"], check=False).stdout == "heard"

        wait_until(heard, "nothing arrives at alpha", 20)
    finally:
        alpha.heal()


def test_a_partition_from_etcd_leaves_published_ports_alone_and_outlasts_a_reboot(lab: Lab) -> None:
    beta = lab.host("beta")
    start_redis(beta, "near", "near-data")
    ask = ["etcdctl", f"--endpoints={lab.etcd.endpoint}", "--command-timeout=1s", "get", "nothing"]
    assert beta.run(ask, check=False).returncode == 0
    beta.cut("etcd")
    assert beta.run(ask, check=False).returncode != 0
    assert answer(beta.spec.address, "key") is None
    beta.power_cut()
    beta.boot()
    assert beta.run(ask, check=False).returncode != 0
    beta.heal()
    assert beta.run(ask, check=False).returncode == 0


def test_a_cut_from_nobody_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match="choose from beta, etcd, outside"):
        lab.host("alpha").cut("alpha")


def test_a_frozen_etcd_answers_nobody_and_goes_on_when_thawed(lab: Lab) -> None:
    lab.etcd.freeze()
    assert not lab.etcd.members[0].ready
    lab.etcd.thaw()
    lab.etcd.wait_ready()


# --- agents -----------------------------------------------------------------------------------


def test_an_agent_is_ready_when_it_has_registered_and_gets_extra_variables(lab: Lab) -> None:
    hostd = lab.host("alpha").hostd
    put = f"etcdctl --endpoints={lab.etcd.endpoint} put /cargo/hosts/alpha $WORD; exec sleep 600"
    hostd.argv = ["sh", "-c", put]
    hostd.start(env={"WORD": "registered"})
    value = ["etcdctl", f"--endpoints={lab.etcd.endpoint}", "get", "--print-value-only", "/cargo/hosts/alpha"]
    assert lab.host("beta").run(value).stdout == "registered\n"
    hostd.stop()
    lab.host("beta").run(["etcdctl", f"--endpoints={lab.etcd.endpoint}", "del", "/cargo/hosts/alpha"])


def test_an_agent_that_dies_at_once_is_an_error_with_its_last_words(lab: Lab) -> None:
    hostd = lab.host("beta").hostd
    hostd.argv = ["sh", "-c", "echo no such setting >&2; exit 2"]
    with pytest.raises(LabError, match=r"(?s)beta.hostd ended.*no such setting"):
        hostd.start()


# --- down -------------------------------------------------------------------------------------


def processes_in(namespaces: set[str]) -> list[int]:
    """Live processes in any of these namespaces of any kind."""
    found = []
    for place in Path("/proc").glob("[0-9]*/ns"):
        try:
            names = {str(link.readlink()) for link in place.iterdir()}
        except OSError:
            continue
        if names & namespaces and started_ticks(int(place.parent.name)) is not None:
            found.append(int(place.parent.name))
    return found


def namespaces_of(lab: Lab) -> set[str]:
    """All namespaces that the lab has and the machine has not."""
    own = {str(link.readlink()) for link in Path("/proc/self/ns").iterdir()}
    marked = marked_processes(lab.root)
    return {str(link.readlink()) for pid in marked for link in Path(f"/proc/{pid}/ns").iterdir()} - own


def machine_settings() -> dict[str, str]:
    """What of the machine's own network and kernel the lab could have changed."""
    tools = {
        "rules": ["nft", "list", "ruleset"],
        "routes": ["ip", "-4", "route", "show", "table", "all"],
        "iptables": ["iptables-save"],
    }
    said = {
        name: "\n".join(
            line
            for line in subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
            if not line.startswith("#") and "cargo-" not in line
        )
        for name, argv in tools.items()
    }
    for name in ("net/ipv4/ip_forward", "kernel/keys/root_maxkeys", "kernel/hostname"):
        said[name] = Path("/proc/sys", name).read_text()
    return said


def assert_gone(lab: Lab, namespaces: set[str]) -> None:
    assert describe(lab.root, lab.spec.prefix) == []
    assert not processes_in(namespaces)
    assert not lab.root.exists()
    assert not list(Path("/sys/class/net").glob(f"{lab.spec.prefix}*"))
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{lab.spec.prefix}"))
    assert str(lab.root) not in Path("/proc/self/mountinfo").read_text()


def test_down_leaves_nothing_and_the_machine_as_it_was(lab: Lab, other: Lab) -> None:
    before = machine_settings()
    neighbour = pids(lab)
    other.up()
    start_redis(other.host("alpha"), "store", "store-data")
    assert answer(other.host("alpha").spec.address, "key") is None
    assert list(Path("/sys/fs/cgroup").glob(f"**/{other.spec.prefix}"))
    namespaces = namespaces_of(other)
    assert len(namespaces) >= 6

    assert other.down()
    assert_gone(other, namespaces)
    assert machine_settings() == before
    assert pids(lab) == neighbour, "another lab must not notice"
    assert other.down() == []


def test_down_works_without_any_memory_of_the_lab(other: Lab) -> None:
    other.up()
    namespaces = namespaces_of(other)
    (other.root / "lab.json").unlink()
    shutil.rmtree(other.root / "processes")
    forgetful = Lab(OTHER)
    assert forgetful.down()
    assert_gone(forgetful, namespaces)


def test_down_removes_a_lab_that_was_only_half_made(other: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Host, "start_services", stumble)
    with pytest.raises(KeyboardInterrupt):
        other.up()
    namespaces = namespaces_of(other)
    assert namespaces
    assert Lab(OTHER).down()
    assert_gone(other, namespaces)


def test_a_host_can_be_added_to_a_running_lab(other: Lab) -> None:
    other.up()
    before = pids(other)
    larger = Lab(OTHER, hosts=("alpha", "beta"))
    larger.up()
    assert before.items() <= pids(larger).items()
    assert larger.host("alpha").ssh(larger.host("beta"), ["hostname"]).stdout == "beta\n"
    assert larger.host("beta").ssh(larger.host("alpha"), ["hostname"]).stdout == "alpha\n"


def test_etcd_of_three_members_goes_on_without_one_of_them() -> None:
    with Lab(OTHER, OTHER_SUBNET, ("alpha",), agents=False, etcd_members=3) as lab:
        lab.etcd.members[0].kill()
        put = ["etcdctl", f"--endpoints={lab.etcd.endpoints}", "put", "key", "value"]
        wait_until(lambda: lab.host("alpha").run(put, check=False).returncode == 0, "no member takes a write", 30)


def test_up_mends_a_lab_whose_hub_was_killed(other: Lab) -> None:
    other.up()
    hub = other._hub.pid
    assert hub is not None
    os.kill(hub, 9)
    wait_until(lambda: other._hub.pid is None, "the hub lives", 10)
    other.up()
    assert other.status()["up"]
    assert reaches(other.host("alpha"), other.spec.gateway)


def test_up_does_not_take_another_labs_interface(lab: Lab) -> None:
    base = Path(os.environ.get("TMPDIR", "/tmp"), f"lab{os.getpid()}")
    thief = Lab(NAME, "10.78.3", agents=False, base=base)
    try:
        with pytest.raises(LabError, match=r"exists, and its lab is not in"):
            thief.up()
        assert pids(lab) == pids(Lab(NAME))
        assert reaches(lab.host("alpha"), lab.spec.gateway)
    finally:
        shutil.rmtree(base, ignore_errors=True)


# --- by hand ----------------------------------------------------------------------------------


def test_status_tells_people_and_programs_what_runs(lab: Lab) -> None:
    said = command("status", "--name", NAME, "--json")
    status = json.loads(said.stdout)
    assert (said.returncode, status["up"], status["etcd"]["endpoints"]) == (0, True, f"{SUBNET}.1:2379")
    assert [host["address"] for host in status["hosts"]] == [f"{SUBNET}.2", f"{SUBNET}.3"]
    table = command("status", "--name", NAME).stdout
    assert "alpha" in table
    assert lab.host("beta").docker_url in table


def test_status_of_no_lab_says_so_with_its_own_exit_code() -> None:
    said = command("status", "--name", "nolab")
    assert (said.returncode, "does not exist" in said.stdout) == (3, True)


def test_exec_hands_on_output_and_exit_code(lab: Lab) -> None:
    said = command("exec", "--name", NAME, "beta", "sh", "-c", "hostname; exit 9")
    assert (said.returncode, said.stdout) == (9, "beta\n")


def test_logs_of_a_daemon_or_of_a_whole_host_can_be_read(lab: Lab) -> None:
    assert "API listen" in command("logs", "--name", NAME, "alpha.dockerd").stdout
    both = command("logs", "--name", NAME, "alpha").stdout
    assert "alpha.sshd.log" in both
    assert "alpha.dockerd.log" in both
    assert command("logs", "--name", NAME, "omega").returncode == 1


def test_a_person_without_root_is_told_so_and_nothing_is_changed() -> None:
    argv = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        sys.executable,
        "-P",
        "-m",
        "labkit",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "scripts")}
    for verb in (["up", "--name", "nobodys", "--subnet", "10.78.4"], ["down", "--name", "nobodys"]):
        said = subprocess.run([*argv, *verb], capture_output=True, text=True, env=environment, check=False)
        assert (said.returncode, "sudo" in said.stderr) == (2, True), said.stderr
        assert "Traceback" not in said.stderr


def test_a_subnet_that_the_machine_uses_is_refused_before_anything_is_changed(lab: Lab) -> None:
    said = command("up", "--name", "clash", "--subnet", SUBNET, "--no-agents")
    assert said.returncode == 2
    assert f"in use here ({SUBNET}.0/24 on cargo-{NAME})" in said.stderr
    assert not Lab("clash").exists


def test_asking_for_another_lab_of_the_same_name_is_refused(lab: Lab) -> None:
    said = command("up", "--name", NAME, "--subnet", "10.78.5")
    assert said.returncode == 1
    assert "not what was asked for" in said.stderr
