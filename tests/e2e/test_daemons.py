"""The daemons as an operator meets them: command line, configuration, SIGTERM, an etcd of its own, a second leader."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from events.connecting import connect
from events.settings import EtcdSettings
from labkit.probes import etcd_answers
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until
from tests.support.etcd import free_port
from tests.support.fleet import ON_A_UNION, Fleet

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]

STOP_SECONDS = 8.0
USAGE = 2
DAEMONS = {"coordinator": "coordinator.main", "hostd": "hostd.main"}


def environment(**more: str) -> dict[str, str]:
    """Of the test, with the project on the path."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}


def daemon(name: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a daemon that is expected to end by itself at once."""
    line = [sys.executable, "-m", DAEMONS[name], *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=cwd, timeout=20, check=False)


@contextlib.contextmanager
def coordinator(config: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A coordinator beside the lab's, as a child of the test."""
    line = [sys.executable, "-m", DAEMONS["coordinator"], "-c", str(config)]
    with log.open("ab") as file:
        child = subprocess.Popen(line, env=environment(), stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def ended(child: subprocess.Popen[bytes]) -> int:
    """The exit code after SIGTERM, which must come within seconds."""
    child.send_signal(signal.SIGTERM)
    return child.wait(STOP_SECONDS)


# --- the command line and the configuration ---------------------------------------------------------


@pytest.mark.parametrize("name", DAEMONS)
def test_help_says_what_it_is_and_what_its_exit_codes_mean(name: str) -> None:
    for flag in ("-h", "--help"):
        said = daemon(name, flag)
        assert said.returncode == 0
        assert f"usage: cargo-{name}" in said.stdout
        assert "--config" in said.stdout
        assert "Exit codes" in said.stdout


@pytest.mark.parametrize("name", DAEMONS)
def test_a_missing_configuration_is_a_sentence_and_exit_code_2(name: str, tmp_path: Path) -> None:
    for arguments in ((), ("-c", str(tmp_path / "none.cfg")), (f"--config={tmp_path / 'none.cfg'}",)):
        said = daemon(name, *arguments, cwd=tmp_path)
        assert said.returncode == USAGE
        assert "there is no configuration file" in said.stderr
        assert "Traceback" not in said.stderr


@pytest.mark.parametrize(
    ("name", "text", "mistakes"),
    [
        (
            "coordinator",
            "[coordinator]\nname = a b\ndata_dir = here\nclient_port = 0\n[log]\nlevel = loud\n[extra]\nx = 1\n",
            ["name", "data_dir", "client_port", "level", "[extra]"],
        ),
        (
            "hostd",
            "[host]\nname = -x\naddress = somewhere\ncolour = red\n[ssh]\nport = 99999\n[log]\nformat = pdf\n",
            ["name", "address", "colour", "port", "format", "endpoints"],
        ),
    ],
)
def test_every_mistake_of_a_configuration_is_listed_at_once(
    name: str, text: str, mistakes: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.cfg").write_text(text)
    said = daemon(name, cwd=tmp_path)
    assert said.returncode == USAGE
    for mistake in mistakes:
        assert mistake in said.stderr
    assert "Traceback" not in said.stderr


def test_failpoints_that_cannot_be_understood_stop_a_daemon_before_it_begins(tmp_path: Path) -> None:
    config = tmp_path / "config.cfg"
    config.write_text("")
    line = [sys.executable, "-m", DAEMONS["coordinator"], "-c", str(config)]
    said = subprocess.run(
        line, capture_output=True, text=True, env=environment(CARGO_FAILPOINTS="boom"), timeout=20, check=False
    )
    assert said.returncode == USAGE
    assert "cannot understand the failpoint 'boom'" in said.stderr


def command_of_the_child(process: subprocess.Popen[bytes]) -> list[bytes]:
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")


# --- an etcd of its own --------------------------------------------------------------------------------


def test_without_an_endpoint_a_coordinator_runs_an_etcd_of_its_own_and_keeps_its_data(tmp_path: Path) -> None:
    """E11: which compacts itself; etcd does not unless it is told to."""
    port = free_port()
    config, log = tmp_path / "own.cfg", tmp_path / "log"
    ports = f"client_port = {port}\npeer_port = {free_port()}\n"
    config.write_text(f"[coordinator]\nname = own\ndata_dir = {tmp_path}/etcd\n{ports}[log]\nformat = json\n")
    store = connect(EtcdSettings(endpoints=(f"127.0.0.1:{port}",)))
    try:
        with coordinator(config, log) as child:
            wait_until(lambda: etcd_answers("127.0.0.1", port), "no etcd comes up", 20)
            wait_until(lambda: store.get(store.keys.leader) is not None, "it does not lead", 20)
            assert "running an embedded etcd" in log.read_text()
            assert b"--auto-compaction-retention" in command_of_the_child(child)
            store.put(store.keys.requests + "wrong", b"nonsense")
            wait_until(lambda: bool(store.read("wrong")), "the request is not answered", 10)
            assert ended(child) == 0
        assert not etcd_answers("127.0.0.1", port), "it ends with its coordinator"

        with coordinator(config, log) as child:
            wait_until(lambda: etcd_answers("127.0.0.1", port), "no etcd comes up", 20)
            assert [event.type for event in store.read("wrong")] == ["rejected"]
            child.kill()
            child.wait()
            wait_until(lambda: not etcd_answers("127.0.0.1", port), "etcd outlives a killed coordinator", 10)
    finally:
        store.close()


def test_an_embedded_etcd_that_is_killed_is_started_again_with_its_data(tmp_path: Path) -> None:
    """B1: the coordinator holds meanwhile, and leads again by itself."""
    port = free_port()
    config, log = tmp_path / "own.cfg", tmp_path / "log"
    ports = f"client_port = {port}\npeer_port = {free_port()}\n"
    config.write_text(f"[coordinator]\nname = own\ndata_dir = {tmp_path}/etcd\n{ports}[log]\nformat = json\n")
    store = connect(EtcdSettings(endpoints=(f"127.0.0.1:{port}",)))
    try:
        with coordinator(config, log) as child:
            wait_until(lambda: etcd_answers("127.0.0.1", port), "no etcd comes up", 20)
            wait_until(lambda: store.get(store.keys.leader) is not None, "it does not lead", 20)
            store.put(store.keys.requests + "wrong", b"nonsense")
            wait_until(lambda: bool(store.read("wrong")), "the request is not answered", 10)
            [etcd] = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            os.kill(int(etcd), signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{etcd}").exists(), "it does not die", 10)
            wait_until(lambda: etcd_answers("127.0.0.1", port), "it does not come back", 20)
            assert [event.type for event in store.read("wrong")] == ["rejected"]
            store.put(store.keys.requests + "wrong-too", b"nonsense")
            wait_until(lambda: bool(store.read("wrong-too")), "nobody leads any more", 30)
            assert ended(child) == 0
        assert not etcd_answers("127.0.0.1", port)
    finally:
        store.close()


def test_an_etcd_of_somebody_else_on_that_port_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    config = tmp_path / "own.cfg"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = f"client_port = {port}\npeer_port = {free_port()}\n"
        config.write_text(f"[coordinator]\ndata_dir = {tmp_path}/etcd\n{ports}")
        said = daemon("coordinator", "-c", str(config))
    assert said.returncode == 1
    assert "something listens on" in said.stdout + said.stderr


# --- stopping ------------------------------------------------------------------------------------------


def test_an_agent_that_ends_leaves_no_view_behind_that_nothing_stands_on(fleet: Fleet) -> None:
    """Opened ahead, beside the rounds; its next life opens it again."""
    (fleet.volume("alpha", "ahead") / "large").write_bytes(os.urandom(3_000_000))
    fleet.sleeper("ahead", volumes={"ahead": {"bind": "/data"}})
    fleet.request("ahead-1", "ahead", bwlimit_kib=300)
    fleet.wait_for("ahead-1", "sync_armed")
    wait_until(lambda: len(fleet.mounts("beta")) == 2, "the view is not opened ahead", 20)
    assert fleet.beta.hostd.stop(STOP_SECONDS), "it had to be killed"
    assert fleet.mounts("beta") == [] and fleet.tools("beta") == []
    fleet.beta.hostd.start()
    fleet.wait_end("ahead-1", "completed", timeout_seconds=60)
    fleet.assert_sound("ahead-1")


def test_sigterm_ends_agents_in_the_middle_of_a_transfer_and_their_next_life_goes_on(fleet: Fleet) -> None:
    (fleet.volume("alpha", "mid-data") / "large").write_bytes(os.urandom(3_000_000))
    fleet.sleeper("mid", volumes={"mid-data": {"bind": "/data"}})
    fleet.request("mid-1", "mid", bwlimit_kib=300)
    fleet.wait_for("mid-1", "sync_armed")
    wait_until(lambda: any("rsync" in line for line in fleet.tools("beta")), "no transfer begins", 10)
    for host in (fleet.beta, fleet.alpha):
        since = fleet.log_size(f"{host.spec.name}.hostd")
        assert host.hostd.stop(STOP_SECONDS), "it had to be killed"
        last = (fleet.lab.spec.logs / f"{host.spec.name}.hostd.log").read_text()[since:].splitlines()[-1]
        assert json.loads(last)["event"] == "stopped"
    assert not any(line.startswith("rsync") for line in fleet.tools("beta"))
    assert fleet.lab.coordinator.stop(STOP_SECONDS)
    assert fleet.running("alpha", "mid")
    fleet.lab.start_agents()
    fleet.wait_end("mid-1", "completed", timeout_seconds=70)
    fleet.assert_sound("mid-1")


def test_sigterm_while_the_container_stands_on_the_union_leaves_it_running(fleet: Fleet) -> None:
    fleet.volume("alpha", "up-data")
    writer = "trap 'exit 0' TERM; while :; do echo x >> /data/log; sleep 0.1; done"
    fleet.run("up", command=["sh", "-c", writer], volumes={"up-data": {"bind": "/data"}})
    fleet.migrate("up-1", "up", **ON_A_UNION)
    started = fleet.present("beta", "up").attrs["State"]["StartedAt"]
    assert fleet.mounts("beta")
    assert fleet.beta.hostd.stop(STOP_SECONDS)
    before = int(fleet.execute("beta", "up", "wc -l < /data/log"))
    wait_until(lambda: int(fleet.execute("beta", "up", "wc -l < /data/log")) > before, "it writes no more", 10)
    fleet.beta.hostd.start()
    assert fleet.present("beta", "up").attrs["State"]["StartedAt"] == started
    fleet.control("up-1", "finalise")
    fleet.wait_for("up-1", "finalised")


# --- several coordinators ------------------------------------------------------------------------------


def test_a_second_coordinator_waits_and_takes_over_when_the_first_is_killed(fleet: Fleet, tmp_path: Path) -> None:
    config, log = tmp_path / "second.cfg", tmp_path / "log"
    endpoints = fleet.lab.etcd.endpoints
    config.write_text(f"[coordinator]\nname = c2\n[etcd]\nendpoints = {endpoints}\n[log]\nformat = json\n")
    fleet.sleeper("two")
    fleet.failpoints("hostd/beta", "target.sync:before_event=pause")
    with coordinator(config, log) as child:
        wait_until(lambda: log.exists() and "campaigning" in log.read_text(), "it does not campaign", 20)
        fleet.request("two-1", "two")
        fleet.wait_for("two-1", "sync_armed")
        assert '"leading"' not in log.read_text()
        fleet.lab.coordinator.kill()
        fleet.failpoints("hostd/beta", "")
        events = fleet.wait_end("two-1", "completed")
        authors = [event.by for event in events if event.by.startswith("coordinator/")]
        assert (authors[0], authors[-1]) == ("coordinator/c1", "coordinator/c2")
        fleet.assert_sound("two-1")
        fleet.lab.coordinator.start()
        assert ended(child) == 0
        fleet.sleeper("three")
        events = fleet.migrate("three-1", "three")
        assert events[0].by == "coordinator/c1"


def test_logs_are_json_with_migration_seq_and_host_on_every_line_of_a_step(fleet: Fleet) -> None:
    fleet.sleeper("noted")
    since = {name: fleet.log_size(name) for name in ("alpha.hostd", "beta.hostd", "coordinator")}
    fleet.migrate("noted-1", "noted")
    for name, start in since.items():
        text = (fleet.lab.spec.logs / f"{name}.log").read_bytes()[start:].decode()
        rows = [json.loads(line) for line in text.splitlines()]
        mine = [row for row in rows if row.get("migration") == "noted-1"]
        assert mine
        for row in mine:
            assert {"timestamp", "level", "host", "event"} <= set(row), row
            assert "seq" in row, row
