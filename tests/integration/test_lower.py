"""The lower layer of the union: reads of what has not arrived yet, while everything that can break breaks."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from events.errors import PermanentError
from hostd import mounts
from hostd.federation import Union
from hostd.lower import LOG_FILE
from tests.support.unions import Link, Stand, wait_for

pytestmark = pytest.mark.root

BIG = 24 * 1024 * 1024
JOIN_SECONDS = 60


@pytest.fixture
def link() -> Iterator[Link]:
    """One of its own for each test: some end its server."""
    with Link() as link:
        yield link


@pytest.fixture
def stand(link: Link) -> Stand:
    return Stand(link)


def federate(stand: Stand, files: dict[str, bytes], *, patience_seconds: float = 600) -> None:
    """A union under which exactly these files have their contents on the source."""
    stand.union = Union(stand.union.stage, stand.union.place, patience_seconds=patience_seconds)

    def make(tree: Path) -> None:
        tree.mkdir()
        for name in files:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(b"old")

    before = stand.begin(make)
    for name, contents in files.items():
        (stand.source / name).write_bytes(contents)
    stand.cut_over(before)
    assert len(stand.union.fill_list()) == len(files)


def noise(seed: int, size: int = BIG) -> bytes:
    return random.Random(seed).randbytes(size)


class Reader(threading.Thread):
    """Somebody in the container who reads."""

    def __init__(self, work: Callable[[], bytes]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.data = b""
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.data = self._work()
        except OSError as error:
            self.error = error

    def result(self) -> bytes:
        self.join(JOIN_SECONDS)
        assert not self.is_alive(), "the reader still waits"
        assert self.error is None, self.error
        return self.data


def rest_of(descriptor: int, size: int = BIG) -> bytes:
    """All that follows the first MiB, through a descriptor that is open."""
    pieces, offset = [], 1 << 20
    while offset < size:
        pieces.append(os.pread(descriptor, 1 << 20, offset))
        assert pieces[-1], "the file ended too early"
        offset += len(pieces[-1])
    return b"".join(pieces)


def sshfs_of(stand: Stand) -> list[int]:
    return mounts.processes_with_argument(mounts.resolved(stand.union.remote), program=b"sshfs")


def servers_of(stand: Stand) -> list[int]:
    return stand.union._lower.processes()


def log_of(stand: Stand) -> str:
    return (stand.union.stage / LOG_FILE).read_text()


def kill_sshfs(stand: Stand) -> None:
    pids = sshfs_of(stand)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert mounts.wait_until_gone(pids, timeout_seconds=10) == []


def reattach(stand: Stand) -> None:
    stand.union.attach_remote(stand.link.transport, stand.link.sshd.peer, str(stand.source))


def arrive(stand: Stand, name: str) -> None:
    """One file arrives without the link, as the fill lets it appear."""
    new = stand.union.incoming / "new"
    shutil.copyfile(stand.source / name, new)
    (stand.union.replica / name).parent.mkdir(parents=True, exist_ok=True)
    new.replace(stand.union.replica / name)


def test_a_read_under_way_when_sshfs_is_killed_goes_on_when_the_view_is_back(stand: Stand) -> None:
    """D14, C1: the container's reader waits, and gets the right bytes through the descriptor that it has."""
    federate(stand, {"big": noise(1)})
    descriptor = os.open(stand.place / "big", os.O_RDONLY)
    assert os.pread(descriptor, 1 << 20, 0) == noise(1)[: 1 << 20]
    kill_sshfs(stand)
    reader = Reader(lambda: rest_of(descriptor))
    wait_for(lambda: "readers wait" in log_of(stand))
    assert reader.is_alive()
    reattach(stand)
    assert reader.result() == noise(1)[1 << 20 :]
    os.close(descriptor)
    stand.union.unmount_all()


