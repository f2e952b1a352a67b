"""Whether Docker sees what the agent mounts, in namespaces as service managers make them."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from events.errors import TransientError
from hostd import mounts
from hostd.visibility import engine_pid, invisible_mounts

pytestmark = pytest.mark.root


@contextmanager
def process_in(propagation: str) -> Iterator[int]:
    """A process in a mount namespace of its own, which hears of this one's mounts, or does not."""
    command = ["unshare", "--mount", "--propagation", propagation, "sh", "-c", "echo ready; exec cat"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.communicate()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory whose mounts go to other namespaces, whatever those of the machine do."""
    subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
    subprocess.run(["mount", "--make-shared", tmp_path], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_an_engine_that_does_not_see_the_agents_mounts_is_told_from_one_that_does(shared: Path) -> None:
    """O13: a namespace of one's own is no fault by itself; that mounts do not arrive there is one."""
    with process_in("private") as deaf:
        assert "mount namespace of its own" in invisible_mounts(deaf, shared)
    with process_in("slave") as hearing:
        assert invisible_mounts(hearing, shared) == ""
    with process_in("unchanged") as hearing:
        assert invisible_mounts(hearing, shared) == ""
    assert list(shared.iterdir()) == []
    assert [record.point for record in mounts.mounts_below(shared)] == [bytes(shared)]


def test_whoever_listens_on_the_socket_is_asked_and_silence_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with pytest.raises(TransientError, match="does not answer"):
        engine_pid(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        assert mounts.process_name(engine_pid(path)) == mounts.process_name(int(Path("/proc/self").readlink().name))
    assert invisible_mounts(0, tmp_path) == ""
