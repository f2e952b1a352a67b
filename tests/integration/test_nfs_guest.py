"""The target's side of the remote view by NFS, on a real NFS client: in a guest with a kernel of its own.

The source's side is the product's own server (nfs-ganesha) on this machine; in the guest run the product's mount, union,
lower layer and manifests. Long, because the guest is emulated without help of the processor.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hostd.dirty import everything
from hostd.manifest import walk, write_manifest
from hostd.nfs_server import NfsServer
from labkit.waiting import wait_until
from tests.support.guest import Guest, Net, booted
from tests.support.trees import Grown, felled, grow

pytestmark = [pytest.mark.root, pytest.mark.long, pytest.mark.timeout(2400)]
LARGE_BYTES = 48 * 1024**2
LARGE = {name: bytes([number]) for number, name in enumerate(("large-1", "large-2", "large-3"), 65)}
"""Files that are not read before their test: name, and the byte that fills it."""
SLOW_SECONDS = 400.0


@dataclass
class Stand:
    """A frozen source, its server, and the guest as the target."""

    directory: Path
    net: Net
    guest: Guest
    grown: Grown
    server: NfsServer
    port: int = 0
    at: tuple[str, int] = field(default=("", 0))

    def serve(self) -> None:
        """Also what the source's agent does after it found the server dead."""
        trees = {0: str(self.directory / "tree"), 1: str(self.directory / "papers")}
        self.port = self.net.within(lambda: self.server.serve(trees, client=Net.TARGET, address=Net.SOURCE))
        self.at = (Net.SOURCE, self.port)

    def kill_server(self) -> None:
        for pid in self.server.processes():
            os.kill(pid, signal.SIGKILL)


def change(grown: Grown) -> None:
    """What a container does to its tree while it is exported and before it stops."""
    for path in grown.odd["renamed"] or grown.files[:3]:
        os.unlink(grown.place(path))
    shutil.rmtree(grown.place(b"deep0"), ignore_errors=True)
    for name, byte in LARGE.items():
        (Path(os.fsdecode(grown.tree)) / name).write_bytes(byte * LARGE_BYTES)
    (Path(os.fsdecode(grown.tree)) / "overwritten").write_bytes(b"new contents, of another length")


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    directory = tmp_path_factory.mktemp("guest")
    net = Net(f"cargo-guest-{os.getpid()}")
    server = NfsServer(directory / "server")
    try:
        grown = grow(directory / "tree", 21)
        (directory / "tree" / "overwritten").write_bytes(b"old")
        (directory / "papers").mkdir()
        with booted(directory, net) as guest, felled(directory / "tree"):
            made = Stand(directory, net, guest, grown, server)
            made.serve()
            assert guest.order("peek", *made.at, "overwritten") == 3
            change(grown)
            write_manifest(directory / "papers" / "everything", everything(directory / "tree"))
            write_manifest(directory / "papers" / "digested", walk(directory / "tree", digest=True))
            guest.order("fetch_papers", *made.at)
            yield made
    finally:
        server.withdraw()
        net.close()


def test_the_kernels_client_is_found_and_a_trial_mount_leaves_nothing(stand: Stand) -> None:
    assert stand.guest.order("client_problem") == ""
    assert stand.guest.order("try_export", *stand.at, "/cargo-0") == ""
    assert "/cargo-7" in stand.guest.order("try_export", *stand.at, "/cargo-7")
    assert stand.guest.order("mounted") == []


def test_another_address_cannot_mount_and_nobody_can_write(stand: Stand) -> None:
    assert stand.guest.order("write", *stand.at) in ("Read-only file system", "Permission denied")
    stand.guest.order("address", Net.STRANGER)
    try:
        assert "not exported to this host" in stand.guest.order("try_export", *stand.at, "/cargo-0")
    finally:
        stand.guest.order("address", Net.TARGET)
    assert stand.guest.order("try_export", *stand.at, "/cargo-0") == ""


