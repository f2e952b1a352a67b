"""What tests of the union share: a source behind an sshd, and a mount that is brought from it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.unions import Link, Stand


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    """A source, and a way to it."""
    with Link() as link:
        yield link


@pytest.fixture
def stand(link: Link) -> Iterator[Stand]:
    """One mount, not yet brought; its source answers again afterwards, whatever the test did to it."""
    stand = Stand(link)
    try:
        yield stand
    finally:
        link.sshd.stop()
        link.sshd.start()
        stand.close()


@pytest.fixture
def disk(link: Link) -> Iterator[tuple[Path, Path]]:
    """A file system in a file, and that file: what it holds is what would be found after a loss of power."""
    image, place = link.directory / "disk", link.directory / "on-disk"
    place.mkdir()
    with image.open("wb") as stream:
        stream.truncate(64 * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place, image
    finally:
        subprocess.run(["umount", "-R", str(place)], check=True)
