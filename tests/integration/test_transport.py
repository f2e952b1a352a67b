"""Real ssh, rsync and sshfs against a private sshd."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from events.errors import CancelledError, PermanentError, TransientError
from events.schema import FileRef
from hostd import mounts
from hostd.manifest import compare, walk
from hostd.resumption import Resumption
from hostd.transport import AuthenticationError, HostKeyError, Peer, Progress, RsyncResult, Transport
from tests.support.sshd import Sshd

pytestmark = pytest.mark.root

ODD = b"we ird'\"$(id)*[a]\\b;\xc3\xa9\xff\n#"
DEADLINE_SECONDS = 20.0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def shows(file: Path, contents: str) -> bool:
    """Whether the file can be read, and has these contents."""
    try:
        return file.read_text() == contents
    except OSError:
        return False


class Place:
    """A private directory, an sshd and a transport."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sshd = Sshd(directory / "sshd").start()
        self.transport = Transport(directory / "run")
        self.source = directory / "source"
        self.target = directory / "target"
        self.incoming = directory / "incoming"
        for made in (self.source, self.target, self.incoming):
            made.mkdir()

    @property
    def peer(self) -> Peer:
        return self.sshd.peer

    def view_of_a_file(self) -> Path:
        """Where the source, with a ``file`` in it, is looked at from now on."""
        mountpoint = self.directory / "remote"
        mountpoint.mkdir()
        (self.source / "file").write_text("here")
        self.transport.mount_remote(self.peer, str(self.source), mountpoint)
        return mountpoint

    def ssh_processes(self) -> list[int]:
        run_dir = os.fsencode(self.directory / "run")
        return [
            pid
            for program in (b"ssh", b"rsync", b"sshfs", b"setpriv")
            for pid in mounts.processes_with_argument(run_dir, program=program)
        ]

    def close(self) -> None:
        for record in reversed(mounts.mounts_below(self.directory)):
            self.sshd.thaw()
            mounts.unmount(record.point)
        self.transport.close()
        self.sshd.stop()
        shutil.rmtree(os.fsencode(self.directory))


@pytest.fixture
def place() -> Iterator[Place]:
    here = Place(Path(tempfile.mkdtemp(prefix="cargo-t-", dir="/tmp")))
    try:
        yield here
    finally:
        here.close()


def test_one_connection_is_shared_and_nothing_is_left_when_closed(place: Place) -> None:
    place.transport.check(place.peer)
    place.transport.check(place.peer)
    assert len(place.ssh_processes()) == 1
    place.transport.close()
    wait_for(lambda: not place.ssh_processes())


def test_whoever_waits_for_anothers_connecting_can_be_told_to_stop(place: Place) -> None:
    """C1: a source that does not answer holds up one of them for half a minute, and an abort must not wait for that."""
    place.sshd.freeze()
    first, second = threading.Event(), threading.Event()
    ended: list[str] = []

    def connect(name: str, cancelled: threading.Event) -> None:
        with contextlib.suppress(CancelledError):
            place.transport.check(place.peer, cancelled=cancelled)
        ended.append(name)

    threads = [
        threading.Thread(target=connect, args=job, daemon=True) for job in (("first", first), ("second", second))
    ]
    try:
        threads[0].start()
        wait_for(lambda: bool(place.ssh_processes()))
        threads[1].start()
        second.set()
        wait_for(lambda: ended == ["second"])
        first.set()
        wait_for(lambda: ended == ["second", "first"])
        assert place.ssh_processes() == []
    finally:
        place.sshd.thaw()


def test_a_connection_is_let_go_once_nothing_goes_through_it(place: Place) -> None:
    """After a release no process refers to the source; another migration's view keeps the connection."""
    view = place.directory / "view"
    view.mkdir()
    place.transport.mount_remote(place.peer, str(place.source), view)
    place.transport.let_go(place.peer)
    assert mounts.processes_with_argument(b"cargo-", program=b"ssh"), "the view goes through it"
    Transport.unmount_remote(view)
    place.transport.let_go(place.peer)
    wait_for(lambda: place.ssh_processes() == [])
    place.transport.check(place.peer)


