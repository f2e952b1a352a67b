"""Reading the kernel's mount table: any byte in a path, any number of optional fields."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from events.errors import PermanentError
from hostd import mounts
from hostd.mounts import MountRecord, parse_mountinfo_line


def test_octal_escapes_are_bytes() -> None:
    """D19: blanks, newlines, backslashes and bytes that are no text."""
    line = rb"36 35 98:0 /root\040x /mnt/a\012b\134c\377 rw,noatime master:1 shared:7 - ext4 /dev/my\040disk rw,errors=continue"
    assert parse_mountinfo_line(line) == MountRecord(
        36, 35, "98:0", b"/root x", b"/mnt/a\nb\\c\xff", "ext4", b"/dev/my disk", b"rw,errors=continue"
    )


def test_a_mount_without_optional_fields_and_without_options_is_read() -> None:
    record = parse_mountinfo_line(b"1 0 0:1 / / rw - fuse.sshfs alpha:/ ")
    assert record is not None
    assert (record.point, record.kind, record.source, record.options) == (b"/", "fuse.sshfs", b"alpha:/", b"")


@pytest.mark.parametrize("line", [b"", b"garbage", b"1 2 3 4 5 6 7", b"x 0 0:1 / / rw - ext4 a b", b"1 0 0:1 / / rw -"])
def test_a_line_of_another_shape_is_no_mount(line: bytes) -> None:
    assert parse_mountinfo_line(line) is None


def test_a_plain_directory_is_not_mounted_and_unmounting_it_is_harmless(tmp_path: Path) -> None:
    assert not mounts.is_mounted(tmp_path)
    assert mounts.mounts_below(tmp_path) == []
    mounts.unmount(tmp_path)


def test_the_mount_point_itself_is_not_resolved(tmp_path: Path) -> None:
    """D14: it may be dead, and looking at it would hang."""
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "point").symlink_to("/nowhere")
    assert mounts.resolved(tmp_path / "way" / "point") == os.fsencode(tmp_path / "real" / "point")


def test_only_files_below_are_named_as_open(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").touch()
    (tmp_path / "inside-not").touch()
    with (tmp_path / "in" / "file").open(), (tmp_path / "inside-not").open():
        assert mounts.open_below(os.getpid(), os.fsencode(tmp_path / "in")) == [b"file"]


@pytest.mark.root
@pytest.mark.parametrize(
    "name", [b"plain", b"a b", b"tab\t#hash\\octal\\040", b"line\nline", b"\xff\xfe", b" ", b"#\\"]
)
def test_a_mount_point_of_any_name_is_found(tmp_path: Path, name: bytes) -> None:
    """D19: also where only the lines that may be meant are taken apart."""
    (tmp_path / "tree").mkdir()
    point = tmp_path / os.fsdecode(name)
    point.mkdir()
    assert not mounts.is_mounted(point)
    mounts.bind(tmp_path / "tree", point)
    try:
        assert mounts.is_mounted(point)
    finally:
        mounts.unmount(point)
    assert not mounts.is_mounted(point)


@pytest.mark.root
def test_a_file_system_is_mounted_by_names_relative_to_a_directory(tmp_path: Path) -> None:
    """O10: this process's own working directory stays what it was."""
    here = os.getcwd()
    stage = tmp_path / "a,b:c"
    for part in ("lower", "upper", "work", "merged"):
        (stage / part).mkdir(parents=True)
    (stage / "lower" / "file").write_text("below")
    options = "lowerdir=lower,upperdir=upper,workdir=work"
    mounts.mount("overlay", "some-name", "merged", options, working_directory=stage)
    try:
        record = mounts.mount_at(stage / "merged")
        assert record is not None
        assert (record.kind, record.source) == ("overlay", b"some-name")
        assert (stage / "merged" / "file").read_text() == "below"
    finally:
        mounts.unmount(stage / "merged")
    assert os.getcwd() == here


@pytest.mark.root
def test_a_mount_that_the_kernel_refuses_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(PermanentError, match="overlay could not be mounted on merged: "):
        mounts.mount("overlay", "name", "merged", "lowerdir=missing", working_directory=tmp_path)