def test_a_read_under_way_when_the_source_goes_away_goes_on_when_it_returns(stand: Stand) -> None:
    """C1: sshd and its sessions are killed in the middle of a read, and come back."""
    federate(stand, {"big": noise(2)})
    descriptor = os.open(stand.place / "big", os.O_RDONLY)
    assert os.pread(descriptor, 1 << 20, 0) == noise(2)[: 1 << 20]
    stand.link.sshd.stop()
    reader = Reader(lambda: rest_of(descriptor))
    wait_for(lambda: "readers wait" in log_of(stand))
    assert reader.is_alive()
    stand.link.sshd.start()
    reattach(stand)
    assert reader.result() == noise(2)[1 << 20 :]
    os.close(descriptor)


def test_a_source_that_hangs_holds_up_nobody_who_reads_what_is_here(stand: Stand) -> None:
    """C1: 200 readers wait for a silent source; what has arrived is read meanwhile, and they get theirs in the end."""
    files = {f"away/{number}": b"%d " % number * 3000 for number in range(200)}
    federate(stand, {**files, "here": noise(3)})
    arrive(stand, "here")
    stand.link.sshd.freeze()
    readers = {name: Reader((stand.place / name).read_bytes) for name in files}
    wait_for(lambda: "readers wait" in log_of(stand))
    began = time.monotonic()
    assert (stand.place / "here").read_bytes() == noise(3)
    assert time.monotonic() - began < 10
    assert all(reader.is_alive() for reader in readers.values())
    stand.link.sshd.thaw()
    for name, reader in readers.items():
        assert reader.result() == files[name]


def test_a_waiting_reader_goes_on_when_its_file_arrives_though_the_source_hangs(stand: Stand) -> None:
    federate(stand, {"deep/er/big": noise(4)})
    stand.link.sshd.freeze()
    reader = Reader((stand.place / "deep/er/big").read_bytes)
    wait_for(lambda: "readers wait" in log_of(stand))
    arrive(stand, "deep/er/big")
    assert reader.result() == noise(4)
    assert stand.union.replica_complete()
    stand.union.detach_remote()
    assert not mounts.is_mounted(stand.union.remote)
    assert sshfs_of(stand) == []


def test_what_was_opened_before_it_arrived_is_read_on_after_the_link_is_cut(stand: Stand) -> None:
    """Descriptors and mappings that the container has had all along hold nothing of the source."""
    federate(stand, {"big": noise(5), "mapped": noise(6), "never-touched": noise(7)})
    descriptor = os.open(stand.place / "big", os.O_RDONLY)
    untouched = os.open(stand.place / "never-touched", os.O_RDONLY)
    assert os.pread(descriptor, 1 << 20, 0) == noise(5)[: 1 << 20]
    with (stand.place / "mapped").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert mapping[:4096] == noise(6)[:4096]
    stand.fill()
    stand.union.detach_remote()
    stand.source.rename(stand.base / "gone")
    stand.link.sshd.stop()
    assert sshfs_of(stand) == []
    assert mapping[:] == noise(6)
    assert rest_of(descriptor) == noise(5)[1 << 20 :]
    assert os.pread(untouched, BIG, 0) == noise(7)
    mapping.close()
    os.close(descriptor)
    os.close(untouched)


def test_patience_ends_in_an_error_once_and_is_logged(stand: Stand) -> None:
    """C1: bounded. The kernel asks again, page by page, what its read-ahead did not get; that does not add up."""
    federate(stand, {"big": noise(8)}, patience_seconds=2)
    stand.link.sshd.stop()
    kill_sshfs(stand)
    began = time.monotonic()
    reader = Reader((stand.place / "big").read_bytes)
    reader.join(JOIN_SECONDS)
    took = time.monotonic() - began
    assert reader.error is not None
    assert reader.error.errno == errno.EIO
    assert 2 <= took < 10
    assert "was not to be had from the source for 2 s" in log_of(stand)
    stand.link.sshd.start()
    reattach(stand)
    assert (stand.place / "big").read_bytes() == noise(8)