def test_a_second_life_of_the_agent_takes_over_the_connection_of_the_first(place: Place) -> None:
    """A3: the control socket survives; the new agent uses it, and ends it."""
    place.transport.check(place.peer)
    again = Transport(place.directory / "run")
    again.check(place.peer)
    assert len(place.ssh_processes()) == 1
    again.close()
    wait_for(lambda: not place.ssh_processes())


def test_a_changed_host_key_stops_everything(place: Place) -> None:
    """C8: a security error, from check, rsync and sshfs alike."""
    place.sshd.stop()
    place.sshd.change_host_key()
    place.sshd.start()
    with pytest.raises(HostKeyError, match="SECURITY"):
        place.transport.check(place.peer)
    with pytest.raises(HostKeyError):
        place.transport.rsync_pull(place.peer, os.fsencode(place.source), place.target, temp_dir=place.incoming)
    with pytest.raises(HostKeyError):
        place.transport.mount_remote(place.peer, os.fsencode(place.source), place.target)
    assert not place.ssh_processes()


def test_an_unpinned_host_key_is_refused(place: Place) -> None:
    """C8."""
    place.sshd.known_hosts.write_text("")
    with pytest.raises(HostKeyError, match="no pinned host key"):
        place.transport.check(place.peer)


def test_the_pinned_key_belongs_to_the_name_and_not_to_the_address(place: Place) -> None:
    """C9: the same host is reached at another address without another line in known_hosts."""
    peer = Peer("alpha", "localhost", place.sshd.port, "root", place.sshd.identity, place.sshd.known_hosts)
    place.transport.check(peer)


def test_a_removed_key_is_a_permanent_failure(place: Place) -> None:
    """C7."""
    place.sshd.authorized_keys.write_text("")
    with pytest.raises(AuthenticationError):
        place.transport.check(place.peer)


def test_an_unreachable_host_is_a_transient_failure_and_a_later_check_succeeds(place: Place) -> None:
    """C1."""
    place.sshd.stop()
    with pytest.raises(TransientError):
        place.transport.check(place.peer)
    place.sshd.start()
    place.transport.check(place.peer)


def test_a_broken_master_connection_is_replaced(place: Place) -> None:
    place.transport.check(place.peer)
    place.sshd.stop()
    place.sshd.start()
    wait_for(lambda: not place.ssh_processes())
    place.transport.check(place.peer)
    assert len(place.ssh_processes()) == 1


def test_odd_names_are_data_all_the_way(place: Place) -> None:
    """D19: tree, directories and files with quotes, wildcards, newlines and bytes that are no text."""
    tree = os.fsencode(place.source) + b"/" + ODD
    os.makedirs(tree + b"/" + ODD)
    names = [ODD + b"/" + ODD, b"-dash", b"#hash", b";semicolon", b" ", b"\n"]
    for name in names:
        Path(os.fsdecode(tree + b"/" + name)).write_bytes(name)
    place.transport.rsync_pull(
        place.peer, tree, place.target, temp_dir=place.incoming, files_from=[ODD, *names], live=False
    )
    target = os.fsencode(place.target)
    for name in names:
        assert Path(os.fsdecode(target + b"/" + name)).read_bytes() == name
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    place.transport.mount_remote(place.peer, tree, mountpoint)
    assert sorted(os.listdir(os.fsencode(mountpoint))) == sorted(os.listdir(tree))
    place.transport.unmount_remote(mountpoint)


