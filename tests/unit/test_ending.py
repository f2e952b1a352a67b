"""A stop that is over when the processes are gone, on real processes and an engine that takes its time."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from events.errors import TransientError
from hostd.engine_containers import ContainerCalls
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
        self.running = True
        self.kills = True
        self.noticed = threading.Event()
        self.asked = threading.Event()

    def _call(self, method: str, path: str, *names: str, what: str, **_options: Any) -> Any:
        if path.endswith("/stop"):
            self.asked.set()
            if self.kills:
                self.process.terminate()
            self.noticed.wait()
            if not self.kills:
                raise TransientError(what)
            self.running = False
            return None
        raw = container()
        raw["State"] = {"Running": self.running, "Pid": self.process.pid, "ExitCode": 0 if self.running else 7}
        raw["HostConfig"]["PidMode"] = self.pid_mode
        return raw


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """The first process of a container, as its control groups say."""
    with subprocess.Popen(["sleep", "1000"]) as started:
        (tmp_path / f"{started.pid}").write_text(f"0::/docker/{ID}\n")
        monkeypatch.setattr("hostd.ending.CGROUPS", str(tmp_path) + "/{pid}")
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


def test_without_a_pid_namespace_of_its_own_docker_has_the_last_word(process: subprocess.Popen[bytes]) -> None:
    """P3: the first process may end before the others."""
    engine = SlowEngine(process, pid_mode="host")
    engine.noticed.set()
    ended = engine.stop_early(ID)
    assert ended is not None
    assert not engine.ending


def test_a_process_that_is_not_the_containers_says_nothing(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (tmp_path / str(process.pid)).write_text("0::/docker/another\n")
    engine = SlowEngine(process)
    engine.noticed.set()
    assert engine.stop_early(ID) is not None
    assert not engine.ending


def test_a_stop_that_docker_could_not_carry_out_is_told(process: subprocess.Popen[bytes]) -> None:
    engine = SlowEngine(process)
    engine.kills = False
    engine.noticed.set()
    with pytest.raises(TransientError, match="still runs"):
        engine.stop_early(ID)
    assert process.poll() is None