@pytest.mark.parametrize("size", [0, 1000, BIG - 1, BIG + 1])
def test_a_file_of_another_size_on_the_source_is_an_error_and_never_zeros(stand: Stand, size: int) -> None:
    """Invariant 6: what changed after the stop is not the file any more."""
    federate(stand, {"big": noise(9), "good": b"good"})
    os.truncate(stand.source / "big", size)
    reader = Reader((stand.place / "big").read_bytes)
    reader.join(JOIN_SECONDS)
    assert reader.error is not None
    assert reader.error.errno == errno.EIO
    assert f"has {size} bytes on the source, and had {BIG}" in log_of(stand)
    assert (stand.place / "good").read_bytes() == b"good"


def test_a_fifo_or_a_link_in_a_files_place_on_the_source_is_not_followed(stand: Stand) -> None:
    federate(stand, {"a/one": b"one", "two": b"two"}, patience_seconds=1)
    (stand.base / "elsewhere").mkdir()
    (stand.base / "elsewhere" / "one").write_bytes(b"not")
    shutil.rmtree(stand.source / "a")
    (stand.source / "a").symlink_to(stand.base / "elsewhere")
    (stand.source / "two").unlink()
    os.mkfifo(stand.source / "two")
    for name in ("a/one", "two"):
        reader = Reader((stand.place / name).read_bytes)
        reader.join(JOIN_SECONDS)
        assert reader.error is not None
        assert reader.error.errno == errno.EIO


def test_a_view_that_is_not_mounted_is_waited_for(stand: Stand) -> None:
    """The empty mount point is not taken for the source, where the file would be missing."""
    federate(stand, {"file": b"contents"})
    kill_sshfs(stand)
    mounts.unmount(stand.union.remote)
    reader = Reader((stand.place / "file").read_bytes)
    wait_for(lambda: "readers wait" in log_of(stand))
    reattach(stand)
    assert reader.result() == b"contents"


def test_half_a_file_in_the_replica_does_not_count(stand: Stand) -> None:
    federate(stand, {"file": b"contents"})
    (stand.union.replica / "file").write_bytes(b"cont")
    assert (stand.place / "file").read_bytes() == b"contents"


def test_five_thousand_files_of_any_name_are_each_what_they_were(stand: Stand) -> None:
    files = {f"d{number % 50}/\udcff\n{number}": b"%d" % number * (number % 400 + 1) for number in range(5000)}
    federate(stand, files)
    for name, contents in files.items():
        if int(name.rpartition("\n")[2]) % 10 == 0:
            assert (stand.place / name).read_bytes() == contents
    stand.fill()
    stand.union.detach_remote()
    for name, contents in files.items():
        assert (stand.place / name).read_bytes() == contents
    lower = stand.union.stage / "lower"
    assert sum(len(names) for _, _, names in os.walk(lower)) == 5000
    assert (lower / next(iter(files))).stat().st_size == len(next(iter(files.values())))


AGENT = """
import sys, signal
from pathlib import Path
from hostd.federation import Union
union = Union(Path(sys.argv[1]), Path(sys.argv[2]))
union._lower.end()
union.mount_lower()
union.mount_merged()
print("up", flush=True)
signal.pause()
"""


def test_the_server_outlives_the_agent_and_ends_with_the_mount_only(stand: Stand) -> None:
    federate(stand, {"big": noise(10)})
    mounts.unmount(stand.place)
    mounts.unmount(stand.union.stage / "merged")
    command = [sys.executable, "-c", AGENT, str(stand.union.stage), str(stand.union.place)]
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert agent.stdout is not None
    assert agent.stdout.readline() == b"up\n"
    os.killpg(agent.pid, signal.SIGTERM)
    agent.wait()
    agent.stdout.close()
    servers = servers_of(stand)
    for server in servers:
        os.kill(server, signal.SIGTERM)
        os.kill(server, signal.SIGHUP)
    assert (stand.place / "big").read_bytes() == noise(10)
    assert servers_of(stand) == servers
    stand.union.unmount_all()
    assert servers_of(stand) == []
    assert sshfs_of(stand) == []
    assert mounts.mounts_below(stand.base) == []