def test_a_tree_arrives_with_everything_that_a_file_has(place: Place) -> None:
    """D15, D16, D17, D18: links, holes, attributes, ACLs, capabilities, devices and pipes."""
    file = place.source / "file"
    file.write_bytes(b"x" * 5000)
    os.link(file, place.source / "link")
    os.setxattr(file, "user.colour", b"blue")
    subprocess.run(["setfacl", "-m", "u:1234:r", file], check=True)
    subprocess.run(["setcap", "cap_net_raw+ep", file], check=True)
    os.mknod(place.source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(place.source / "pipe")
    with (place.source / "holes").open("wb") as holes:
        holes.truncate(10_000_000)
        holes.write(b"start")
    os.utime(file, ns=(1, 1_234_567_890_123_456_789))
    seen: list[Progress] = []
    result = place.transport.rsync_pull(
        place.peer, str(place.source), place.target, temp_dir=place.incoming, on_progress=seen.append
    )
    assert result.files == 2
    assert result.literal_bytes >= 5000
    assert seen and seen[-1].files == 2
    arrived = place.target / "file"
    assert arrived.stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert arrived.stat().st_ino == (place.target / "link").stat().st_ino
    assert {name: os.getxattr(arrived, name) for name in os.listxattr(arrived)} == {
        name: os.getxattr(file, name) for name in os.listxattr(file)
    }
    assert (place.target / "null").stat().st_rdev == os.makedev(1, 3)
    assert stat.S_ISFIFO((place.target / "pipe").lstat().st_mode)
    assert (place.target / "holes").stat().st_blocks * 512 < 1_000_000


def test_overlay_marks_of_the_target_are_neither_carried_nor_stripped(place: Place) -> None:
    os.setxattr(place.target, "trusted.overlay.opaque", b"y")
    (place.source / "sub").mkdir()
    os.setxattr(place.source / "sub", "trusted.overlay.opaque", b"y")
    place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming)
    assert os.getxattr(place.target, "trusted.overlay.opaque") == b"y"
    assert "trusted.overlay.opaque" not in os.listxattr(place.target / "sub")


def test_a_later_round_removes_nothing_but_what_something_else_takes_the_place_of(place: Place) -> None:
    """D11: a file that vanishes after the list was made is in the next one; whoever has a list prunes."""
    for name in ("stays", "goes", "changes"):
        (place.source / name).write_text(name)
    pull = {"temp_dir": place.incoming}
    place.transport.rsync_pull(place.peer, str(place.source), place.target, **pull)
    (place.source / "goes").unlink()
    (place.source / "changes").unlink()
    (place.source / "changes").mkdir()
    (place.target / "kind").mkdir()
    (place.target / "kind" / "inner").touch()
    (place.source / "kind").write_text("a file now")
    place.transport.rsync_pull(
        place.peer, str(place.source), place.target, files_from=[b"goes", b"changes", b"kind"], live=True, **pull
    )
    assert sorted(os.listdir(place.target)) == ["changes", "goes", "kind", "stays"]
    assert (place.target / "changes").is_dir()
    assert (place.target / "kind").read_text() == "a file now"


def test_an_empty_source_never_empties_the_target(place: Place) -> None:
    """D7, D22: an unmounted source looks like an empty directory."""
    (place.target / "precious").write_text("data")
    with pytest.raises(PermanentError, match="may not be mounted"):
        place.transport.rsync_pull(
            place.peer, str(place.source), place.target, temp_dir=place.incoming, expect_entries=1
        )
    with pytest.raises((PermanentError, TransientError)):
        place.transport.rsync_pull(place.peer, str(place.source) + "-gone", place.target, temp_dir=place.incoming)
    assert (place.target / "precious").read_text() == "data"


def test_an_empty_source_is_noticed_also_where_nothing_has_arrived_yet(place: Place) -> None:
    """D7, D22: a first round deletes nothing, but what it brings would be taken for all there is."""
    with pytest.raises(PermanentError, match="has 0 entries where at least 1"):
        place.transport.rsync_pull(
            place.peer, str(place.source), place.target, temp_dir=place.incoming, expect_entries=1
        )
    (place.source / "there").touch()
    place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming, expect_entries=1)
    assert (place.target / "there").exists()


