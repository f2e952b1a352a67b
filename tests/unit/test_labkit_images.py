"""Image tars made from installed programs."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from labkit import images
from labkit.errors import LabError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(images, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_tar_holds_a_shell_and_every_library_that_its_programs_load() -> None:
    with tarfile.open(images.tar_of("redis")) as tar:
        names = set(tar.getnames())
        assert tar.getmember("bin/sh").linkname == "busybox"
        assert tar.getmember("tmp").mode == 0o1777
    libraries = [path.lstrip("/") for path in images.libraries(Path("/usr/bin/redis-server"))]
    assert any("libc.so" in path for path in libraries)
    assert any("ld-linux" in path for path in libraries)
    assert {"usr/bin/redis-server", *libraries} <= names


def test_two_builds_of_the_same_files_are_equal_byte_for_byte(cache: Path) -> None:
    first = images.tar_of("busybox")
    before = first.read_bytes()
    first.unlink()
    assert images.tar_of("busybox") == first
    assert first.read_bytes() == before


def test_a_cached_tar_is_not_made_again(cache: Path) -> None:
    first = images.tar_of("busybox")
    made = first.stat().st_ino
    assert images.tar_of("busybox").stat().st_ino == made
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_an_unknown_image_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(LabError, match=r"no image 'nginx'.*redis"):
        images.tar_of("nginx")
