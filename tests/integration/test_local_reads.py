"""What has arrived is read by the kernel itself: with the lower layer's server stopped, and exactly as through it."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from events.errors import PermanentError
from hostd import local_reads, mounts
from hostd.federation import Union
from hostd.lower_process import LowerProcess
from tests.support.unions import Stand, differences, snapshot, wait_for

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

NAMES = ("first", "second", "d/third", "d/fourth", "d/e/fifth")
SIZE = 300_000
JOIN_SECONDS = 30


def contents(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


def plant(tree: Path) -> None:
    (tree / "d" / "e").mkdir(parents=True)
    for name in NAMES:
        (tree / name).write_bytes(b"old")
    os.link(tree / "first", tree / "linked")


def federated(stand: Stand) -> None:
    """A union under which ``NAMES`` have their contents on the source; one of them has two names."""
    before = stand.begin(plant)
    for name in NAMES:
        (stand.source / name).write_bytes(contents(name))
    stand.cut_over(before)
    assert len(stand.union.fill_list()) == len(NAMES)


def reads_by_itself(stand: Stand) -> bool:
    record = mounts.mount_at(stand.place)
    assert record is not None
    return local_reads.LocalReads.used_by(record.options)


def filled(stand: Stand) -> None:
    while stand.fill():
        pass


@contextlib.contextmanager
def stopped_server(stand: Stand) -> Iterator[None]:
    """Nobody gets an answer from it meanwhile. Both of its processes: one would replace the other."""
    pids = stand.union._lower.processes()
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


class Work(threading.Thread):
    """Somebody in the container, who may hang."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self._work()
        except OSError as error:
            self.outcome = error

    def result(self) -> Any:
        self.join(JOIN_SECONDS)
        assert not self.is_alive(), "it still waits"
        return self.outcome


def read_all(stand: Stand) -> dict[str, bytes]:
    return {name: (stand.place / name).read_bytes() for name in NAMES}


ALL = {name: contents(name) for name in NAMES}


# --- what has arrived ------------------------------------------------------------------------------------


def test_what_has_arrived_is_read_without_the_server(stand: Stand) -> None:
    """Steady state after the release: though some were read, and all were looked at, before they came."""
    federated(stand)
    assert reads_by_itself(stand)
    for name in ("first", "d/third"):
        assert (stand.place / name).read_bytes() == ALL[name]
    assert [(stand.place / name).stat().st_size for name in NAMES] == [SIZE] * len(NAMES)
    filled(stand)
    stand.union.detach_remote()
    with stopped_server(stand):
        assert Work(lambda: read_all(stand)).result() == ALL
        assert Work(lambda: subprocess.run(["du", "-s", stand.place], check=True).returncode).result() == 0
    assert differences(stand.source, stand.place) == []


def test_looking_and_listing_never_concern_the_server(stand: Stand) -> None:
    """Also before anything has come, and in a directory that was moved."""
    federated(stand)

    def look() -> list[int]:
        os.rename(stand.place / "d", stand.place / "elsewhere")
        return [(stand.place / name).stat().st_size for name in ("first", "second", "elsewhere/e/fifth")]

    with stopped_server(stand):
        assert Work(look).result() == [SIZE, SIZE, SIZE]
    assert (stand.place / "elsewhere" / "e" / "fifth").read_bytes() == ALL["d/e/fifth"]
    filled(stand)
    with stopped_server(stand):
        assert Work((stand.place / "elsewhere" / "third").read_bytes).result() == ALL["d/third"]


def test_what_has_not_arrived_comes_from_the_source_and_waits_for_the_server(stand: Stand) -> None:
    federated(stand)
    stand.fill(limit=2)
    missing = {os.fsdecode(path) for path in stand.union.fill_list()}
    assert len(missing) == 3
    with stopped_server(stand):
        for name in set(NAMES) - missing:
            assert Work((stand.place / name).read_bytes).result() == ALL[name]
        waiting = {name: Work((stand.place / name).read_bytes) for name in missing}
        assert all(reader.is_alive() for reader in waiting.values())
    assert {name: reader.result() for name, reader in waiting.items()} == {name: ALL[name] for name in missing}


def test_a_file_held_open_since_before_it_came_goes_on_and_whoever_opens_it_anew_does_without_the_server(
    stand: Stand,
) -> None:
    federated(stand)
    with (stand.place / "first").open("rb", buffering=0) as before:
        assert before.read(1000) == ALL["first"][:1000]
        filled(stand)
        stand.union.detach_remote()
        stand.source.rename(stand.base / "gone")
        assert before.readall() == ALL["first"][1000:]
        assert (stand.place / "linked").read_bytes() == ALL["first"]
    stand.union.let_go_of_server()
    with stopped_server(stand):
        assert Work((stand.place / "linked").read_bytes).result() == ALL["first"]


@pytest.mark.parametrize("come", [False, True])
def test_a_first_touch_of_any_kind_has_its_ordinary_effect(stand: Stand, *, come: bool) -> None:
    """D15, D16: writing, cutting, mapping and linking as the first thing that ever happens to a file."""
    federated(stand)
    if come:
        filled(stand)
        stand.union.detach_remote()
        stand.source.rename(stand.base / "gone")
    place = stand.place

    def touch() -> None:
        with (place / "first").open("r+b") as file:
            file.seek(SIZE - 1)
            file.write(b"!")
        os.truncate(place / "second", 1000)
        with (place / "d" / "third").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            assert view[:] == ALL["d/third"]
        os.link(place / "d" / "fourth", place / "again")
        (place / "d" / "e" / "fifth").open("wb").close()

    with stopped_server(stand) if come else contextlib.nullcontext():
        Work(touch).result()
    assert (place / "linked").read_bytes() == ALL["first"][:-1] + b"!"
    assert (place / "second").read_bytes() == ALL["second"][:1000]
    assert (place / "again").read_bytes() == ALL["d/fourth"]
    assert (place / "d" / "e" / "fifth").read_bytes() == b""
    expected = snapshot(place)
    if come:
        stand.finish()
        assert differences(expected, place) == []


