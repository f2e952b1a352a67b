"""Unions that stood are mounted again at the boot, without the source; nothing else is."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd import mounts, standing
from hostd.federation import Union
from hostd.lower_process import LowerProcess
from tests.support.unions import Link, Stand, differences, wait_for

pytestmark = pytest.mark.root
PATIENCE_SECONDS = 60.0
BLURRED = frozenset({"mtime"})


@pytest.fixture
def stand() -> Iterator[Stand]:
    with Link() as link:
        made = Stand(link)
        try:
            yield made
        finally:
            made.close()


def federated(stand: Stand) -> None:
    """A union with one file that is here, and one whose contents are on the source."""

    def make(tree: Path) -> None:
        tree.mkdir()
        (tree / "here").write_text("here")
        (tree / "there").write_text("old")

    before = stand.begin(make)
    (stand.source / "there").write_text("on the source")
    stand.cut_over(before)


def lose_power(stand: Stand) -> None:
    """As a reboot leaves it: no mount, no process, the disk as it is."""
    identity = stand.union._overlay_name.removeprefix("cargo-union-")
    mounts.unmount(stand.place)
    mounts.unmount(stand.union.stage / "merged")
    LowerProcess(stand.union.stage, f"cargo-lower-{identity}").end()
    wait_for(lambda: not mounts.is_mounted(stand.union.stage / "lower"))
    stand.link.transport.unmount_remote(stand.union.remote)


def again(stand: Stand, state: Path) -> list[standing.Mounted]:
    return standing.mount_again(state, patience_seconds=PATIENCE_SECONDS)


def test_what_stood_stands_again_and_readers_wait_for_the_source(stand: Stand, tmp_path: Path) -> None:
    """A11: before Docker starts, without etcd and without the source."""
    federated(stand)
    standing.note(tmp_path / "migrations" / "m-1", [stand.union])
    (stand.place / "written").write_text("by the container")
    lose_power(stand)
    assert os.listdir(stand.place) == [], "the empty place below the mount, which nobody may find"

    assert again(stand, tmp_path) == [standing.Mounted("m-1", stand.place)]
    assert (stand.place / "here").read_text() == "here"
    assert (stand.place / "written").read_text() == "by the container"
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((stand.place / "there").read_text()))
    reader.start()
    assert again(stand, tmp_path) == [], "it stands already"
    union = Union(stand.union.stage, stand.place)  # the agent, in a life of its own
    union.attach_remote(stand.link.transport, stand.link.sshd.peer, str(stand.source))
    union.mount_lower()
    union.mount_merged()
    reader.join(30)
    assert read == ["on the source"]
    while stand.fill():
        pass
    stand.finish()
    assert (stand.place / "there").read_text() == "on the source"
    assert differences(stand.source, stand.place, but=BLURRED) != []
    assert again(stand, tmp_path) == [], "it is a plain directory now"
    assert not mounts.is_mounted(stand.place)


def test_what_was_being_taken_down_is_left_alone(stand: Stand, tmp_path: Path) -> None:
    """A union whose fold had begun must not be mounted: its layers are being moved."""
    federated(stand)
    standing.note(tmp_path / "migrations" / "m-1", [stand.union])
    while stand.fill():
        pass
    stand.union.unmount_all()
    assert again(stand, tmp_path) == []
    assert not mounts.is_mounted(stand.place)
    stand.union.fold()
    stand.union.remove()
    assert again(stand, tmp_path) == []


def test_one_that_cannot_be_mounted_is_said_and_does_not_keep_the_others(stand: Stand, tmp_path: Path) -> None:
    federated(stand)
    standing.note(tmp_path / "migrations" / "b", [stand.union])
    broken = tmp_path / "migrations" / "a"
    broken.mkdir()
    (broken / standing.RECORD).write_bytes(b"\xc1")
    lose_power(stand)
    first, second = again(stand, tmp_path)
    assert "cannot be read" in first.trouble
    assert second == standing.Mounted("b", stand.place)
    assert mounts.is_mounted(stand.place)