@pytest.mark.parametrize("who", ["server", "holder"])
def test_readers_notice_nothing_when_one_of_the_two_that_serve_is_killed(stand: Stand, who: str) -> None:
    """A6: what was asked and not answered is answered by the next server, through descriptors and mappings too."""
    federate(stand, {"big": noise(14), "small": noise(15, 5000), "later": noise(16)})
    (stand.place / "written").write_bytes(b"by the container")
    descriptor = os.open(stand.place / "big", os.O_RDONLY)
    assert os.pread(descriptor, 1 << 20, 0) == noise(14)[: 1 << 20]
    stand.link.sshd.freeze()
    waiting = [Reader(lambda: rest_of(descriptor)), Reader((stand.place / "small").read_bytes)]
    wait_for(lambda: "readers wait" in log_of(stand))
    before = servers_of(stand)
    [holder] = [pid for pid in before if parent_of(pid) not in before]
    [server] = [pid for pid in before if pid != holder]
    os.kill({"server": server, "holder": holder}[who], signal.SIGKILL)
    if who == "server":
        wait_for(lambda: "readers wait for the next one" in log_of(stand))
    stand.link.sshd.thaw()
    assert waiting[0].result() == noise(14)[1 << 20 :]
    assert waiting[1].result() == noise(15, 5000)
    assert (stand.place / "later").read_bytes() == noise(16)
    assert (stand.place / "written").read_bytes() == b"by the container"
    os.close(descriptor)
    stand.union.unmount_all()
    assert servers_of(stand) == []


