"""Marks of files that do not travel, set with the tools that administrators use."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from hostd.file_flags import Uncarried

pytestmark = pytest.mark.root


def test_immutable_and_append_only_files_are_told(tmp_path: Path) -> None:
    """D25."""
    for name in ("plain", "fixed", "log", "also fixed"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to("fixed")
    marked = [str(tmp_path / name) for name in ("fixed", "also fixed", "log")]
    subprocess.run(["chattr", "+i", *marked[:2]], check=True)
    subprocess.run(["chattr", "+a", marked[2]], check=True)
    try:
        with Uncarried(str(tmp_path)) as uncarried:
            for path in (b"", b"plain", b"fixed", b"link", b"log", b"also fixed", b"gone"):
                uncarried.look(path)
            append_only, immutable = uncarried.warnings("/data")
    finally:
        subprocess.run(["chattr", "-i", "-a", *marked], check=True)
    assert append_only == "/data: 1 entry is append-only, which does not travel; the first: log"
    assert immutable == "/data: 2 entries are immutable, which does not travel; the first: fixed"


def test_a_project_whose_quota_the_files_count_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D25: few kernels and file systems have projects, so the kernel's answer is made up."""

    def answer(_descriptor: int, request: int, buffer: bytearray) -> None:
        assert request == 0x801C581F
        buffer[:] = struct.pack("=IIIII8x", 0, 0, 0, 7, 0)

    monkeypatch.setattr("hostd.file_flags.fcntl.ioctl", answer)
    with Uncarried(str(tmp_path)) as uncarried:
        assert uncarried.warnings("/data") == [
            "/data: its files count for the quota of project 7, which does not travel"
        ]


def test_an_ordinary_tree_is_nothing_to_tell_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with Uncarried(str(tmp_path)) as uncarried:
        uncarried.look(b"")
        uncarried.look(b"file")
        assert uncarried.warnings("/data") == []
    with Uncarried(str(tmp_path / "file")) as uncarried:
        uncarried.look(b"")
        assert uncarried.warnings("/app.conf") == []
