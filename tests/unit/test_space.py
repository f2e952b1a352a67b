"""Room for the data, by file system."""

from __future__ import annotations

import os
from pathlib import Path

from events.schema import Mount
from hostd.inventory import measure_tree
from hostd.space import Room, room_at, shortages

MB = 1024 * 1024


def mount(name: str, *, megabytes: int = 0, entries: int = 1, apparent_megabytes: int = 0) -> Mount:
    return Mount(
        kind="bind",
        name=name,
        destination="/data",
        tree=name,
        size_bytes=(apparent_megabytes or megabytes) * MB,
        allocated_bytes=megabytes * MB,
        files=entries,
        entries=entries,
    )


ROOMS = {
    "/small": Room(device=1, shown_as="/small", free_bytes=10 * MB, free_inodes=1000),
    "/large": Room(device=2, shown_as="/large", free_bytes=1000 * MB, free_inodes=0),
}


def look(place: Path) -> Room:
    return ROOMS[f"/{place.parts[1]}"]


def reasons(*mounts: Mount) -> list[str]:
    return shortages("beta", [(each, Path(each.name)) for each in mounts], look)


def test_each_file_system_is_asked_for_what_will_lie_on_it() -> None:
    """P17: a bind's file system may be another one than Docker's."""
    assert reasons(mount("/large/a", megabytes=500), mount("/small/b", megabytes=9)) == []
    [said] = reasons(mount("/large/a", megabytes=500), mount("/small/b", megabytes=20))
    assert "10.5 MB free below /small" in said
    [said] = reasons(mount("/small/a", megabytes=6), mount("/small/b", megabytes=6))
    assert "the data needs 13.8 MB" in said, "two that share one are summed up, with the margin"


def test_inodes_count_where_a_file_system_has_a_fixed_number() -> None:
    """P17."""
    [said] = reasons(mount("/small/a", entries=2000))
    assert "1000 inodes free below /small, the data needs 2200" in said
    assert reasons(mount("/large/a", entries=10**7)) == []


def test_a_sparse_file_needs_what_it_holds() -> None:
    """D16."""
    assert reasons(mount("/small/a", megabytes=1, apparent_megabytes=5000)) == []


def test_a_history_that_does_not_know_allocated_bytes_goes_by_the_apparent_size() -> None:
    old = Mount(kind="bind", name="/small/a", destination="/data", tree="/small/a", size_bytes=20 * MB, files=3)
    assert len(reasons(old)) == 1


def test_room_is_looked_for_at_the_nearest_directory_that_exists(tmp_path: Path) -> None:
    found = room_at(tmp_path / "not" / "yet" / "there")
    assert (found.shown_as, found.device) == (str(tmp_path), tmp_path.stat().st_dev)
    assert found.free_bytes > 0


def test_what_is_measured_on_the_source_is_what_a_sparse_file_holds(tmp_path: Path) -> None:
    """D16."""
    with (tmp_path / "sparse").open("wb") as file:
        file.write(b"x" * 5000)
        os.truncate(file.fileno(), 500 * MB)
    measured = measure_tree(str(tmp_path))
    assert measured is not None
    assert measured.size_bytes < MB
    assert measured.files == 2