def test_what_nfs_itself_shows_differs_only_in_what_it_does_not_know(stand: Stand) -> None:
    """P4: names, kinds, owners, modes, contents; the union needs contents only, and has the rest from the manifest."""
    differing = [line for line in stand.guest.order("see", *stand.at) if not line.startswith("xattrs: ")]
    assert differing == []


def test_the_union_over_nfs_shows_exactly_the_sources_tree(stand: Stand) -> None:
    """P4: odd names, all kinds, what was deleted and overwritten while the export was there already."""
    made = stand.guest.order("unite", *stand.at)
    assert made["kind"] == "nfs4"
    assert {"ro", "vers=4.2", "soft"} <= set(made["options"].split(","))
    assert made["placeholders"] > len(LARGE)
    began = [stand.guest.order("begin_read", "overwritten")]
    assert stand.guest.order("end_read", began[0], 60)[:2] == ["read", 31]
    # The large files are left for later: a comparison would bring them into the guest's cache.
    assert stand.guest.order("compare_all_but", list(LARGE)) == []


def test_a_read_waits_for_a_link_that_is_away_and_goes_on_when_it_is_back(stand: Stand) -> None:
    """D14."""
    stand.net.link(up=False)
    number = stand.guest.order("begin_read", "large-1")
    assert stand.guest.order("end_read", number, 20) == [], "it waits"
    assert stand.guest.order("compare_all_but", [*LARGE, "*files"]) == [], "what is local is not held up"
    stand.net.link(up=True)
    assert stand.guest.order("end_read", number, SLOW_SECONDS)[:3] == ["read", LARGE_BYTES, 1]


def test_a_server_that_was_killed_comes_back_and_reads_go_on(stand: Stand) -> None:
    """D14: the source's agent finds it dead; or the source was rebooted."""
    number = stand.guest.order("begin_read", "large-2")
    stand.kill_server()
    assert stand.guest.order("end_read", number, 10) == []
    stand.serve()
    stand.guest.order("attach", *stand.at)
    assert stand.guest.order("end_read", number, SLOW_SECONDS)[:3] == ["read", LARGE_BYTES, 1]


def test_when_the_patience_ends_the_reader_gets_an_error_and_never_wrong_bytes(stand: Stand) -> None:
    """D14: a patience of a minute, as the guest's union has it."""
    stand.net.link(up=False)
    answer = stand.guest.order("end_read", stand.guest.order("begin_read", "large-3"), SLOW_SECONDS)
    stand.net.link(up=True)
    assert answer[:2] == ["error", 5]
    assert "was not to be had from the source for 60 s" in stand.guest.order("log")
    assert stand.guest.order("attach", *stand.at) == ""

    def read_again() -> bool:
        """Within seconds after an error a read of the same file counts as the same one, and waits no second time."""
        answer = stand.guest.order("end_read", stand.guest.order("begin_read", "large-3"), SLOW_SECONDS)
        assert answer[:2] == ["error", 5] or answer[:3] == ["read", LARGE_BYTES, 1], answer
        return bool(answer[0] == "read")

    wait_until(read_again, "large-3 cannot be read although the source is back", SLOW_SECONDS)


def test_once_everything_is_here_the_source_is_let_go_under_open_eyes(stand: Stand) -> None:
    """P4: afterwards the source is off, and everything is still there."""
    assert stand.guest.order("fill") > len(LARGE)
    stand.guest.order("detach")
    assert not [line for line in stand.guest.order("mounted") if line.startswith("nfs")]
    stand.server.withdraw()
    stand.net.link(up=False)
    stand.guest.order("drop_caches")
    assert stand.guest.order("compare") == []
    stand.net.link(up=True)
    stand.serve()


def test_a_source_that_is_dead_does_not_hold_up_whoever_takes_the_view_down(stand: Stand) -> None:
    """D14: rolling back or aborting with the source gone."""
    assert stand.guest.order("attach", *stand.at) == ""
    stand.net.link(up=False)
    assert stand.guest.order("take_down") < 120
    assert stand.guest.order("mounted") == []
    stand.net.link(up=True)
