"""What a program sees of a union that a plain directory would not show, and what it must not see.

The limits of overlayfs are asserted here as they are: when a kernel changes one, docs/limits.md has to change with it.
"""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from events.errors import PermanentError
from hostd import mounts
from tests.support.unions import Link, Stand, differences, overlay_marks, snapshot

pytestmark = pytest.mark.root

OLD = b"old contents\n" * 1000
NEW = b"contents at the stop\n" * 1000
NAMES = ("first", "second", "third", ".hidden")


def plant(tree: Path) -> None:
    (tree / "d" / ".dots").mkdir(parents=True)
    for name in NAMES:
        (tree / "d" / name).write_bytes(OLD)
        (tree / "d" / ".dots" / name).write_bytes(OLD)


def cut_over(stand: Stand) -> None:
    """A union in which all files in ``d`` have their contents on the source."""
    before = stand.begin(plant)
    for name in NAMES:
        (stand.source / "d" / name).write_bytes(NEW)
    stand.cut_over(before)


def fill_and_cut(stand: Stand) -> None:
    while stand.fill():
        pass
    stand.union.detach_remote()


# --- while files are copied up -------------------------------------------------------------------------


def test_a_descriptor_from_before_a_write_shows_it_and_a_mapping_from_before_does_not(stand: Stand) -> None:
    """O4: what docs/limits.md says of files that are mapped while another process writes to them for the first time."""
    cut_over(stand)
    path = stand.place / "d" / "first"
    with path.open("rb") as reader, mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[:3] == NEW[:3]
        with path.open("r+b") as writer:
            writer.write(b"WRITTEN")
        assert os.pread(reader.fileno(), 7, 0) == b"WRITTEN"
        assert mapping[:7] == NEW[:7]
    assert path.read_bytes() == b"WRITTEN" + NEW[7:]
    fill_and_cut(stand)
    assert path.read_bytes() == b"WRITTEN" + NEW[7:]


def test_the_first_write_to_a_file_brings_all_of_it_and_nothing_of_it_is_fetched_again(stand: Stand) -> None:
    """O3: the copy-up is the fetch."""
    cut_over(stand)
    path = stand.place / "d" / "second"
    with path.open("ab") as stream:
        stream.write(b"!")
    assert (stand.union.upper_tree / "d" / "second").stat().st_blocks * 512 >= len(NEW)
    assert b"d/second" not in stand.union.fill_list()
    assert path.read_bytes() == NEW + b"!"


def test_a_file_keeps_its_inode_number_from_the_cut_over_to_the_plain_volume(stand: Stand) -> None:
    """O11: a program may remember inode numbers; its open files may be compared with names."""
    cut_over(stand)
    path = stand.place / "d" / "third"
    numbers = [path.stat().st_ino]
    with path.open("ab") as stream:
        stream.write(b"!")
        numbers.append(os.fstat(stream.fileno()).st_ino)
    numbers.append(path.stat().st_ino)
    fill_and_cut(stand)
    numbers.append(path.stat().st_ino)
    stand.finish()
    numbers.append(path.stat().st_ino)
    assert len(set(numbers)) == 1


def test_a_directory_whose_contents_are_on_the_source_can_be_renamed(stand: Stand) -> None:
    """O5: no EXDEV, as a container without a union would see it too."""
    cut_over(stand)
    os.rename(stand.place / "d", stand.place / "elsewhere")
    assert (stand.place / "elsewhere" / "first").read_bytes() == NEW
    fill_and_cut(stand)
    stand.finish()
    assert (stand.place / "elsewhere" / "first").read_bytes() == NEW
    assert sorted(os.listdir(stand.place)) == ["elsewhere"]
    assert overlay_marks(stand.place) == []


# --- the merge -----------------------------------------------------------------------------------------


def test_what_the_container_removed_and_replaced_stays_so_in_the_plain_volume(stand: Stand) -> None:
    """O6, O7: deletion, another type under the name, a directory made again, a rename over; names with dots; no devices."""
    cut_over(stand)
    place = stand.place / "d"
    (place / "first").unlink()
    (place / "second").unlink()
    (place / "second").mkdir()
    (place / ".hidden").rename(place / "third")
    subprocess.run(["rm", "-r", "--", str(place / ".dots")], check=True)
    (place / ".dots").mkdir()
    (place / ".dots" / ".fresh").write_text("made again")
    seen = snapshot(stand.place)
    fill_and_cut(stand)
    stand.finish()
    assert differences(seen, stand.place) == []
    assert sorted(os.listdir(place)) == [".dots", "second", "third"]
    assert os.listdir(place / ".dots") == [".fresh"]
    assert (place / "third").read_bytes() == NEW
    assert not [entry for entry in snapshot(stand.place).values() if entry.kind in ("b", "c")]


def test_nothing_of_the_unions_behaviour_is_left_to_the_distributions_defaults(stand: Stand) -> None:
    """O8: whatever the module's parameters say."""
    cut_over(stand)
    record = mounts.mount_at(stand.place)
    assert record is not None
    shown = record.options
    assert b"metacopy=on" in shown
    assert b"redirect_dir=on" in shown
    assert b"index=on" not in shown
    assert b"xino=on" not in shown


# --- disks ---------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_after_the_start_stops_the_fill_and_takes_nothing_from_the_container(link: Link) -> None:
    """D9: the fill says what is missing; what is here and what is on the source are both still seen; room lets it go on."""
    stand = Stand(link)
    try:
        mounts.mount("tmpfs", "none", stand.volume, "size=6m")
        before = stand.begin(plant)
        (stand.source / "large").write_bytes(os.urandom(2_000_000))
        stand.cut_over(before)
        (stand.place / "d" / "first").write_bytes(b"the container's own")
        expected = snapshot(stand.place)
        ballast = stand.volume / "ballast"
        with ballast.open("wb") as stream:
            free = os.statvfs(stand.volume)
            stream.write(bytes(free.f_bavail * free.f_frsize - 300_000))
        with pytest.raises(PermanentError, match="does not fit"):
            stand.fill()
        assert differences(expected, stand.place) == []
        assert b"large" in stand.union.fill_list()
        ballast.unlink()
        fill_and_cut(stand)
        assert differences(expected, stand.place) == []
    finally:
        stand.close()


def after_power_loss(image: Path, where: Path) -> Path:
    """The file system as it would be found: a copy of what has reached the disk, mounted beside it."""
    copy = where / "copy"
    subprocess.run(["cp", "--sparse=always", "--", str(image), str(copy)], check=True)
    found = where / "found"
    found.mkdir()
    subprocess.run(["mount", "-o", "loop", str(copy), str(found)], check=True)
    return found


def test_what_a_round_has_brought_is_there_after_a_loss_of_power(stand: Stand, disk: tuple[Path, Path]) -> None:
    """A16: an event says that data has arrived only when it is on the disk."""
    place, image = disk
    stand.source.mkdir()
    plant(stand.source)
    (place / "copy").mkdir()
    (place / "temp").mkdir()
    stand.link.transport.rsync_pull(
        stand.link.sshd.peer, str(stand.source), place / "copy", temp_dir=place / "temp", live=True
    )
    found = after_power_loss(image, stand.base)
    try:
        assert differences(stand.source, found / "copy") == []
    finally:
        subprocess.run(["umount", str(found)], check=True)