def test_a_source_of_which_everything_vanished_while_it_was_copied_is_asked_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D2: short-lived files are no sign of a source that is not mounted."""
    (place.source / "another").touch()
    vanished = RsyncResult(0, 0, 0, 0, 0.0, vanished=True)
    monkeypatch.setattr(place.transport, "_perform", lambda *_words, **_options: vanished)
    pull: dict[str, Any] = {"temp_dir": place.incoming, "live": True, "expect_entries": 1}
    place.transport.rsync_pull(place.peer, str(place.source), place.target, **pull)
    (place.source / "another").unlink()
    with pytest.raises(PermanentError, match="has 0 entries"):
        place.transport.rsync_pull(place.peer, str(place.source), place.target, **pull)


def test_a_view_that_is_not_wanted_any_more_is_not_waited_for(place: Place) -> None:
    """A source that does not answer holds up no abort."""
    view = place.directory / "view"
    view.mkdir()
    place.sshd.freeze()
    cancelled, errors = threading.Event(), []

    def mount() -> None:
        try:
            place.transport.mount_remote(place.peer, str(place.source), view, cancelled=cancelled)
        except CancelledError as error:
            errors.append(error)

    mounting = threading.Thread(target=mount, daemon=True)
    mounting.start()
    wait_for(lambda: bool(place.ssh_processes()))
    cancelled.set()
    mounting.join(DEADLINE_SECONDS)
    assert errors and not mounts.is_mounted(view)
    wait_for(lambda: not place.ssh_processes())


def test_contents_that_changed_behind_size_and_time_are_found_by_checksum_and_by_rereading(place: Place) -> None:
    """A18: the quick check alone would miss them, also against a basis of equal size and time."""
    for name in ("a", "b"):
        (place.source / name).write_bytes(b"new!" * 1000)
        (place.target / name).write_bytes(b"old!" * 1000)
        for tree in (place.source, place.target):
            os.utime(tree / name, ns=(10**18, 10**18))
    basis, replica = place.directory / "basis", place.directory / "replica"
    shutil.copytree(place.target, basis)
    replica.mkdir()
    quick = place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming)
    assert quick.files == 0
    place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming, checksum=True)
    assert (place.target / "a").read_bytes() == b"new!" * 1000
    place.transport.rsync_pull(
        place.peer,
        str(place.source),
        replica,
        temp_dir=place.incoming,
        files_from=[b"a", b"b"],
        reread=True,
        basis=basis,
    )
    assert (replica / "b").read_bytes() == b"new!" * 1000
    assert (basis / "b").read_bytes() == b"old!" * 1000


def test_times_are_told_apart_within_one_second(place: Place) -> None:
    """A18: of directories, and of files that changed without another size."""
    second = 1_600_000_000_000_000_000
    for tree, nanoseconds in ((place.source, 700), (place.target, 300)):
        (tree / "directory").mkdir()
        (tree / "file").write_text(str(nanoseconds))
        for name in ("directory", "file"):
            os.utime(tree / name, ns=(second, second + nanoseconds))
    place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming)
    assert (place.target / "file").read_text() == "700"
    assert (place.target / "file").stat().st_mtime_ns == second + 700
    assert (place.target / "directory").stat().st_mtime_ns == second + 700


def test_a_basis_saves_traffic(place: Place) -> None:
    contents = secrets.token_bytes(1_000_000)
    (place.source / "big").write_bytes(contents + b"tail")
    basis, replica = place.directory / "basis", place.directory / "replica"
    basis.mkdir()
    replica.mkdir()
    (basis / "big").write_bytes(contents)
    result = place.transport.rsync_pull(
        place.peer,
        str(place.source),
        replica,
        temp_dir=place.incoming,
        files_from=[b"big"],
        reread=True,
        basis=basis,
    )
    assert (replica / "big").read_bytes() == contents + b"tail"
    assert result.bytes_received < 100_000
    assert result.matched_bytes > 900_000


def test_a_single_file_is_a_tree_too(place: Place) -> None:
    (place.source / "app.conf").write_text("one")
    to = place.target / "tree"
    for text in ("one", "two"):
        (place.source / "app.conf").write_text(text)
        place.transport.rsync_pull(
            place.peer, str(place.source / "app.conf"), to, temp_dir=place.incoming, single_file=True, checksum=True
        )
        assert to.read_text() == text


def test_a_file_that_cannot_be_brought_is_named(place: Place) -> None:
    """D1: exit 23 is a failure that says which file."""
    (place.source / "good").write_text("good")
    with pytest.raises((PermanentError, TransientError), match="absent"):
        place.transport.rsync_pull(
            place.peer,
            str(place.source),
            place.target,
            temp_dir=place.incoming,
            files_from=[b"good", b"absent"],
        )


def arrived_before(place: Place) -> None:
    """So that the next transfer is not the first one, which writes in place."""
    for tree in (place.source, place.target):
        (tree / "of an earlier one").touch()


def interrupted_transfer(place: Place, partial: Path, *, first: bool = False) -> None:
    """A large file on the source, and a transfer that is ended in the middle of it; ``first``: into an empty tree."""
    (place.source / "big").write_bytes(secrets.token_bytes(3_000_000))
    if not first:
        arrived_before(place)
    cancelled = threading.Event()
    with pytest.raises(CancelledError):
        place.transport.rsync_pull(
            place.peer,
            str(place.source),
            place.target,
            temp_dir=place.incoming,
            partial_dir=partial,
            bwlimit_kib=500,
            on_progress=lambda progress: cancelled.set() if progress.bytes > 100_000 else None,
            cancelled=cancelled,
        )


def test_a_transfer_stops_when_it_is_told_to_and_goes_on_later(place: Place) -> None:
    partial = place.directory / "partial"
    interrupted_transfer(place, partial)
    assert not (place.target / "big").exists()
    result = place.transport.rsync_pull(
        place.peer, str(place.source), place.target, temp_dir=place.incoming, partial_dir=partial
    )
    assert (place.target / "big").read_bytes() == (place.source / "big").read_bytes()
    assert (result.matched_bytes > 0) == Resumption().possible(place.directory)


def test_what_an_interrupted_first_transfer_left_is_never_taken_for_the_file(place: Place) -> None:
    """D3: into an empty tree files are written in place, and the next transfer goes on with what is there."""
    interrupted_transfer(place, place.directory / "partial", first=True)
    (place.source / "two").write_bytes(b"2")
    os.link(place.source / "two", place.source / "names")
    with (place.source / "holes").open("wb") as holes:
        holes.seek(10_000_000)
        holes.write(b"end")
    result = place.transport.rsync_pull(
        place.peer, str(place.source), place.target, temp_dir=place.incoming, partial_dir=place.directory / "partial"
    )
    assert list(compare(walk(place.source, digest=True), walk(place.target, digest=True))) == []
    assert result.matched_bytes > 0


def test_a_first_transfer_keeps_holes_and_hard_links(place: Place) -> None:
    """P4, D15: written in place as well."""
    (place.source / "two").write_bytes(b"2")
    os.link(place.source / "two", place.source / "names")
    with (place.source / "holes").open("wb") as holes:
        holes.seek(10_000_000)
        holes.write(b"end")
    place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming)
    assert list(compare(walk(place.source, digest=True), walk(place.target, digest=True))) == []
    assert (place.target / "holes").stat().st_blocks * 512 < 1_000_000
    assert list(place.incoming.iterdir()) == []


CRASHES_OVER_PARTS = """#!/bin/sh
for word; do case $word in --partial-dir=*) parts=${word#*=};; esac; done
[ -z "$parts" ] || [ -z "$(ls "$parts" 2>/dev/null)" ] || kill -SEGV $$
exec /usr/bin/rsync "$@"
"""


def test_an_interrupted_transfer_is_completed_also_by_an_rsync_that_crashes_over_parts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3: as Debian 12's does; its transfers begin the file anew."""
    programs = place.directory / "programs"
    programs.mkdir()
    (programs / "rsync").write_text(CRASHES_OVER_PARTS)
    (programs / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    partial = place.directory / "partial"
    partial.mkdir()
    interrupted_transfer(place, partial)
    (partial / "big").write_bytes(b"of an earlier life, with another rsync")
    place.transport.rsync_pull(
        place.peer, str(place.source), place.target, temp_dir=place.incoming, partial_dir=partial
    )
    assert (place.target / "big").read_bytes() == (place.source / "big").read_bytes()


def test_a_source_that_dies_in_the_middle_is_transient_and_the_transfer_resumes(place: Place) -> None:
    """D3, A6: an interrupted stream is resumed; nothing half-made is under a final name."""
    (place.source / "big").write_bytes(secrets.token_bytes(3_000_000))
    arrived_before(place)
    killed = threading.Event()

    def kill(progress: Progress) -> None:
        if progress.bytes > 100_000 and not killed.is_set():
            killed.set()
            place.sshd.stop()

    partial = place.directory / "partial"
    with pytest.raises(TransientError):
        place.transport.rsync_pull(
            place.peer,
            str(place.source),
            place.target,
            temp_dir=place.incoming,
            partial_dir=partial,
            bwlimit_kib=500,
            on_progress=kill,
        )
    assert not (place.target / "big").exists()
    place.sshd.start()
    place.transport.rsync_pull(
        place.peer, str(place.source), place.target, temp_dir=place.incoming, partial_dir=partial
    )
    assert (place.target / "big").read_bytes() == (place.source / "big").read_bytes()


def test_a_sender_that_hangs_is_not_waited_for_for_ever(place: Place) -> None:
    """D3, D11: rsync's own time-out takes its signs of life for progress, however long the other side is silent."""
    (place.source / "a").write_bytes(secrets.token_bytes(1_500_000))
    (place.source / "z").write_bytes(b"a regular file when it is listed")

    def replace_once(_progress: Progress) -> None:
        if (place.source / "z").is_file():
            (place.source / "z").unlink()
            os.mkfifo(place.source / "z")

    began = time.monotonic()
    with pytest.raises(TransientError, match="moved nothing for 4 s"):
        place.transport.rsync_pull(
            place.peer,
            str(place.source),
            place.target,
            temp_dir=place.incoming,
            live=True,
            bwlimit_kib=500,
            timeout_seconds=2,
            on_progress=replace_once,
        )
    assert time.monotonic() - began < 60
    assert not mounts.processes_with_argument(os.fsencode(place.target), program=b"rsync")
    place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming, live=True)
    assert stat.S_ISFIFO((place.target / "z").lstat().st_mode)


def test_a_full_target_is_a_permanent_failure(place: Place) -> None:
    """D4: ENOSPC."""
    small = place.directory / "small"
    small.mkdir()
    mounts.mount("tmpfs", "none", small, "size=256k")
    (small / "target").mkdir()
    (small / "incoming").mkdir()
    (place.source / "big").write_bytes(secrets.token_bytes(1_000_000))
    with pytest.raises(PermanentError, match="does not fit"):
        place.transport.rsync_pull(place.peer, str(place.source), small / "target", temp_dir=small / "incoming")


def test_a_fetched_file_is_what_was_announced_or_nothing(place: Place) -> None:
    """D23: size and SHA-256 are compared; a wrong file does not replace a good one."""
    file = place.source / "odd *[name]"
    file.write_bytes(b"manifest")
    good = FileRef(path=str(file), size_bytes=8, sha256=hashlib.sha256(b"manifest").hexdigest())
    to = place.target / "manifest"
    place.transport.fetch(place.peer, good, to)
    assert to.read_bytes() == b"manifest"
    assert stat.S_IMODE(to.stat().st_mode) == 0o600
    for wrong in (
        FileRef(path=str(file), size_bytes=8, sha256="0" * 64),
        FileRef(path=str(file), size_bytes=7, sha256=good.sha256),
        FileRef(path=str(file) + "-absent", size_bytes=8, sha256=good.sha256),
        FileRef(path=str(place.source), size_bytes=4096, sha256=good.sha256),
    ):
        with pytest.raises((PermanentError, TransientError)):
            place.transport.fetch(place.peer, wrong, to)
    assert to.read_bytes() == b"manifest"
    assert os.listdir(place.target) == ["manifest"]


def test_a_remote_view_opened_early_shows_later_changes_exactly(place: Place) -> None:
    """The view is made before the source stops and read after: sizes and contents must not be remembered."""
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    file = place.source / "file"
    file.write_bytes(b"short")
    place.transport.mount_remote(place.peer, str(place.source), mountpoint)
    assert (mountpoint / "file").read_bytes() == b"short"
    file.write_bytes(b"much longer than before")
    assert (mountpoint / "file").stat().st_size == 23
    assert (mountpoint / "file").read_bytes() == b"much longer than before"
    (place.source / "new").write_bytes(b"new")
    assert (mountpoint / "new").read_bytes() == b"new"
    with pytest.raises(OSError, match="Read-only"):
        (mountpoint / "file").write_bytes(b"x")


def test_a_remote_view_cannot_make_this_host_read_its_own_files(place: Place) -> None:
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    secret = place.directory / "secret"
    secret.write_text("of the target")
    (place.source / "trap").symlink_to(secret)
    place.transport.mount_remote(place.peer, str(place.source), mountpoint)
    with pytest.raises(OSError):
        (mountpoint / "trap").read_text()


def test_mounting_twice_is_harmless_and_unmounting_leaves_no_process(place: Place) -> None:
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    for _ in range(2):
        place.transport.mount_remote(place.peer, str(place.source), mountpoint)
    assert len(mounts.mounts_below(mountpoint)) == 1
    for _ in range(2):
        place.transport.unmount_remote(mountpoint)
    assert not mounts.is_mounted(mountpoint)
    place.transport.close()
    wait_for(lambda: not place.ssh_processes())


def test_a_tree_that_is_not_there_cannot_be_mounted(place: Place) -> None:
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    with pytest.raises(PermanentError, match="cannot be shown"):
        place.transport.mount_remote(place.peer, str(place.source) + "-gone", mountpoint)
    assert not mounts.is_mounted(mountpoint)


def test_a_killed_sshfs_is_noticed_and_replaced(place: Place) -> None:
    """D14, A6: the probe says so without hanging, and mounting again heals it."""
    mountpoint = place.view_of_a_file()
    [pid] = mounts.processes_with_argument(os.fsencode(mountpoint), program=b"sshfs")
    os.kill(pid, 9)
    wait_for(lambda: not place.transport.probe(mountpoint))
    place.transport.mount_remote(place.peer, str(place.source), mountpoint)
    assert (mountpoint / "file").read_text() == "here"


def test_a_plain_tree_comes_whole_and_takes_no_attribute_from_where_it_arrives(place: Place) -> None:
    """D17: a directory whose default ACL all new files in it get is one into which nothing is plain."""
    (place.source / "below").mkdir()
    (place.source / "below" / "file").write_bytes(b"contents" * 1000)
    (place.source / "link").symlink_to("below/file")
    os.utime(place.source / "below", ns=(1, 10**18 + 1))
    inheriting = place.directory / "inheriting"
    inheriting.mkdir()
    subprocess.run(["setfacl", "-d", "-m", "u:7:rwx", str(inheriting)], check=True)
    for target in (place.target, inheriting):
        place.transport.rsync_pull(
            place.peer, str(place.source), target, temp_dir=place.incoming, plain=True, expect_entries=1
        )
        assert list(compare(walk(place.source, digest=True), walk(target, digest=True))) == []


@pytest.mark.parametrize(
    ("plain", "there_already", "asked_for"), [(True, False, "-a"), (True, True, "-aHAXS"), (False, False, "-aHAXS")]
)
def test_only_the_first_attempt_at_a_plain_tree_asks_for_no_attributes(
    place: Place, monkeypatch: pytest.MonkeyPatch, plain: bool, there_already: bool, asked_for: str
) -> None:
    """What is renamed into its place from a directory beside takes that one's attributes along."""
    asked = []
    monkeypatch.setattr(
        place.transport,
        "_perform",
        lambda _peer, command, **_: asked.append(command) or RsyncResult(0, 0, 0, 0, 0.0, False),
    )
    if there_already:
        (place.target / "half").touch()
    place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming, plain=plain)
    [command] = asked
    assert [word for word in command if str(word).startswith("-a")] == [asked_for]


