"""The source's side of the remote view by NFS: a real nfs-ganesha, asked by a client in user space (libnfs)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from events.errors import RefusedError
from hostd import mounts
from hostd.nfs_server import NfsServer, share_of
from tests.support.guest import Net

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]


@dataclass
class Stand:
    """A server in a network of its own, in which the client has any address it likes."""

    net: Net
    server: NfsServer
    trees: dict[int, str]
    port: int = 0

    def serve(self) -> int:
        serve: Callable[[], int] = lambda: self.server.serve(  # noqa: E731
            self.trees, client=Net.TARGET, address=Net.SOURCE
        )
        self.port = self.net.within(serve)
        return self.port

    def ask(self, tool: str, path: str, *more: str, user: int = 0) -> subprocess.CompletedProcess[str]:
        """nfs-ls, nfs-cat or nfs-cp about a path of the server, as the host whose address is in force."""
        url = f"nfs://{Net.SOURCE}{path}?version=4&nfsport={self.port}"
        command = [tool, *more, url]
        return self.net.within(
            lambda: subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, user=user)
        )

    def be(self, address: str) -> None:
        """From now on the client's connections come from this address."""
        ip = ["ip", "-n", self.net.name]
        subprocess.run([*ip, "addr", "replace", f"{address}/24", "dev", "tap0"], check=True)
        route = ["route", "replace", "local", Net.SOURCE, "dev", "lo", "src", address, "table", "local"]
        subprocess.run([*ip, *route], check=True)


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    for name in ("tree", "other", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"in {name}")
    (tmp_path / "tree" / "out").symlink_to(tmp_path / "secret" / "file")
    net = Net(f"cargo-nfs-{os.getpid()}")
    made = Stand(net, NfsServer(tmp_path / "own"), {0: str(tmp_path / "tree"), 2: str(tmp_path / "other")})
    try:
        made.be(Net.TARGET)
        yield made
    finally:
        made.server.withdraw()
        net.close()


def test_the_target_reads_the_trees_and_nobody_writes(stand: Stand) -> None:
    stand.serve()
    assert stand.ask("nfs-cat", f"{share_of(0)}/file").stdout == "in tree"
    assert stand.ask("nfs-cat", f"{share_of(2)}/file").stdout == "in other"
    done = stand.ask("nfs-cp", f"{share_of(0)}/intruder", "/etc/hostname")
    assert "ROFS" in done.stderr
    assert sorted(os.listdir(stand.trees[0])) == ["file", "out"]


def test_what_changes_after_it_was_looked_at_is_seen(stand: Stand) -> None:
    """The trees are exported while the container still works; the server must remember nothing."""
    tree = Path(stand.trees[0])
    (tree / "deep").mkdir()
    for name in ("deep/old", "deep/kept"):
        (tree / name).write_text("short")
    stand.serve()
    assert "old" in stand.ask("nfs-ls", f"{share_of(0)}/deep").stdout
    assert stand.ask("nfs-cat", f"{share_of(0)}/deep/kept").stdout == "short"
    assert "NOENT" in stand.ask("nfs-cat", f"{share_of(0)}/deep/new").stderr
    (tree / "deep" / "old").unlink()
    (tree / "deep" / "kept").write_text("much longer than before")
    (tree / "deep" / "new").write_text("new")
    assert stand.ask("nfs-cat", f"{share_of(0)}/deep/new").stdout == "new"
    assert stand.ask("nfs-cat", f"{share_of(0)}/deep/kept").stdout == "much longer than before"
    listed = {line.split()[-1] for line in stand.ask("nfs-ls", f"{share_of(0)}/deep").stdout.splitlines()}
    assert listed == {"kept", "new"}


def test_another_address_is_told_that_there_is_nothing(stand: Stand) -> None:
    stand.serve()
    stand.be(Net.STRANGER)
    for path in (share_of(0), f"{share_of(0)}/file", share_of(2)):
        done = stand.ask("nfs-ls", path)
        assert "NOENT" in done.stderr or "ACCES" in done.stderr, done
        assert "in tree" not in stand.ask("nfs-cat", path).stdout
    assert "cargo" not in stand.ask("nfs-ls", "/").stdout


def test_a_user_of_the_target_without_rights_is_not_served(stand: Stand) -> None:
    """Ownership is what a client says; only root can say it from a privileged port."""
    stand.serve()
    done = stand.ask("nfs-cat", f"{share_of(0)}/file", user=65534)
    assert done.returncode != 0 or "in tree" not in done.stdout


def test_nothing_outside_of_the_trees_is_shown(stand: Stand, tmp_path: Path) -> None:
    stand.serve()
    for path in (f"{share_of(0)}/../secret/file", f"{tmp_path}/secret/file", f"{share_of(1)}/file"):
        assert "in secret" not in stand.ask("nfs-cat", path).stdout
    assert stand.ask("nfs-ls", "/").stdout.count("cargo-") == 2


def test_serving_again_changes_nothing_and_a_server_that_died_comes_back_on_its_port(stand: Stand) -> None:
    """A restart of the agent, a kill and a reboot: the configuration is the record."""
    port = stand.serve()
    [pid] = stand.server.processes()
    assert stand.serve() == port
    assert stand.server.processes() == [pid]
    os.kill(pid, signal.SIGKILL)
    assert mounts.wait_until_gone([pid], timeout_seconds=10) == []
    stand.server = NfsServer(stand.server.directory)
    assert stand.serve() == port
    assert stand.ask("nfs-cat", f"{share_of(0)}/file").stdout == "in tree"


def test_a_second_migration_gets_a_port_and_a_process_of_its_own(stand: Stand, tmp_path: Path) -> None:
    first = stand.serve()
    other = NfsServer(tmp_path / "second")
    try:
        second = stand.net.within(
            lambda: other.serve({0: str(tmp_path / "secret")}, client=Net.STRANGER, address=Net.SOURCE)
        )
        assert second != first
        assert stand.ask("nfs-cat", f"{share_of(0)}/file").stdout == "in tree"
    finally:
        other.withdraw()
    assert stand.ask("nfs-cat", f"{share_of(0)}/file").stdout == "in tree", "the other one is left alone"


def test_what_is_withdrawn_is_gone(stand: Stand) -> None:
    stand.serve()
    stand.server.withdraw()
    stand.server.withdraw()
    assert stand.server.processes() == []
    assert not stand.server.directory.exists()

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((Net.SOURCE, stand.port)) == 0

    assert not stand.net.within(listening)


@pytest.mark.parametrize("name", ['quo"te', "line\nbreak", "dollar$", "back\\slash", "grün"])
def test_a_path_that_could_mean_something_in_the_configuration_is_refused(stand: Stand, name: str) -> None:
    stand.trees = {0: f"/srv/{name}"}
    with pytest.raises(RefusedError, match="ask for remote sshfs"):
        stand.serve()
    assert not stand.server.directory.exists()


def test_a_tree_that_cannot_be_exported_is_refused_in_words(stand: Stand, tmp_path: Path) -> None:
    stand.trees = {0: str(tmp_path / "nothing")}
    with pytest.raises(RefusedError, match="cannot export the data by NFS"):
        stand.serve()
    assert stand.server.processes() == []


def test_a_host_without_the_server_says_what_to_install(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(RefusedError, match="nfs-ganesha-vfs"):
        stand.server.serve(stand.trees, client=Net.TARGET, address=Net.SOURCE)
