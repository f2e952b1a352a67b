"""The gate of a warm start: the agent's half and the runtime's, with a runc that only says that it was called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd import mounts
from hostd.engine import _is_there
from hostd.gate import Gate, end_forgotten, left_gates
from hostd.graft import OciConfig, OciMount, OciProcess, read_config, why_not
from hostd.runtime import install
from labkit.waiting import wait_until

ID = "c0ffee" * 10
HOLDER = """
import signal, sys
from pathlib import Path
from hostd.gate import Gate
gate = Gate(sys.argv[1], Path(sys.argv[2]))
gate.make()
print("made", flush=True)
signal.pause()
"""
CALL = ["--root", "/run/x", "--log-format", "json", "--log", "/l", "start", ID]


class Runtime:
    """Calls the wrapper, with a runc that writes down its arguments."""

    def __init__(self, place: Path) -> None:
        self.gates = place / "gates"
        self.calls = place / "calls"
        runc = place / "runc"
        runc.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{self.calls}\n')
        runc.chmod(0o755)
        self.env = {**os.environ, "CARGO_RUNC": str(runc), "CARGO_GATES": str(self.gates)}
        self.running: list[subprocess.Popen[str]] = []

    def call(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([str(install.WRAPPER), *arguments], env=self.env, stderr=subprocess.PIPE, text=True)
        self.running.append(process)
        return process

    @property
    def ran(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    made = Runtime(tmp_path)
    yield made
    for process in made.running:
        process.kill()
        process.communicate()


def test_without_a_gate_the_runtime_is_the_hosts_own(runtime: Runtime) -> None:
    assert runtime.call(*CALL).wait(10) == 0
    assert runtime.call("features").wait(10) == 0
    assert runtime.call("--version").wait(10) == 0
    assert runtime.ran == [" ".join(CALL), "features", "--version"]


def test_a_start_waits_at_its_gate_until_it_is_opened(runtime: Runtime) -> None:
    gate = Gate(ID, runtime.gates)
    gate.make()
    create = ["--root", "/run/x", "create", "--bundle", "/b", "--pid-file", "/b/init.pid", ID]
    assert runtime.call(*create).wait(10) == 0
    assert gate.pid_file == Path("/b/init.pid")
    started = runtime.call(*CALL)
    wait_until(lambda: gate.waiting, "the start does not come to its gate", 10)
    assert started.poll() is None
    assert runtime.ran == [" ".join(create)]
    gate.open()
    assert started.wait(10) == 0
    assert runtime.ran == [" ".join(create), " ".join(CALL)]
    assert left_gates(runtime.gates) == [], "a later start of the same container is not held back"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_gate_that_is_shut_never_lets_the_process_run(runtime: Runtime, when: str) -> None:
    gate = Gate(ID, runtime.gates)
    gate.make()
    if when == "before":
        gate.shut()
    started = runtime.call(*CALL)
    if when == "after":
        wait_until(lambda: gate.waiting, "the start does not come to its gate", 10)
        gate.shut()
    _, said = started.communicate(timeout=10)
    assert started.returncode == 1
    assert "does not run" in said
    assert runtime.ran == []
    assert left_gates(runtime.gates) == [ID], "shut, and still there"


def test_an_agent_that_dies_takes_the_start_with_it(runtime: Runtime) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, ID, str(runtime.gates)], stdout=subprocess.PIPE, text=True)
    runtime.running.append(holder)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "made\n"
    started = runtime.call(*CALL)
    wait_until(lambda: Gate(ID, runtime.gates).waiting, "the start does not come to its gate", 10)
    assert started.poll() is None
    holder.kill()
    assert started.wait(10) == 1
    late = runtime.call(*CALL)
    assert late.wait(10) == 1, "nobody is left who could open it"
    assert runtime.ran == []


def test_other_containers_and_other_calls_do_not_wait(runtime: Runtime) -> None:
    Gate(ID, runtime.gates).make()
    other = ["start", "another"]
    assert runtime.call(*other).wait(10) == 0
    assert runtime.call("state", ID).wait(10) == 0
    assert runtime.call("delete", "--force", ID).wait(10) == 0
    assert runtime.ran == ["start another", f"state {ID}", f"delete --force {ID}"]


def test_an_id_that_is_a_path_leads_to_no_gate(runtime: Runtime) -> None:
    Gate(ID, runtime.gates).make()
    assert runtime.call("start", f"../gates/{ID}").wait(10) == 0


# --- what cannot be warm ---------------------------------------------------------------------------


def config(*mounts: tuple[str, tuple[str, ...]], cwd: str = "/") -> OciConfig:
    return OciConfig(OciProcess(cwd=cwd), tuple(OciMount(place, options) for place, options in mounts))


def test_plain_mounts_can_be_put_into_a_waiting_container() -> None:
    found = config(("/proc", ()), ("/data", ("rbind", "rw")), ("/etc/hosts", ("rbind",)))
    assert why_not(found, ["/data"], "x86_64") == ""


@pytest.mark.parametrize(
    ("found", "machine", "words"),
    [
        (config(("/data", ("rshared",))), "x86_64", "propagate"),
        (config(("/data", ()), ("/data/sub", ())), "x86_64", "/data/sub is mounted inside"),
        (config(("/else", ())), "x86_64", "no mount at /data"),
        (config(("/data", ()), cwd="/data/home"), "aarch64", "working directory"),
    ],
)
def test_what_cannot_be_put_in_is_named(found: OciConfig, machine: str, words: str) -> None:
    assert words in why_not(found, ["/data"], machine)


def test_the_bundle_of_runc_is_read(tmp_path: Path) -> None:
    bundle = {
        "ociVersion": "1.0",
        "process": {"cwd": "/data", "args": ["x"]},
        "mounts": [{"destination": "/data", "type": "bind", "source": "/s", "options": ["ro"]}, {"destination": "/p"}],
    }
    (tmp_path / "config.json").write_text(json.dumps(bundle))
    found = read_config(tmp_path)
    assert found.process.cwd == "/data"
    assert found.mounts[0] == OciMount("/data", ("ro",))


# --- installation ----------------------------------------------------------------------------------


def run(verb: str, place: Path, *more: str) -> int:
    return install.main(
        [verb, *more, "--place", str(place / "libexec/cargo-runc"), "--configuration", str(place / "docker/daemon.json"),
         "--pid-file", str(place / "none"), "--socket", str(place / "docker.sock")]
    )  # fmt: skip


def test_the_installation_keeps_everything_else_in_dockerds_configuration(tmp_path: Path) -> None:
    configuration = tmp_path / "docker/daemon.json"
    configuration.parent.mkdir()
    before = {"live-restore": True, "runtimes": {"kata": {"path": "/kata"}}}
    configuration.write_text(json.dumps(before))
    for _ in range(2):
        assert run("install", tmp_path) == 0
    installed = json.loads(configuration.read_text())
    wrapper = tmp_path / "libexec/cargo-runc"
    assert installed == {**before, "runtimes": {"kata": {"path": "/kata"}, "cargo": {"path": str(wrapper)}}}
    assert os.access(wrapper, os.X_OK)
    assert run("remove", tmp_path) == 1, "whether containers need it is not known while Docker does not answer"
    assert json.loads(configuration.read_text()) == installed
    for _ in range(2):
        assert run("remove", tmp_path, "--force") == 0
    assert json.loads(configuration.read_text()) == before
    assert not wrapper.exists()


def test_a_configuration_without_other_runtimes_says_that_there_are_none(tmp_path: Path) -> None:
    """Else dockerd would keep at its reload what it knew."""
    assert run("install", tmp_path) == 0
    assert run("remove", tmp_path, "--force") == 0
    assert json.loads((tmp_path / "docker/daemon.json").read_text()) == {"runtimes": {}}


def test_a_runtime_that_is_not_where_docker_was_told_is_none(tmp_path: Path) -> None:
    """F8: a container made with it would not start."""
    there = tmp_path / "runc"
    there.write_text("")
    there.chmod(0o755)
    assert [_is_there({"path": path}) for path in (str(there), "runc", str(tmp_path / "gone"))] == [True, True, False]
    assert _is_there({})
    assert _is_there(None)


def test_a_configuration_that_cannot_be_read_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configuration = tmp_path / "docker/daemon.json"
    configuration.parent.mkdir()
    configuration.write_text("{ broken")
    assert run("install", tmp_path) == 1
    assert configuration.read_text() == "{ broken"
    assert "as it was" in capsys.readouterr().err


@pytest.mark.parametrize("mine", [True, False])
def test_a_process_that_the_killed_runtime_left_at_its_gate_is_ended_and_no_other(tmp_path: Path, mine: bool) -> None:
    """A12: it has run nothing; a number that another process has by now is not its own."""
    cgroup = Path("/proc/self/cgroup").read_text().strip()
    process = subprocess.Popen(["sleep", "1000"])
    try:
        # The container's name is in the path of its control group.
        gate = Gate(cgroup[:2] if mine else ID, tmp_path / "gates")
        gate.end_process()
        gate.make()
        gate.end_process()
        (tmp_path / "init.pid").write_text(str(process.pid))
        (gate.directory / "pidfile").write_text(f"{tmp_path / 'init.pid'}\n")
        gate.end_process()
        assert (process.poll() is None) is not mine
        (tmp_path / "init.pid").unlink()
        gate.end_process()
    finally:
        process.kill()
        process.wait()


def test_a_process_that_docker_has_forgotten_is_ended_before_the_next_one_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A12, P1: a Docker that was killed right after the start does not know of it."""
    mine, other = (subprocess.Popen(["sleep", "1000"]) for _ in range(2))
    try:
        groups = {mine.pid: f"0::/docker/{ID}", other.pid: "0::/docker/another"}
        monkeypatch.setattr(mounts, "_process_ids", lambda: list(groups))
        monkeypatch.setattr(mounts, "is_of", lambda container_id, pid: container_id in groups[pid])
        end_forgotten(ID)
        assert (mine.poll() is None, other.poll() is None) == (False, True)
        end_forgotten(ID)
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