def test_an_interrupted_plain_round_brings_no_attributes_of_the_directory_beside(place: Place) -> None:
    """D17: rsync takes an inherited ACL away from the tree's root at once, and the temporary directory keeps its own."""
    (place.source / "file").write_bytes(b"contents" * 1000)
    for directory in (place.incoming, place.target):
        subprocess.run(["setfacl", "-d", "-m", "u:7:rwx", str(directory)], check=True)
    (place.target / "of the first attempt").touch()
    subprocess.run(["setfacl", "-b", "-k", str(place.target)], check=True)
    place.transport.rsync_pull(place.peer, str(place.source), place.target, temp_dir=place.incoming, plain=True)
    assert list(compare(walk(place.source, digest=True), walk(place.target, digest=True))) == []


def connections_to(peer: Peer) -> int:
    """How many TCP connections to the peer's sshd are open from here."""
    line = ["ss", "-Htn", "state", "established", f"dport = :{peer.port}"]
    return len(subprocess.run(line, check=True, capture_output=True).stdout.splitlines())


@pytest.mark.parametrize("run_dir", ["run", "with a blank, and a comma"])
def test_all_sessions_of_a_view_go_over_one_connection_of_its_own(place: Place, run_dir: str) -> None:
    """A key exchange costs more than all else; and the agent's own connection ends with the agent."""
    transport = Transport(place.directory / run_dir)
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    (place.source / "file").write_text("here")
    try:
        transport.mount_remote(place.peer, str(place.source), mountpoint)
        assert len(mounts.processes_with_argument(os.fsencode(transport.run_dir), program=b"ssh")) == 1 + 3
        assert connections_to(place.peer) == 1 + 1
        transport.close()
        wait_for(lambda: connections_to(place.peer) == 1)
        assert (mountpoint / "file").read_text() == "here"
        assert list(transport.run_dir.glob("*.view"))
    finally:
        transport.unmount_remote(mountpoint)
    wait_for(lambda: connections_to(place.peer) == 0)
    assert not list(transport.run_dir.glob("*.view"))


