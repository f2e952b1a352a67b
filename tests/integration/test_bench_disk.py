"""The benchmark's own file system: it is one while it is used, and nothing of it is left, however its user ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchkit import disk as module
from benchkit.disk import disk
from labkit.errors import LabError
from labkit.launch import mount_points
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until

pytestmark = pytest.mark.root

HOLD = """
import sys, time
from pathlib import Path
from benchkit.disk import disk
with disk("held", lambda line: None, Path(sys.argv[1])) as base:
    print(base, flush=True)
    time.sleep(600)
"""


def holder(place: Path) -> subprocess.Popen[str]:
    """Another process that has the disk ``held``, once it has it."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/scripts:{REPOSITORY}"}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None and child.stdout.readline()
    return child


def devices(place: Path) -> list[str]:
    """Loop devices with an image below ``place``."""
    listed = subprocess.run(
        ["losetup", "--list", "--noheadings", "--output", "BACK-FILE"], capture_output=True, text=True, check=True
    )
    return [line for line in listed.stdout.splitlines() if line.startswith(str(place))]


def nothing_is_left(place: Path) -> Callable[[], bool]:
    return lambda: (
        not place.exists() and not devices(place) and not any(str(place) in point for point in mount_points())
    )


def test_the_disk_is_a_journaling_file_system_of_its_own_and_leaves_nothing(tmp_path: Path) -> None:
    place, said = tmp_path / "disks", list[str]()
    with disk("own", said.append, place) as base:
        assert os.path.ismount(base)
        device = next(line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if f" {base} " in line)
        features = subprocess.run(["dumpe2fs", "-h", device], capture_output=True, text=True, check=True).stdout
        assert "has_journal" in features
        assert os.listdir(base) == ["lost+found"]
        (base / "own").mkdir()
    assert not said
    wait_until(nothing_is_left(place), "mount, device or image is left", 5)


def test_nothing_is_left_when_the_run_fails(tmp_path: Path) -> None:
    place = tmp_path / "disks"
    with pytest.raises(KeyboardInterrupt), disk("own", print, place):
        raise KeyboardInterrupt
    wait_until(nothing_is_left(place), "mount, device or image is left", 5)


def test_a_run_that_was_killed_is_cleared_away_by_the_next_one(tmp_path: Path) -> None:
    place = tmp_path / "disks"
    child = holder(place)
    with pytest.raises(LabError, match="another scripts/bench"), disk("held", print, place):
        pass
    (place / "held/disk/left").write_text("of the first")
    child.kill()
    child.wait()
    assert os.path.ismount(place / "held/disk")
    with disk("held", print, place) as base:
        assert os.listdir(base) == ["lost+found"]
        assert len(devices(place)) == 1
    wait_until(nothing_is_left(place), "mount, device or image is left", 5)


def test_without_loop_devices_the_machines_own_file_system_is_used_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, said = tmp_path / "disks", list[str]()
    monkeypatch.setattr(module, "FORMAT", ("false",))
    with disk("own", said.append, place) as base:
        assert not os.path.ismount(base)
        assert os.listdir(base) == []
    assert len(said) == 1 and "depend on the machine's" in said[0]
    wait_until(nothing_is_left(place), "something is left", 5)
