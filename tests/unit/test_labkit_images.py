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
    with pytest.raises(LabError, match=r"no image 'apache'.*redis"):
        images.tar_of("apache")


def test_a_tree_is_taken_with_everything_in_it_but_what_is_left_out(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "kept" / "deep").mkdir(parents=True)
    (top / "man").mkdir()
    for name in ("kept/deep/file", "man/page", "kept/junk"):
        (top / name).write_text(name)
    recipe = images.Recipe(trees=(str(top),), left_out=("man", "junk"), texts=(("opt/a/b", "text"),))
    files = images._contents(recipe)
    assert [path for path in files.values() if path.is_relative_to(top)] == [top / "kept/deep/file"]
    images.write_tar(tmp_path / "tar", files, (), recipe.texts)
    with tarfile.open(tmp_path / "tar") as tar:
        assert {"opt", "opt/a", str(top / "kept/deep/file").lstrip("/")} <= set(tar.getnames())
        member = tar.extractfile("opt/a/b")
        assert member is not None
        assert member.read() == b"text"


def test_a_tree_that_is_not_installed_is_named() -> None:
    with pytest.raises(LabError, match=r"/no/such/tree is not installed"):
        images._contents(images.Recipe(trees=("/no/such/tree",)))
