"""The whole benchmark at its smallest, on a lab of its own: every case measures something, and the lab goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from benchkit import disk
from benchkit.cli import CASES, main
from labkit import leftovers
from labkit.spec import REPOSITORY
from labkit.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(900)]
SUBNET = os.environ.get("CARGO_E2E_BENCH_SUBNET", "10.77.20")


def what_is_left(lab: str) -> list[str]:
    """Of the benchmark's lab and of the file system that it stood on, in words."""
    home = disk.PLACE / lab
    images = subprocess.run(
        ["losetup", "--list", "--noheadings", "--output", "BACK-FILE"], capture_output=True, text=True, check=True
    ).stdout.split()
    return leftovers.describe(home, f"cargo-{lab}") + [image for image in images if image.startswith(f"{home}/")]


def test_every_case_can_be_measured(tmp_path: Path) -> None:
    assert main(["--tiny", "--json", str(tmp_path / "figures.json"), "--lab", "bencht", "--subnet", SUBNET]) == 0
    assert set(json.loads((tmp_path / "figures.json").read_text())) == {case.name for case in CASES}
    wait_until(lambda: not what_is_left("bencht"), "something is left", 5)


def test_a_run_that_is_ended_in_the_middle_leaves_nothing() -> None:
    run = subprocess.Popen([f"{REPOSITORY}/scripts/bench", "--only", "agent", "--lab", "bencht", "--subnet", SUBNET])
    try:
        spec = disk.PLACE / "bencht/disk/bencht/lab.json"
        wait_until(spec.exists, "the lab is not being made", 60)
        assert os.path.ismount(disk.PLACE / "bencht/disk")
        run.send_signal(signal.SIGTERM)
        assert run.wait(120) == 143
    finally:
        run.kill()
        run.wait()
    wait_until(lambda: not what_is_left("bencht"), "something is left", 5)