def test_a_view_opens_where_a_connection_carries_but_one_session(place: Place) -> None:
    """C10: those that cannot join connect for themselves."""
    place.sshd.stop()
    place.sshd.start("MaxSessions 1")
    mountpoint = place.view_of_a_file()
    assert (mountpoint / "file").read_text() == "here"
    assert connections_to(place.peer) == 1 + 3


def test_a_view_whose_connection_is_killed_connects_again(place: Place) -> None:
    """C1, D14: whichever of its ssh processes carried the others."""
    mountpoint = place.view_of_a_file()
    place.transport.close()
    for pid in mounts.processes_with_argument(os.fsencode(place.transport.run_dir), program=b"ssh"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    wait_for(lambda: shows(mountpoint / "file", "here"))
    place.transport.unmount_remote(mountpoint)
    wait_for(lambda: not place.ssh_processes())


def test_a_view_does_not_wait_for_the_connection_of_a_dead_one(place: Place) -> None:
    """C1: an ssh process that waits for a host which does not answer would have the new view wait as well."""
    mountpoint = place.view_of_a_file()
    place.transport.close()
    [sshfs] = mounts.processes_with_argument(os.fsencode(mountpoint), program=b"sshfs")
    stuck = mounts.processes_with_argument(os.fsencode(place.transport.run_dir), program=b"ssh")
    for pid in stuck:
        os.kill(pid, signal.SIGSTOP)
    try:
        os.kill(sshfs, signal.SIGKILL)
        place.transport.mount_remote(place.peer, str(place.source), mountpoint)
        assert (mountpoint / "file").read_text() == "here"
    finally:
        for pid in stuck:
            os.kill(pid, signal.SIGKILL)
    place.transport.unmount_remote(mountpoint)
    mounts.wait_until_gone(stuck, timeout_seconds=DEADLINE_SECONDS)
    wait_for(lambda: len(list(place.transport.run_dir.glob("*.view"))) == 1)  # the killed ones could not remove theirs
    place.transport.mount_remote(place.peer, str(place.source), mountpoint)
    [own] = place.transport.run_dir.glob("*.view")
    place.transport.unmount_remote(mountpoint)
    wait_for(lambda: not own.exists())


def test_a_frozen_peer_is_noticed_by_the_probe_within_its_time(place: Place) -> None:
    """D14, C1: whoever looks may hang, so a child looks."""
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    place.transport.mount_remote(place.peer, str(place.source), mountpoint)
    assert place.transport.probe(mountpoint)
    place.sshd.freeze()
    assert not place.transport.probe(mountpoint, timeout_seconds=0.5)
    place.sshd.thaw()
    wait_for(lambda: place.transport.probe(mountpoint))


def test_reads_go_on_after_the_peer_has_come_back(place: Place) -> None:
    """C1: what is read while the peer is away fails with an error, never with wrong data; later reads reconnect."""
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    (place.source / "file").write_text("contents")
    place.transport.mount_remote(place.peer, str(place.source), mountpoint)
    place.sshd.stop()
    with pytest.raises(OSError):
        (mountpoint / "file").read_text()
    place.sshd.start()
    wait_for(lambda: shows(mountpoint / "file", "contents"))


def test_a_view_in_use_is_not_torn_away(place: Place) -> None:
    """O12: no lazy unmount; the error names who holds it."""
    mountpoint = place.directory / "remote"
    mountpoint.mkdir()
    (place.source / "file").write_text("contents")
    place.transport.mount_remote(place.peer, str(place.source), mountpoint)
    with (mountpoint / "file").open() as held:
        with pytest.raises(TransientError, match=f"pid {os.getpid()}"):
            place.transport.unmount_remote(mountpoint)
        assert held.read() == "contents"
    place.transport.unmount_remote(mountpoint)
