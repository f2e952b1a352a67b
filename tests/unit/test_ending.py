"""A stop that is over when the processes are gone, on real processes and an engine that takes its time."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inotify_simple import INotify, flags

from events.errors import TransientError
from hostd.ending import watch_container
from hostd.engine_containers import ContainerCalls
from labkit.waiting import wait_until
from tests.support.inspected import container

ID = str(container()["Id"])


class SlowEngine(ContainerCalls):
    """Kills the container's process at a stop, and takes note of it when it is told to."""

    timeout_seconds = 60.0

    def __init__(self, process: subprocess.Popen[bytes], pid_mode: str = "") -> None:
        self.starting = set()
        self.ending = {}
        self.process = process
        self.pid_mode = pid_mode
        self.runtime = "runc"
        self.running = True
        self.kills = True
        self.tells = True
        self.noticed = threading.Event()
        self.asked = threading.Event()

    def _call(self, method: str, path: str, *names: str, what: str, **_options: Any) -> Any:
        if path.endswith("/stop"):
            self.asked.set()
            if self.kills:
                self.process.terminate()
                if self.tells and ID in self.ending:
                    self.ending[ID].told()
            self.noticed.wait()
            if not self.kills:
                raise TransientError(what)
            self.running = False
            return None
        raw = container()
        raw["State"] = {"Running": self.running, "Pid": self.process.pid, "ExitCode": 0 if self.running else 7}
        raw["HostConfig"]["PidMode"] = self.pid_mode
        raw["HostConfig"]["Runtime"] = self.runtime
        return raw


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """The first process of a container, as its control groups and its pid namespace say."""
    with subprocess.Popen(["sleep", "1000"]) as started:
        seen = tmp_path / f"{started.pid}"
        seen.mkdir()
        (seen / "cgroup").write_text(f"0::/docker/{ID}\n")
        (seen / "status").write_text(f"Name:\tsleep\nNSpid:\t{started.pid}\t1\n")
        monkeypatch.setattr("hostd.ending.PROC", tmp_path)
        try:
            yield started
        finally:
            started.kill()


def test_a_stop_is_over_when_the_process_is_gone_and_who_looks_then_waits_for_docker(
    process: subprocess.Popen[bytes],
) -> None:
    """P3: nobody is told that a container runs whose processes have ended."""
    engine = SlowEngine(process)
    assert engine.stop_early(ID) is None
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    assert engine.running, "Docker has not noticed"
    seen: list[Any] = []
    looking = threading.Thread(target=lambda: seen.append(engine.pid(ID)))
    looking.start()
    assert seen == []
    engine.noticed.set()
    looking.join()
    assert seen == [None]
    ended = engine.wait_exit(ID, 0)
    assert ended is not None
    assert ended.exit_code == 7
    assert engine.stop_early(ID) == ended


def test_the_stop_is_not_over_before_docker_has_told_of_the_death(process: subprocess.Popen[bytes]) -> None:
    """P1: in the events of both hosts, too, the container never runs twice."""
    engine = SlowEngine(process)
    engine.tells = False
    ended: list[Any] = []
    stopping = threading.Thread(target=lambda: ended.append(engine.stop_early(ID)))
    stopping.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    stopping.join(0.05)
    assert ended == []
    engine.ending[ID].told()
    stopping.join()
    assert ended == [None]
    engine.noticed.set()


def test_where_nobody_hears_of_the_death_the_answer_is_waited_for(process: subprocess.Popen[bytes]) -> None:
    engine = SlowEngine(process)
    engine.tells = False
    engine.noticed.set()
    assert engine.stop_early(ID) is not None


def test_without_a_pid_namespace_of_its_own_docker_has_the_last_word(process: subprocess.Popen[bytes]) -> None:
    """P3: the first process may end before the others."""
    engine = SlowEngine(process, pid_mode="host")
    engine.noticed.set()
    ended = engine.stop_early(ID)
    assert ended is not None
    assert not engine.ending


def test_a_runtime_with_processes_outside_of_the_container_has_its_end_told_by_docker(
    process: subprocess.Popen[bytes],
) -> None:
    """P3: a sandbox's file server may still write."""
    engine = SlowEngine(process)
    engine.runtime = "runsc"
    engine.noticed.set()
    assert engine.stop_early(ID) is not None
    assert not engine.ending


@pytest.mark.parametrize(
    ("file", "words"),
    [
        pytest.param("cgroup", "0::/docker/another\n", id="of another container"),
        pytest.param("status", "NSpid:\t500\t7\n", id="not the first"),
        pytest.param("status", "NSpid:\t1\n", id="of no namespace beneath ours"),
        pytest.param("status", "Name:\tsleep\n", id="of an unknown namespace"),
    ],
)
def test_a_process_that_is_not_the_containers_first_says_nothing(
    process: subprocess.Popen[bytes], tmp_path: Path, file: str, words: str
) -> None:
    """P3: its number may have been given away, or mean another one to Docker."""
    (tmp_path / str(process.pid) / file).write_text(words)
    engine = SlowEngine(process)
    engine.noticed.set()
    assert engine.stop_early(ID) is not None
    assert not engine.ending


def test_while_docker_does_not_take_note_of_the_end_nobody_learns_that_the_container_runs(
    process: subprocess.Popen[bytes],
) -> None:
    """P1: it is neither taken for running nor started; who looks is told to look again."""
    engine = SlowEngine(process)
    assert engine.stop_early(ID) is None
    engine.timeout_seconds = 0.01
    with pytest.raises(TransientError, match="has not taken note"):
        engine.inspect(ID)
    engine.timeout_seconds = 60.0
    engine.noticed.set()
    assert engine.pid(ID) is None


def test_a_stop_that_docker_could_not_carry_out_is_told(process: subprocess.Popen[bytes]) -> None:
    engine = SlowEngine(process)
    engine.kills = False
    engine.noticed.set()
    with pytest.raises(TransientError, match="still runs"):
        engine.stop_early(ID)
    assert process.poll() is None


@pytest.mark.root
def test_when_the_end_is_seen_all_processes_have_gone_and_every_file_was_closed(tmp_path: Path) -> None:
    """P3: also those that ignore signals and are not the first one's children; the tracker has heard of their files."""
    trees = tmp_path / "tree"
    trees.mkdir()
    other = "trap : TERM INT HUP; exec 3>>tree/$1; echo ready >> said; while :; do sleep 1000; done"
    (tmp_path / "other").write_text(other)
    script = "for n in 1 2 3 4 5; do (setsid sh other $n &) ; done; exec sleep 1000"
    with (
        INotify() as heard,
        subprocess.Popen(["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script], cwd=tmp_path) as outer,
    ):
        heard.add_watch(trees, flags.CLOSE_WRITE)
        try:
            said = tmp_path / "said"
            wait_until(lambda: said.exists() and len(said.read_text().split()) == 5, "not all have begun", 20)
            first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
            namespace = os.readlink(f"/proc/{first}/ns/pid")
            inside = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _namespace(pid) == namespace]
            groups = Path(f"/proc/{first}/cgroup").read_text()
            assert watch_container(groups, max(inside)) is None, "not the first"
            process = watch_container(groups, first)
            assert process is not None
            os.kill(first, signal.SIGKILL)
            select.select([process], [], [])
            left = [pid for pid in inside if pid != first and _namespace(pid) == namespace]
            closed = {event.name for event in heard.read(timeout=0)}
            os.close(process)
            assert len(inside) > 5, "the first one itself may wait to be collected"
            assert left == []
            assert closed == {"1", "2", "3", "4", "5"}
        finally:
            outer.kill()


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