def test_the_names_of_one_file_stay_one_file_whenever_each_is_looked_at(stand: Stand) -> None:
    """D17: one name before its contents came, the other after, one held open meanwhile, then written through either."""
    federated(stand)
    one, other = stand.place / "first", stand.place / "linked"
    with one.open("rb") as held:
        numbers = [os.fstat(held.fileno()).st_ino]
        filled(stand)  # and with it the kernel gave up what nobody holds
        numbers += [other.stat().st_ino, one.stat().st_ino]
        assert other.read_bytes() == ALL["first"]
        with other.open("ab") as file:
            file.write(b"!")
        numbers += [other.stat().st_ino, one.stat().st_ino]
        assert one.read_bytes() == ALL["first"] + b"!"
    stand.union.let_go_of_server()
    numbers += [one.stat().st_ino, other.stat().st_ino]
    assert one.stat().st_nlink == 2
    stand.union.detach_remote()
    stand.finish()
    numbers.append(other.stat().st_ino)
    assert one.stat().st_nlink == 2
    assert len(set(numbers)) == 1


# --- what is not admitted --------------------------------------------------------------------------------


def test_only_a_whole_file_is_shown(stand: Stand) -> None:
    """Half of one in the replica, and one of another size, are the server's business, who asks the source."""
    federated(stand)
    (stand.union.replica / "first").write_bytes(ALL["first"][:1000])
    (stand.union.replica / "second").write_bytes(ALL["second"] + b"more")
    assert stand.union.admit() == 0
    assert read_all(stand) == ALL
    shutil.copyfile(stand.source / "first", stand.union.replica / "first")
    assert stand.union.admit() == 1
    assert stand.union.admit() == 0
    assert read_all(stand) == ALL


# --- mounted again, and where it cannot be ----------------------------------------------------------------


def take_down(stand: Stand) -> None:
    """As a reboot leaves it."""
    mounts.unmount(stand.place)
    mounts.unmount(stand.union.stage / "merged")
    identity = stand.union._overlay_name.removeprefix("cargo-union-")
    LowerProcess(stand.union.stage, f"cargo-lower-{identity}").end()
    wait_for(lambda: not mounts.is_mounted(stand.union.stage / "lower"))
    stand.link.transport.unmount_remote(stand.union.remote)


def test_after_a_reboot_it_is_mounted_the_same_way(stand: Stand) -> None:
    """A11: half of it has come by then, and the server has a list of its own to learn first."""
    federated(stand)
    stand.fill(limit=3)
    missing = {os.fsdecode(path) for path in stand.union.fill_list()}
    take_down(stand)
    stand.union = Union(stand.union.stage, stand.place)
    stand.union.mount_lower()
    stand.union.mount_merged()
    assert reads_by_itself(stand)
    with stopped_server(stand):
        for name in set(NAMES) - missing:
            assert Work((stand.place / name).read_bytes).result() == ALL[name]
    stand.mount()
    assert read_all(stand) == ALL
    filled(stand)
    stand.union.detach_remote()
    stand.finish()
    assert read_all(stand) == ALL
    assert os.listdir(stand.volume) == ["_data"]


def whole_way(stand: Stand) -> None:
    assert not reads_by_itself(stand)
    assert read_all(stand) == ALL
    filled(stand)
    stand.union.detach_remote()
    assert read_all(stand) == ALL
    stand.finish()
    assert read_all(stand) == ALL
    assert os.listdir(stand.volume) == ["_data"]


def test_a_kernel_that_cannot_goes_the_other_way(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_reads, "possible", lambda *_: False)
    federated(stand)
    whole_way(stand)


def test_a_kernel_that_cannot_any_more_goes_the_other_way(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has come up with an older one."""
    real = mounts.mount

    def mount(kind: str, source: str, target: Path | str, options: str, **more: Any) -> None:
        if "::" in options and target == "merged" and (more["working_directory"] / "created").exists():
            raise PermanentError("overlay could not be mounted on merged: invalid argument")
        real(kind, source, target, options, **more)

    monkeypatch.setattr(mounts, "mount", mount)
    federated(stand)
    whole_way(stand)


def test_without_room_for_the_further_names_there_is_still_a_union(stand: Stand) -> None:
    """D9: a file system with few inodes left."""
    mounts.mount("tmpfs", "none", stand.volume, "size=50m")
    before = stand.begin(plant)
    for name in NAMES:
        (stand.source / name).write_bytes(contents(name))
    stand.union.attach_remote(stand.link.transport, stand.link.sshd.peer, str(stand.source))
    used = os.statvfs(stand.volume)
    entries = len(NAMES) + 6  # what the placeholders, the list, and the old versions need
    subprocess.run(
        ["mount", "-o", f"remount,nr_inodes={used.f_files - used.f_ffree + entries}", str(stand.volume)], check=True
    )
    stand.cut_over(before)
    subprocess.run(["mount", "-o", "remount,nr_inodes=10000", str(stand.volume)], check=True)
    whole_way(stand)