def test_a_server_that_is_killed_again_and_again_never_makes_a_read_fail(stand: Stand) -> None:
    """A6: at any moment: between a question and its answer, and before the first one."""
    files = {f"{number}": noise(100 + number, 300_000) for number in range(120)}
    federate(stand, files)
    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            for pid in servers_of(stand):
                if parent_of(pid) in servers_of(stand):
                    os.kill(pid, signal.SIGKILL)
            over.wait(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        readers = [
            Reader(lambda part=part: b"".join((stand.place / f"{n}").read_bytes() for n in part))
            for part in (range(start, 120, 4) for start in range(4))
        ]
        for start, reader in enumerate(readers):
            assert reader.result() == b"".join(files[f"{number}"] for number in range(start, 120, 4))
    finally:
        over.set()
        killer.join()
    stand.union.unmount_all()
    assert servers_of(stand) == []


def test_when_both_that_serve_are_killed_readers_wait_for_the_agent_who_starts_them_anew(stand: Stand) -> None:
    """A6: the agent keeps the file system's descriptor too."""
    federate(stand, {"big": noise(17), "arrived": b"arrived"})
    # The kernel has learnt by now that closing a file needs no answer. Here reader and agent are one process, and a
    # child of it, which is to be the new server, closes what the reader has open.
    assert (stand.place / "arrived").read_bytes() == b"arrived"
    stand.link.sshd.freeze()
    waiting = Reader((stand.place / "big").read_bytes)
    wait_for(lambda: "readers wait" in log_of(stand))
    kill_servers(stand)
    other = Reader((stand.place / "arrived").read_bytes)
    assert stand.union.keep_served(), "it was started anew"
    assert stand.union.serves()
    stand.link.sshd.thaw()
    assert waiting.result() == noise(17)
    assert other.result() == b"arrived"
    assert not stand.union.keep_served()
    assert len(servers_of(stand)) == 2
    stand.union.unmount_all()
    assert servers_of(stand) == []
    assert mounts.mounts_below(stand.base) == []


def parent_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(status.rpartition(b")")[2].split()[1])


def kill_servers(stand: Stand) -> None:
    before = servers_of(stand)
    for pid in sorted(before, key=lambda pid: parent_of(pid) in before):  # who would start another one first
        os.kill(pid, signal.SIGKILL)
    assert mounts.wait_until_gone(before, timeout_seconds=10) == []
    assert servers_of(stand) == []


def test_a_union_that_nobody_serves_or_keeps_is_an_error_until_it_is_mounted_again(stand: Stand) -> None:
    """A6: never wrong data; and what the container wrote is there afterwards."""
    federate(stand, {"file": b"contents", "arrived": b"arrived"})
    (stand.place / "written").write_bytes(b"by the container")
    arrive(stand, "arrived")
    stand.union._lower._let_go()  # as if the agent had been killed as well
    kill_servers(stand)
    assert not stand.union.keep_served()
    assert not stand.union.serves()
    with pytest.raises(OSError):
        (stand.place / "file").read_bytes()
    stand.mount()
    assert stand.union.serves()
    assert (stand.place / "file").read_bytes() == b"contents"
    assert (stand.place / "arrived").read_bytes() == b"arrived"
    assert (stand.place / "written").read_bytes() == b"by the container"


def test_the_server_ends_by_itself_when_a_person_unmounts_it(stand: Stand) -> None:
    federate(stand, {"file": b"contents"})
    servers = servers_of(stand)
    for point in (stand.place, stand.union.stage / "merged", stand.union.stage / "lower"):
        mounts.unmount(point)
    assert mounts.wait_until_gone(servers, timeout_seconds=10) == []


def test_a_union_comes_down_at_once_though_reads_of_a_silent_source_are_under_way(stand: Stand) -> None:
    """A reader that was killed leaves its read-ahead behind, which must not hold the unmount up."""
    federate(stand, {"big": noise(11)})
    stand.link.sshd.freeze()
    reader = subprocess.Popen(["cat", "--", str(stand.place / "big")], stdout=subprocess.DEVNULL)
    wait_for(lambda: "readers wait" in log_of(stand))
    reader.kill()
    reader.wait(timeout=JOIN_SECONDS)
    began = time.monotonic()
    stand.union.unmount_all()
    assert time.monotonic() - began < 30
    assert servers_of(stand) == []
    assert sshfs_of(stand) == []


def test_two_unions_at_once_have_a_server_each_and_nothing_in_common(stand: Stand, link: Link) -> None:
    other = Stand(link)
    federate(stand, {"same": noise(12)})
    federate(other, {"same": noise(13)})
    assert servers_of(stand) != servers_of(other)
    kill_sshfs(other)
    waiting = Reader((other.place / "same").read_bytes)
    assert (stand.place / "same").read_bytes() == noise(12)
    stand.union.unmount_all()
    reattach(other)
    assert waiting.result() == noise(13)
    other.union.unmount_all()
    assert servers_of(stand) + servers_of(other) == []


def test_looking_into_the_lower_layer_too_early_does_not_fix_an_old_list(stand: Stand) -> None:
    """postcopy lays placeholders before the stop, and a curious program may walk through the mount."""

    def make(tree: Path) -> None:
        tree.mkdir()
        (tree / "file").write_bytes(b"old")

    before = stand.begin(make)
    (stand.source / "file").write_bytes(b"first")
    stand.cut_over(before)
    for point in (stand.place, stand.union.stage / "merged"):
        mounts.unmount(point)
    assert os.listdir(stand.union.stage / "lower") == ["file"]
    (stand.source / "file").write_bytes(b"second, and longer")
    (stand.source / "more").write_bytes(b"more")
    stand.cut_over(before)
    assert (stand.place / "file").read_bytes() == b"second, and longer"
    assert (stand.place / "more").read_bytes() == b"more"


def test_a_name_whose_contents_nobody_needs_any_more_is_still_there_after_the_cut(stand: Stand) -> None:
    """The kernel asks the lower layer again before a rename over a name, and answers ESTALE if it has gone."""
    federate(stand, {"replaced": b"contents", "other": b"other"})
    (stand.place / "replaced").write_bytes(b"by the container")
    stand.fill()
    stand.union.detach_remote()
    (stand.place / "other").rename(stand.place / "replaced")
    assert (stand.place / "replaced").read_bytes() == b"other"


def test_the_link_is_not_cut_while_contents_are_missing(stand: Stand) -> None:
    federate(stand, {"file": b"contents"})
    with pytest.raises(PermanentError, match="still have their contents on the source"):
        stand.union.detach_remote()
    assert (stand.place / "file").read_bytes() == b"contents"
